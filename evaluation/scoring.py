"""Word error rate: one normaliser, one alignment, and a confidence interval by resampling utterances."""

from collections.abc import Sequence
from dataclasses import dataclass

import kaldialign
import numpy as np
from whisper_normalizer.basic import BasicTextNormalizer

normalize = BasicTextNormalizer()
"""Lower case, no punctuation. Whisper's English normaliser would turn a digit string into a single number word."""


@dataclass(frozen=True)
class ErrorCount:
    """Word errors and the number of reference words; `rate` is their ratio in percent."""

    errors: int
    words: int

    @property
    def rate(self) -> float:
        return 100 * self.errors / max(self.words, 1)


def utterance_errors(references: Sequence[str], hypotheses: Sequence[str]) -> list[ErrorCount]:
    """Insertions, deletions and substitutions of every utterance, after normalisation of both sides."""
    counts = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        reference, hypothesis = normalize(reference).split(), normalize(hypothesis).split()
        counts.append(ErrorCount(kaldialign.edit_distance(reference, hypothesis)["total"], len(reference)))
    return counts


def total(counts: Sequence[ErrorCount]) -> ErrorCount:
    """The corpus as a whole: its errors over its words, not the mean of the utterances' rates."""
    return ErrorCount(sum(count.errors for count in counts), sum(count.words for count in counts))


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCount:
    """Insertions, deletions and substitutions over a corpus, after normalisation of both sides."""
    return total(utterance_errors(references, hypotheses))


def interval(counts: Sequence[ErrorCount], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """
    The 95 % bootstrap confidence interval of the corpus' word error rate: the 2.5th and 97.5th percentiles of the rates
    of corpora of the same size, drawn from the utterances with replacement.

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
    errors, words = np.array([(count.errors, count.words) for count in counts]).T
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(resamples):
        drawn = rng.integers(len(counts), size=len(counts))
        rates.append(ErrorCount(int(errors[drawn].sum()), int(words[drawn].sum())).rate)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)
