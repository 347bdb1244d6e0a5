"""Score transcripts: two normalisers, one alignment, a bootstrap confidence interval, and repetition loops."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import kaldialign
import numpy as np
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

NORMALIZERS = {"english": EnglishTextNormalizer(), "basic": BasicTextNormalizer(preserve_marks=True)}
"""
Whisper's two (Radford et al. 2022, Appendix C), by the names under which results quote them. "basic": lower case, no
punctuation. Whisper's puts a space in the place of every combining mark, which are the vowels of Indic scripts: here
they stay; a text without them gives the same words. "english", the paper's (Table 1): also numbers as digits,
contractions in full, American spelling (by a table in its package), no fillers, no diacritics: it does not fit other
scripts that have them (see `fits_english`). It turns a string of spoken digits into one word ("three one four" becomes
"314"); for such speech use "basic", which counts each digit.
"""
# They choose a glyph of the character before, such as an emoji's, and are no part of a word.
VARIATION_SELECTORS = dict.fromkeys([*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])
# The block of accents that are written after a letter: where the letter is Latin, they are what the normaliser is for.
LATIN_MARKS = frozenset(map(chr, range(0x300, 0x370)))
LONGEST_PHRASE = 8
REPETITIONS = 4


@dataclass(frozen=True)
class ErrorCount:
    """
    Errors of one utterance or of a corpus.

    Several alignments may have the fewest errors: the counts by kind are those of the alignment that kaldialign finds,
    their sum is the same for all.

    Args:
        insertions, deletions, substitutions: what turns the reference into the hypothesis.
        length: words, or characters, of the normalised reference.
    """

    insertions: int
    deletions: int
    substitutions: int
    length: int

    @property
    def errors(self) -> int:
        """Return the number of errors of all kinds."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def error_rate(self) -> float:
        """Return errors over length in percent. For an empty reference each insertion counts as 100 %."""
        return 100 * self.errors / max(self.length, 1)


def words(text: str, normalizer: str = "basic") -> list[str]:
    """
    Return the words of a text that are scored.

    Args:
        text: as written.
        normalizer: one of `NORMALIZERS`.

    Raises:
        ValueError: for any other normaliser.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer is {normalizer!r}; accepted: {', '.join(NORMALIZERS)}.")
    found = NORMALIZERS[normalizer](text.translate(VARIATION_SELECTORS)).split()
    return found if text.isascii() else [word for word in found if not all(_is_mark(one) for one in word)]


def fits_english(texts: Iterable[str]) -> bool:
    """
    Return whether the English normaliser keeps the words of texts apart.

    It drops the marks that NFKD separates from a letter. On Latin letters those are accents, but in other scripts they
    are vowels (all of Hindi's and Thai's that are no letters) or make other letters (the Russian short i, Japanese ga).
    """
    characters = set().union(*(unicodedata.normalize("NFC", text) for text in texts if not text.isascii()))
    return not any(map(_loses_marks, characters))


def _loses_marks(character: str) -> bool:
    parts = unicodedata.normalize("NFKD", character.translate(VARIATION_SELECTORS))
    if character in LATIN_MARKS or not any(_is_mark(part) for part in parts):
        return False
    return not unicodedata.name(parts[0], "").startswith("LATIN ")


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def utterance_errors(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "basic"
) -> list[ErrorCount]:
    """
    Count the word errors of each utterance, after normalising both sides.

    A reference that normalises to nothing, such as a filler alone, has no words; any output counts as insertions.
    """
    return [
        _count(words(reference, normalizer), words(hypothesis, normalizer))
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]


def utterance_character_errors(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "basic"
) -> list[ErrorCount]:
    """Count the character errors of each utterance as `utterance_errors` does words; a space is a character."""
    return [
        _count(list(" ".join(words(reference, normalizer))), list(" ".join(words(hypothesis, normalizer))))
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]


def _count(reference: list, hypothesis: list) -> ErrorCount:
    distance = kaldialign.edit_distance(reference, hypothesis)
    return ErrorCount(distance["ins"], distance["del"], distance["sub"], len(reference))


def alignment(reference: str, hypothesis: str, normalizer: str = "basic") -> list[tuple[str, str]]:
    """Return pairs of a reference word and its hypothesis word; either is empty for an insertion or a deletion."""
    return kaldialign.align(words(reference, normalizer), words(hypothesis, normalizer), "")


def total(counts: Sequence[ErrorCount]) -> ErrorCount:
    """Sum the counts of a corpus, whose error rate is all errors over all words, not a mean over utterances."""
    return ErrorCount(
        sum(count.insertions for count in counts),
        sum(count.deletions for count in counts),
        sum(count.substitutions for count in counts),
        sum(count.length for count in counts),
    )


def word_errors(references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "basic") -> ErrorCount:
    """Count the word errors of a corpus, after normalising both sides."""
    return total(utterance_errors(references, hypotheses, normalizer))


def character_errors(references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "basic") -> ErrorCount:
    """Count the character errors of a corpus, after normalising both sides."""
    return total(utterance_character_errors(references, hypotheses, normalizer))


def token_errors(references: Sequence[Sequence[int]], hypotheses: Sequence[Sequence[int]]) -> ErrorCount:
    """Count the errors of a corpus of token ids, without normalisation."""
    return total([_count(list(one), list(other)) for one, other in zip(references, hypotheses, strict=True)])


def interval(counts: Sequence[ErrorCount], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """
    Return the 95 % bootstrap confidence interval of a corpus' error rate (Bisani and Ney 2004).

    It spans the 2.5th to the 97.5th percentile of the error rates of corpora of the same size, drawn from the
    utterances with replacement.

    Args:
        counts: of every utterance, independent of one another.
        resamples: number of corpora.
        seed: equal seeds give equal intervals.

    Returns:
        Lower and upper bound in percent.

    Raises:
        ValueError: when there are no utterances.
    """
    if not counts:
        raise ValueError("a confidence interval needs at least one utterance")
    errors, lengths = np.array([(count.errors, count.length) for count in counts]).T
    rng = np.random.default_rng(seed)
    error_rates = []
    for _ in range(resamples):
        drawn = rng.integers(len(counts), size=len(counts))
        error_rates.append(100 * errors[drawn].sum() / max(lengths[drawn].sum(), 1))
    low, high = np.percentile(error_rates, [2.5, 97.5])
    return float(low), float(high)


def has_loop(reference: Sequence[str], hypothesis: Sequence[str]) -> bool:
    """
    Return whether the hypothesis repeats a phrase in a loop, as a hallucinating model does.

    A loop is a phrase of at most `LONGEST_PHRASE` words that occurs at least `REPETITIONS` times in a row, and more
    often
    than in the reference: "no no no no" is no loop if that was said.
    """
    spoken = repetitions(reference)
    return any(
        count >= REPETITIONS and count > spoken.get(phrase, 0) for phrase, count in repetitions(hypothesis).items()
    )


def repetitions(words: Sequence[str]) -> dict[tuple[str, ...], int]:
    """
    Return how often in a row each repeated phrase occurs.

    A phrase is keyed by its alphabetically first rotation, for "go on go on go" repeats "go on" as much as "on go".
    """
    counts: dict[tuple[str, ...], int] = {}
    for length in range(1, LONGEST_PHRASE + 1):
        equal = 0  # number of consecutive words up to here that equal the word one phrase earlier
        for index in range(length, len(words)):
            equal = equal + 1 if words[index] == words[index - length] else 0
            if equal >= length:
                phrase = tuple(words[index - length + 1 : index + 1])
                phrase = min(phrase[shift:] + phrase[:shift] for shift in range(length))
                counts[phrase] = max(counts.get(phrase, 0), equal // length + 1)
    return counts
