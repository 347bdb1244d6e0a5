"""Score transcripts: two normalisers, one alignment, a bootstrap confidence interval, and repetition loops."""

from collections.abc import Sequence
from dataclasses import dataclass

import kaldialign
import numpy as np
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

NORMALIZERS = {"english": EnglishTextNormalizer(), "basic": BasicTextNormalizer()}
"""
Whisper's two (Radford et al. 2022, Appendix C), by the names under which results quote them. "basic": lower case, no
punctuation. "english", the paper's (Table 1): also numbers as digits, contractions in full, American spelling (by a
table in its package), no fillers. It turns a string of spoken digits into one word ("three one four" becomes "314");
for such speech use "basic", which counts each digit.
"""
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
    return NORMALIZERS[normalizer](text).split()


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
