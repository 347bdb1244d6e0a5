import json
import random
import unicodedata

import jiwer
import pytest

from seam.evaluation.scoring import (
    ErrorCount,
    character_errors,
    fits_english,
    has_loop,
    interval,
    repetitions,
    token_errors,
    total,
    utterance_character_errors,
    utterance_errors,
    word_errors,
    words,
)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "insertions", "deletions", "substitutions"),
    [
        ("one two three", "one two three", 0, 0, 0),
        ("one two three", "one too three", 0, 0, 1),
        ("one two three", "one three", 0, 1, 0),
        ("one two three", "one two two three", 1, 0, 0),
        ("One, two three!", "one two three.", 0, 0, 0),
        ("one two", "", 0, 2, 0),
        ("five", "six seven", 1, 0, 1),
        ("a b c d e", "b c x e f g", 2, 1, 1),
    ],
)
def test_counts(reference, hypothesis, insertions, deletions, substitutions):
    count = word_errors([reference], [hypothesis])
    assert count == ErrorCount(insertions, deletions, substitutions, len(reference.split()))
    assert count.errors == insertions + deletions + substitutions


def test_characters_are_those_of_the_normalised_text_with_its_spaces():
    # "the cat" against "the hats": c -> h, s inserted; 7 characters, one of them the space.
    assert character_errors(["The  cat."], ["the hats"]) == ErrorCount(1, 0, 1, 7)
    assert character_errors(["colour"], ["color"], "english") == ErrorCount(0, 0, 0, 5)
    assert character_errors(["colour"], ["color"], "basic") == ErrorCount(0, 1, 0, 6)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u0915\u093f", "\u0915\u0940"),  # Hindi ki and kii, told apart by a vowel sign
        ("\u0e2b\u0e32", "\u0e2b\u0e49\u0e32"),  # Thai for to seek, and five: a tone mark
        ("\u043c\u043e\u0439", "\u043c\u043e\u0438"),  # Russian my, of one thing and of several
        ("\u304b", "\u304c"),  # Japanese ka and ga
        ("\u0643\u064e\u062a\u064e\u0628", "\u0643\u064f\u062a\u0650\u0628"),  # Arabic wrote, and was written
    ],
)
def test_marks_of_other_scripts_are_part_of_their_words(one, other):
    assert word_errors([one], [other]) == ErrorCount(0, 0, 1, 1)
    assert word_errors([f"{one} {other}"], [f"{one} {other}"]) == ErrorCount(0, 0, 0, 2)
    assert character_errors([one], [other]).errors > 0
    for form in ("NFC", "NFD"):  # either way of writing the same
        assert word_errors([unicodedata.normalize(form, one)], [one]).errors == 0
    assert not fits_english([f"{one} {other}"])


def test_the_english_normaliser_fits_latin_letters():
    texts = [
        "plain",
        "caf\u00e9",
        "cafe\u0301",
        "na\u00efve \u2013 \u2018so\u2019",
        "\u2764\ufe0f",
        "\u4e2d\u6587",
        "\ud55c",
    ]
    assert fits_english(texts) and fits_english([])
    assert word_errors(["caf\u00e9"], ["cafe"], "english").errors == 0


def test_a_mark_alone_is_no_word():
    assert words("I \u2764\ufe0f you \u0301 \u0130zmir") == ["i", "you", "i\u0307zmir"]


ENGLISH = {
    "numbers": [
        ("twenty five", "25"),
        ("twenty-five", "25"),
        ("one hundred and one men", "101 men"),
        ("two thousand and ten", "2010"),
        ("1,000 men", "1000 men"),
        ("two point five", "2.5"),
        ("minus five", "-5"),
        ("one oh one", "101"),
        ("double five", "55"),
        ("three one four", "314"),
    ],
    "ordinals and decades": [
        ("the first", "the 1st"),
        ("twenty second", "22nd"),
        ("the 3rd", "the 3rd"),
        ("nineteen sixties", "1960s"),
    ],
    "money and shares": [
        ("two hundred dollars", "$200"),
        ("$20 million", "$20000000"),
        ("five cents", "¢5"),
        ("twenty percent", "20%"),
        ("five per cent", "5%"),
        ("per cent", "per cent"),
    ],
    "contractions": [
        ("won't", "will not"),
        ("can't", "can not"),
        ("I've", "i have"),
        ("she'll", "she will"),
        ("they're", "they are"),
        ("I'm", "i am"),
        ("he'd been", "he had been"),
        ("he'd go", "he would go"),
        ("it's been", "it has been"),
        ("it's late", "it is late"),
        ("let's", "let us"),
        ("gonna wanna", "going to want to"),
    ],
    "spelling": [
        ("colour", "color"),
        ("theatre", "theater"),
        ("realise", "realize"),
        ("grey", "gray"),
    ],
    "titles": [("Mr. Smith", "mister smith"), ("Mrs Jones", "missus jones"), ("Dr. No", "doctor no")],
    "fillers": [("uh, um, hmm, yes", "yes"), ("mhm", ""), ("the hum", "the hum")],
    "symbols": [
        ("(laughs) hello [noise]", "hello"),
        ("naïve café", "naive cafe"),
        ("Well... yes!", "well yes"),
        ("it costs $3.50.", "it costs $3.50"),
    ],
}


@pytest.mark.parametrize(("text", "normalized"), [pair for pairs in ENGLISH.values() for pair in pairs])
def test_the_english_normaliser(text, normalized):
    assert " ".join(words(text, "english")) == normalized


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Twenty-five, please!", "twenty five please"),
        ("won't", "won t"),
        ("colour", "colour"),
        ("uh yes", "uh yes"),
        ("(laughs) hello [noise]", "hello"),
        ("3 1 4", "3 1 4"),
    ],
)
def test_the_basic_normaliser_leaves_words_as_they_are(text, normalized):
    assert " ".join(words(text)) == " ".join(words(text, "basic")) == normalized


def test_an_unknown_normaliser_is_refused():
    with pytest.raises(ValueError, match="'German'; accepted: english, basic"):
        word_errors(["a"], ["a"], "German")


def test_digits_stay_words():
    """A normaliser that makes numbers of them would turn one wrong digit into a wrong string."""
    assert word_errors(["three one four"], ["three one five"]).error_rate == pytest.approx(100 / 3)
    assert word_errors(["three one four"], ["three one five"], "english").error_rate == 100


def test_a_corpus_is_counted_together():
    count = word_errors(["one two three", "four"], ["one two", "five"])
    assert count.error_rate == 50.0


def test_tokens_are_counted_as_they_are():
    stage1, drafts = [[7, 8, 9], [7], []], [[7, 9], [5], [7, 7]]
    count = token_errors(stage1, drafts)
    assert (count.deletions, count.substitutions, count.insertions, count.length) == (1, 1, 2, 4)
    assert count.error_rate == 100


def test_an_empty_reference_adds_insertions_and_no_words():
    counts = utterance_errors(["um", "one two"], ["hello there", "one two"], "english")
    assert counts == [ErrorCount(2, 0, 0, 0), ErrorCount(0, 0, 0, 1)]  # "one two" is 12
    assert total(counts).error_rate == 200
    assert word_errors(["um"], ["uh"], "english") == ErrorCount(0, 0, 0, 0)
    assert word_errors(["um"], ["hello"], "english").error_rate == 100


def inject_errors(text: str, vocabulary: list[str], rng: random.Random, count: int) -> str:
    """Substitute, delete and insert words at random positions."""
    result = text.split()
    for _ in range(count):
        position = rng.randrange(len(result) + 1)
        kind = rng.choice("sdi")
        if kind == "i":
            result.insert(position, rng.choice(vocabulary))
        elif position < len(result):
            result[position : position + 1] = [rng.choice(vocabulary)] if kind == "s" else []
    return " ".join(result)


@pytest.fixture(scope="module")
def injected(shared) -> tuple[list[str], list[str]]:
    """Transcripts of the real recordings, without the digits, and the same with up to a dozen errors each."""
    rows = [json.loads(line) for line in (shared / "speech" / "metadata.jsonl").read_text().splitlines()]
    references = [row["text"] for row in rows if row["corpus"] != "fsdd"]
    vocabulary = sorted({word for text in references for word in text.split()})
    rng = random.Random(0)
    return references, [inject_errors(text, vocabulary, rng, rng.randrange(13)) for text in references]


@pytest.mark.parametrize("normalizer", ["english", "basic"])
def test_jiwer_counts_the_same(injected, normalizer):
    sides = [[" ".join(words(text, normalizer)) for text in side] for side in injected]
    ours, theirs = (
        utterance_errors(*injected, normalizer),
        [jiwer.process_words(*pair) for pair in zip(*sides, strict=True)],
    )
    assert len(ours) == 252 and sum(count.errors > 0 for count in ours) > 200
    split_alike = 0
    for count, output in zip(ours, theirs, strict=True):
        assert count.errors == output.insertions + output.deletions + output.substitutions
        assert count.insertions - count.deletions == output.insertions - output.deletions
        assert count.length == output.hits + output.deletions + output.substitutions
        split_alike += count.substitutions == output.substitutions
    assert split_alike > 0.9 * len(ours)  # of several alignments with as few errors each takes one
    assert total(ours).error_rate == pytest.approx(100 * jiwer.wer(*sides), abs=1e-9)
    assert character_errors(*injected, normalizer).error_rate == pytest.approx(100 * jiwer.cer(*sides), abs=1e-9)


def test_injected_errors_are_what_is_counted(shared):
    """A word that is nowhere else, put in, left out or instead of another, is exactly one error of its kind."""
    rows = [json.loads(line) for line in (shared / "speech" / "metadata.jsonl").read_text().splitlines()]
    rng = random.Random(1)
    references, hypotheses, expected = [], [], {"insertions": 0, "deletions": 0, "substitutions": 0}
    for row in rows:
        spoken = words(row["text"])
        if row["corpus"] == "fsdd" or len(set(spoken)) < len(spoken):  # repeated words could be aligned otherwise
            continue
        kind, position = rng.choice(list(expected)), rng.randrange(len(spoken))
        changed = {
            "insertions": [*spoken[:position], "xyzzy", *spoken[position:]],
            "deletions": [*spoken[:position], *spoken[position + 1 :]],
            "substitutions": [*spoken[:position], "xyzzy", *spoken[position + 1 :]],
        }[kind]
        expected[kind] += 1
        references.append(row["text"])
        hypotheses.append(" ".join(changed))
    count = word_errors(references, hypotheses)
    assert min(expected.values()) > 3
    assert {kind: getattr(count, kind) for kind in expected} == expected


def test_no_errors_leave_no_doubt_that_resampling_could_find():
    assert interval(utterance_errors(["one two", "three"], ["one two", "three"])) == (0, 0)


def test_interval_is_around_the_rate_and_the_same_every_time():
    counts = [ErrorCount(0, 0, int(index % 7 == 0), 4) for index in range(200)]
    low, high = interval(counts)
    assert low < total(counts).error_rate < high
    assert interval(counts) == (low, high)
    # The errors are independent, so the normal approximation of the mean of 200 is near.
    share = 29 / 200
    half = 1.96 * 100 / 4 * (share * (1 - share) / 200) ** 0.5
    assert (low, high) == pytest.approx((100 / 4 * share - half, 100 / 4 * share + half), abs=0.3)


def test_fewer_utterances_are_less_certain():
    counts = [ErrorCount(0, 0, index % 2, 4) for index in range(100)]
    (low, high), (lower, higher) = interval(counts), interval(counts[:10])
    assert higher - lower > 2 * (high - low)


def test_no_utterances_have_no_interval():
    with pytest.raises(ValueError, match="at least one utterance"):
        interval([])


def test_an_interval_of_characters_is_narrower_than_one_of_words():
    references, hypotheses = (
        ["several long words here"] * 20,
        ["several long words hear", "several long words here"] * 10,
    )
    word, character = (f(references, hypotheses) for f in (utterance_errors, utterance_character_errors))
    assert interval(character)[1] < interval(word)[1]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "loop"),
    [
        ("go home now", "go go go go home now", True),
        ("go home now", "go go go home now", False),
        ("go go go go home", "go go go go home", False),
        ("go go go go home", "go go go go go home", True),
        ("thank you", "thank you thank you thank you thank you", True),
        ("thank you", "thank you thank you thank you thank", False),
        ("", "a b c d e f g h " * 4, True),
        ("", "a b c d e f g h i " * 4, False),
        ("", "a b c d e f g h " * 3 + "a b c d e f g", False),
        ("on go on go on go on go", "go on go on go on go on", False),  # the same turn of words, begun elsewhere
        ("three one four", "", False),
        ("", "a a b a a b a a b a a b", True),
        ("", "a b a c a b a c a b a b a", False),
    ],
)
def test_loops(reference, hypothesis, loop):
    assert has_loop(reference.split(), hypothesis.split()) is loop


def test_repetitions_are_counted_by_phrase():
    # "b a" overlaps itself; the longest run of each phrase counts
    assert repetitions("a b a b a b c c a b a b".split()) == {("a", "b"): 3, ("c",): 2}
    assert repetitions("a a a a".split()) == {("a",): 4, ("a", "a"): 2}
    assert repetitions("a b c".split()) == {}
