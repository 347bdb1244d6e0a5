"""
Compare systems over several trainings, as in the paper's Table 1.

The comparison has error rates with intervals over seeds and utterances, the differences that the claims are about, and
embeddings per second; it is written as JSON, Markdown and a plot.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seam.data.files import write_text
from seam.evaluation.plots import ErrorRates, Intervals, plot_curves, plot_error_rates
from seam.evaluation.scoring import utterance_errors
from seam.evaluation.table import error_rate_table

RESAMPLES = 2000
INTERVALS = (
    "Mean over the seeds; in parentheses 95 % intervals, by resampling seeds and utterances {resamples} times. With "
    "few seeds they say little of other trainings."
)


@dataclass(frozen=True)
class SystemOutput:
    """
    The output of one system for one test set, as counts.

    Args:
        errors (`np.ndarray` of shape `(seeds, utterances)`): word errors.
        words (`np.ndarray` of shape `(utterances,)`): words of the references.
        embeddings (`np.ndarray` of shape `(seeds, utterances)`): how many the language model was given for the audio.
        seconds (`np.ndarray` of shape `(utterances,)`): length of the audio.
    """

    errors: np.ndarray
    words: np.ndarray
    embeddings: np.ndarray
    seconds: np.ndarray

    @classmethod
    def from_rows(cls, seeds: Sequence[Sequence[Mapping[str, Any]]]) -> "SystemOutput":
        """Count what `seam.evaluation.hypotheses` read for every seed, rows in the same order."""
        counts = [utterance_errors([r["reference"] for r in rows], [r["text"] for r in rows]) for rows in seeds]
        return cls(
            errors=np.array([[count.errors for count in one] for one in counts]),
            words=np.array([count.length for count in counts[0]]),
            embeddings=np.array([[row["embeddings"] for row in rows] for rows in seeds]),
            seconds=np.array([row["seconds"] for row in seeds[0]]),
        )

    @property
    def error_rate(self) -> float:
        """Return the word error rate in percent, averaged over the seeds."""
        return float(100 * self.errors.mean(0).sum() / self.words.sum())

    @property
    def seed_error_rates(self) -> list[float]:
        """Return the word error rate of each seed in percent."""
        return (100 * self.errors.sum(1) / self.words.sum()).tolist()


def interval(system: SystemOutput, other: SystemOutput | None = None, seed: int = 0) -> tuple[float, float]:
    """
    Return the 95 % bootstrap interval of a system's error rate, or of its difference from another system's.

    Each resample draws as many utterances and as many seeds as there are, both with replacement. Two systems are
    compared on the same utterances and, if they have equally many seeds, on the same seeds: these share their random
    numbers and, where possible, Stage 1.

    Returns:
        Lower and upper bound, in percent or percentage points.
    """
    rng = np.random.default_rng(seed)
    paired = other is None or len(other.errors) == len(system.errors)
    values = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(system.words), size=len(system.words))
        seeds = rng.integers(len(system.errors), size=len(system.errors))
        errors = system.errors[seeds][:, drawn].mean(0).sum()
        if other is not None:
            seeds = seeds if paired else rng.integers(len(other.errors), size=len(other.errors))
            errors -= other.errors[seeds][:, drawn].mean(0).sum()
        values.append(100 * errors / max(system.words[drawn].sum(), 1))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def compare(rows: Mapping[str, Mapping[str, SystemOutput]], claims: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """
    Compare systems on test sets.

    Args:
        rows: outputs by system and test set.
        claims: pairs of systems, of which the first is claimed to be the better one.

    Returns:
        - `systems`: by system and test set: `rate` (the error rate), `interval`, `seeds` (the error rate of each),
          `embeddings_per_second`;
        - `words`: how many each test set has;
        - `claims`: `better`, `than` and, by test set, `difference` in percentage points (negative if the claim holds)
          and `interval`.
    """
    tests = list(next(iter(rows.values())))
    return {
        "systems": {
            name: {
                test: {
                    "rate": one.error_rate,
                    "interval": list(interval(one)),
                    "seeds": one.seed_error_rates,
                    "embeddings_per_second": float(one.embeddings.mean(0).sum() / one.seconds.sum()),
                }
                for test, one in sets.items()
            }
            for name, sets in rows.items()
        },
        "words": {test: int(next(iter(rows.values()))[test].words.sum()) for test in tests},
        "claims": [
            {
                "better": better,
                "than": than,
                "tests": {
                    test: {
                        "difference": rows[better][test].error_rate - rows[than][test].error_rate,
                        "interval": list(interval(rows[better][test], rows[than][test])),
                    }
                    for test in tests
                },
            }
            for better, than in claims
        ],
    }


def markdown(results: Mapping[str, Any]) -> str:
    """Return the results of `compare` as Markdown tables."""
    systems, words = results["systems"], results["words"]
    wer, intervals = error_rates(results)
    lines = [*error_rate_table("WER %", wer, intervals, words), "", INTERVALS.format(resamples=RESAMPLES), ""]
    if results["claims"]:
        lines += ["| is it better? | " + " | ".join(words) + " |", "|---|" + "---|" * len(words)]
    for claim in results["claims"]:
        cells = []
        for test in words:
            difference, (low, high) = claim["tests"][test]["difference"], claim["tests"][test]["interval"]
            verdict = "yes" if high < 0 else "no: worse" if low > 0 else "not shown"
            cells.append(f"{verdict}: {difference:+.1f} ({low:+.1f} to {high:+.1f})")
        lines.append(f"| {claim['better']} than {claim['than']} | " + " | ".join(cells) + " |")
    lines += ["", "| embeddings per second | " + " | ".join(words) + " |", "|---|" + "---|" * len(words)]
    for name, sets in systems.items():
        if any(sets[test]["embeddings_per_second"] for test in words):
            figures = (f"{sets[test]['embeddings_per_second']:.2f}" for test in words)
            lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join([*lines, ""])


def error_rates(results: Mapping[str, Any]) -> tuple[ErrorRates, Intervals]:
    """Return the error rates and the intervals of `compare` by system and test set."""
    pick = [
        {name: {test: one[key] for test, one in sets.items()} for name, sets in results["systems"].items()}
        for key in ("rate", "interval")
    ]
    return pick[0], pick[1]


def write_comparison(results: Mapping[str, Any], folder: Path, name: str = "comparison") -> None:
    """
    Write `NAME.json`, `NAME.md`, `NAME.png` and, if there are learning curves, `NAME-curves.png`.

    Args:
        results: what `compare` returns; `curves`, if any, are those of `seam.evaluation.plots.plot_curves`.
        folder: where the files are written.
        name: of the files.
    """
    for ending, text in (("json", json.dumps(results, indent=1) + "\n"), ("md", markdown(results))):
        write_text(folder / f"{name}.{ending}", text)
    plot_error_rates(*error_rates(results), list(results["words"]), folder / f"{name}.png")
    if results.get("curves"):
        plot_curves(results["curves"], folder / f"{name}-curves.png")
