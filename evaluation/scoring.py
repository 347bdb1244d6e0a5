"""Error rates: the two normalisers, one alignment, a confidence interval by resampling utterances; and loops."""

from collections.abc import Sequence
from dataclasses import dataclass

import kaldialign
import numpy as np
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

NORMALIZERS = {"english": EnglishTextNormalizer(), "basic": BasicTextNormalizer()}
"""
Both of Whisper (Radford et al. 2022, Appendix C), each under the name by which results quote it. "basic": lower case,
no punctuation. "english", the paper's (Table 1): also numbers as digits, contractions in full, American spelling (its
table comes with the package), no fillers. It makes a single word of a string of digits ("three one four" is "314"):
where those are what is said, "basic" counts each of them.
"""


@dataclass(frozen=True)
class ErrorCount:
    """
    Errors of one utterance or of a corpus.

    Where several alignments have as few errors, the three kinds are those of the one that kaldialign finds; their sum
    is the same in all.

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
        return self.insertions + self.deletions + self.substitutions

    @property
    def rate(self) -> float:
        """Errors over length in percent. Where no reference holds anything, each insertion counts as 100 %."""
        return 100 * self.errors / max(self.length, 1)


def words(text: str, normalizer: str = "basic") -> list[str]:
    """
    What is scored of a text.

    Args:
        normalizer: one of `NORMALIZERS`.

    Raises:
        ValueError: for another name.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer is {normalizer!r}; accepted: {', '.join(NORMALIZERS)}.")
    return NORMALIZERS[normalizer](text).split()


def utterance_errors(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "basic"
) -> list[ErrorCount]:
    """
    Word errors of every utterance, after normalisation of both sides. An utterance whose reference is empty then, such
    as a filler alone, has no words, but what was written for it counts as insertions.
    """
    return [
        _count(words(reference, normalizer), words(hypothesis, normalizer))
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]


def utterance_character_errors(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "basic"
) -> list[ErrorCount]:
    """As `utterance_errors`, of characters; the single space between two words is one."""
    return [
        _count(list(" ".join(words(reference, normalizer))), list(" ".join(words(hypothesis, normalizer))))
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]


def _count(reference: list, hypothesis: list) -> ErrorCount:
    distance = kaldialign.edit_distance(reference, hypothesis)
    return ErrorCount(distance["ins"], distance["del"], distance["sub"], len(reference))


def alignment(reference: str, hypothesis: str, normalizer: str = "basic") -> list[tuple[str, str]]:
    """Pairs of a word of the reference and the word written for it, empty where there is none."""
    return kaldialign.align(words(reference, normalizer), words(hypothesis, normalizer), "")


def total(counts: Sequence[ErrorCount]) -> ErrorCount:
    """The corpus as a whole: its errors over its words, not the mean of the utterances' rates."""
    return ErrorCount(
        sum(count.insertions for count in counts),
        sum(count.deletions for count in counts),
        sum(count.substitutions for count in counts),
        sum(count.length for count in counts),
    )


def word_errors(references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "basic") -> ErrorCount:
    """Word errors of a corpus, after normalisation of both sides."""
    return total(utterance_errors(references, hypotheses, normalizer))


def character_errors(references: Sequence[str], hypotheses: Sequence[str], normalizer: str = "basic") -> ErrorCount:
    """Character errors of a corpus, after normalisation of both sides."""
    return total(utterance_character_errors(references, hypotheses, normalizer))


def token_errors(references: Sequence[Sequence[int]], hypotheses: Sequence[Sequence[int]]) -> ErrorCount:
    """Errors of a corpus of token ids, as they are."""
    return total([_count(list(one), list(other)) for one, other in zip(references, hypotheses, strict=True)])


def interval(counts: Sequence[ErrorCount], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """
    The 95 % bootstrap confidence interval of the corpus' error rate (Bisani and Ney 2004): the 2.5th and 97.5th
    percentiles of the rates of corpora of the same size, drawn from the utterances with replacement.

    Args:
        counts: of every utterance, independent of one another.
        resamples: number of corpora.
        seed: the same one gives the same interval.

    Returns:
        Lower and upper bound in percent.

    Raises:
        ValueError: without utterances.
    """
    if not counts:
        raise ValueError("no confidence interval of no utterances")
    errors, lengths = np.array([(count.errors, count.length) for count in counts]).T
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(resamples):
        drawn = rng.integers(len(counts), size=len(counts))
        rates.append(100 * errors[drawn].sum() / max(lengths[drawn].sum(), 1))
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


LONGEST_PHRASE = 8
REPETITIONS = 4


def is_loop(reference: Sequence[str], hypothesis: Sequence[str]) -> bool:
    """
    Whether some phrase of at most `LONGEST_PHRASE` words stands at least `REPETITIONS` times in a row in the
    hypothesis, and more often than in the reference: "no no no no" is no loop where that was said.
    """
    said = repetitions(reference)
    return any(
        count >= REPETITIONS and count > said.get(phrase, 0) for phrase, count in repetitions(hypothesis).items()
    )


def repetitions(words: Sequence[str]) -> dict[tuple[str, ...], int]:
    """
    How often in a row each phrase that is repeated at all stands in the text. A phrase goes by the first of its
    rotations in alphabetical order, for "go on go on go" repeats "go on" as much as "on go".
    """
    counts: dict[tuple[str, ...], int] = {}
    for length in range(1, LONGEST_PHRASE + 1):
        equal = 0  # words up to here, without a gap, that equal the word one phrase earlier
        for index in range(length, len(words)):
            equal = equal + 1 if words[index] == words[index - length] else 0
            if equal >= length:
                phrase = tuple(words[index - length + 1 : index + 1])
                phrase = min(phrase[shift:] + phrase[:shift] for shift in range(length))
                counts[phrase] = max(counts.get(phrase, 0), equal // length + 1)
    return counts
