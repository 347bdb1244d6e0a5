"""Word error rate: one normaliser, one alignment."""

from collections.abc import Sequence
from dataclasses import dataclass

import kaldialign
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


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCount:
    """Insertions, deletions and substitutions over a corpus, after normalisation of both sides."""
    errors = words = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        reference, hypothesis = normalize(reference).split(), normalize(hypothesis).split()
        errors += kaldialign.edit_distance(reference, hypothesis)["total"]
        words += len(reference)
    return ErrorCount(errors, words)
