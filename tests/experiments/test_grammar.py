import random

import pytest

from seam.experiments.grammar import DIGITS, DOMAINS, VOCABULARY, digit_string, is_held_out, random_words, sample

LENGTHS = {"commands": (2, 8), "digits": (1, 6), "stories": (4, 8), "words": (1, 7), "frequent words": (1, 9)}


@pytest.mark.parametrize("domain", DOMAINS)
def test_sentences_use_the_vocabulary_and_respect_their_lengths(domain):
    rng = random.Random(0)
    shortest, longest = LENGTHS[domain]
    for _ in range(20000):
        words = DOMAINS[domain](rng).split(" ")
        assert set(words) <= set(VOCABULARY)
        assert shortest <= len(words) <= longest


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_seed_decides_the_sentences(domain):
    first, again, other = (sample(domain, 50, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("domain", DOMAINS)
def test_training_and_test_sentences_are_disjoint(domain):
    training = sample(domain, 1500, random.Random(3), held_out=False)
    test = sample(domain, 200, random.Random(3), held_out=True)
    assert len(set(training)) == 1500 and len(set(test)) == 200
    assert not set(training) & set(test)


def test_sentences_reach_every_word_and_the_domains_differ():
    rng = random.Random(4)
    words = {domain: {w for _ in range(5000) for w in DOMAINS[domain](rng).split()} for domain in DOMAINS}
    assert words["commands"] | words["stories"] == set(VOCABULARY) == words["words"]
    assert words["digits"] == set(DIGITS) < words["commands"]
    assert 20 < len(words["stories"] - words["commands"]) <= 60


def test_stories_let_only_fitting_things_meet():
    rng = random.Random(5)
    for text in (DOMAINS["stories"](rng) for _ in range(3000)):
        if "wears" in text:
            assert text.endswith(("coat", "hat"))
        if "sails" in text:
            assert "boat" in text or "ship" in text
        assert "a old" not in text


def test_held_out_is_stable_and_about_a_tenth():
    texts = sorted({random_words(random.Random(seed)) for seed in range(5000)})
    assert 0.08 < sum(map(is_held_out, texts)) / len(texts) < 0.12
    # A change of the hash would move test sentences into training.
    assert [is_held_out(f"turn on the light {digit}") for digit in DIGITS] == [digit == "two" for digit in DIGITS]


def test_few_digits_are_never_held_out():
    assert not any(is_held_out(f"{a} {b}") for a in DIGITS for b in DIGITS)
    assert not any(map(is_held_out, DIGITS))
    assert any(is_held_out(f"{a} {b} {a}") for a in DIGITS for b in DIGITS)


def test_digit_strings_have_every_length_up_to_the_limit():
    rng = random.Random(6)
    assert {len(digit_string(rng, max_digits=3).split()) for _ in range(200)} == {1, 2, 3}


def test_impossible_samples_are_refused():
    with pytest.raises(ValueError, match="unknown domain"):
        sample("poems", 1, random.Random(0))
    with pytest.raises(ValueError, match="too few sentences"):
        sample("stories", 100_000, random.Random(0))
    assert len(sample("digits", 200, random.Random(0), held_out=None, unique=False)) == 200


def test_frequent_words_are_those_of_text():
    """Half of the words follow the text: "the" is in most sentences, "pear" in few."""
    rng = random.Random(1)
    drawn = [word for _ in range(4000) for word in DOMAINS["frequent words"](rng).split()]
    assert drawn.count("the") > 5 * drawn.count("pear") > 0
    assert set(drawn) == set(VOCABULARY)
