"""
Compute word and character error rates as `seam evaluate` does, for the `evaluate` library, without network.

    metric = evaluate.load(f"{seam.__path__[0]}/evaluation/metrics/seam_wer")
    metric.compute(predictions=["hello word"], references=["Hello, world!"])  # {"wer": 50.0, ...}
"""

import warnings

import datasets
import evaluate

from seam.evaluation.scoring import character_errors, fits_english, word_errors

DESCRIPTION = """\
Word error rate over a corpus: insertions, deletions and substitutions over the words of the references, both sides
normalised by one of Whisper's normalisers; and the character error rate."""
INPUTS = """\
Args:
    predictions: transcripts, `list[str]`.
    references: reference transcripts, `list[str]`.
    normalizer: "english" (numbers, contractions, spelling, fillers), the default, or "basic" (case and punctuation).
Returns:
    wer, cer: in percent.
    insertions, deletions, substitutions: numbers of words.
    words: of the references after normalisation."""
CITATION = """\
@inproceedings{radford2023whisper,
  title = {Robust Speech Recognition via Large-Scale Weak Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Xu, Tao and Brockman, Greg and McLeavey, Christine and
            Sutskever, Ilya},
  booktitle = {ICML},
  year = {2023}
}"""


class SeamWer(evaluate.Metric):
    """The metric of this module."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], normalizer: str = "english") -> dict[str, float]:
        if normalizer == "english" and not fits_english(references):
            warnings.warn(
                "the normalizer 'english' drops vowels and other marks of these references' script, so that different "
                "words count as equal: use normalizer='basic'.",
                stacklevel=2,
            )
        words = word_errors(references, predictions, normalizer)
        return {
            "wer": words.error_rate,
            "cer": character_errors(references, predictions, normalizer).error_rate,
            "insertions": words.insertions,
            "deletions": words.deletions,
            "substitutions": words.substitutions,
            "words": words.length,
        }
