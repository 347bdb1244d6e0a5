"""
The paper's Table 1 over several trainings: error rates with intervals over seeds and utterances, the differences that
its claims are about, and embeddings per second; as JSON, Markdown and a plot.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seam.data.files import write_text
from seam.evaluation.plots import plot_curves, plot_error_rates
from seam.evaluation.scoring import utterance_errors
from seam.evaluation.table import rate_table

RESAMPLES = 2000
INTERVALS = (
    "Mean over the seeds; in parentheses 95 % intervals, by resampling seeds and utterances {resamples} times. With "
    "few seeds they say little of other trainings."
)


@dataclass(frozen=True)
class Decoded:
    """
    What one system wrote for one test set.

    Args:
        errors `(seeds, utterances)`: word errors.
        words `(utterances,)`: of the references.
        embeddings `(seeds, utterances)`: given to the language model for the audio.
        seconds `(utterances,)`: of audio.
    """

    errors: np.ndarray
    words: np.ndarray
    embeddings: np.ndarray
    seconds: np.ndarray

    @classmethod
    def of(cls, seeds: Sequence[Sequence[Mapping[str, Any]]]) -> "Decoded":
        """Rows of `seam.evaluation.hypotheses` for every seed, in the same order."""
        counts = [utterance_errors([r["reference"] for r in rows], [r["text"] for r in rows]) for rows in seeds]
        return cls(
            errors=np.array([[count.errors for count in one] for one in counts]),
            words=np.array([count.length for count in counts[0]]),
            embeddings=np.array([[row["embeddings"] for row in rows] for rows in seeds]),
            seconds=np.array([row["seconds"] for row in seeds[0]]),
        )

    @property
    def rate(self) -> float:
        """Word error rate in percent, mean over the seeds."""
        return float(100 * self.errors.mean(0).sum() / self.words.sum())

    @property
    def seed_rates(self) -> list[float]:
        return (100 * self.errors.sum(1) / self.words.sum()).tolist()


def interval(system: Decoded, other: Decoded | None = None, seed: int = 0) -> tuple[float, float]:
    """
    The 95 % bootstrap interval of a system's error rate or, paired, of its difference to another's: corpora of the same
    size drawn from the utterances, and as many trainings drawn from the seeds, both with replacement. The trainings of
    two systems with equally many seeds are paired, for they share the seed and where they can the Stage 1.

    Returns:
        Lower and upper bound, in percent or points.
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


def compare(rows: Mapping[str, Mapping[str, Decoded]], claims: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """
    Args:
        rows: by system and test set.
        claims: pairs of systems, of which the first is said to be the better one.

    Returns:
        - `systems`: by system and test set: `rate`, `interval`, `seeds` (the rate of each), `embeddings_per_second`;
        - `words`: of each test set;
        - `claims`: `better`, `than` and, by test set, `difference` in points (negative: it is better) and `interval`.
    """
    tests = list(next(iter(rows.values())))
    return {
        "systems": {
            name: {
                test: {
                    "rate": one.rate,
                    "interval": list(interval(one)),
                    "seeds": one.seed_rates,
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
                        "difference": rows[better][test].rate - rows[than][test].rate,
                        "interval": list(interval(rows[better][test], rows[than][test])),
                    }
                    for test in tests
                },
            }
            for better, than in claims
        ],
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of `compare`, for people."""
    systems, words = results["systems"], results["words"]
    wer, intervals = rates(results)
    lines = [*rate_table("WER %", wer, intervals, words), "", INTERVALS.format(resamples=RESAMPLES), ""]
    if results["claims"]:
        lines += ["| is it better? | " + " | ".join(words) + " |", "|---|" + "---|" * len(words)]
    for claim in results["claims"]:
        cells = []
        for test in words:
            found, (low, high) = claim["tests"][test]["difference"], claim["tests"][test]["interval"]
            verdict = "yes" if high < 0 else "no: worse" if low > 0 else "not shown"
            cells.append(f"{verdict}: {found:+.1f} ({low:+.1f} to {high:+.1f})")
        lines.append(f"| {claim['better']} than {claim['than']} | " + " | ".join(cells) + " |")
    lines += ["", "| embeddings per second | " + " | ".join(words) + " |", "|---|" + "---|" * len(words)]
    for name, sets in systems.items():
        if any(sets[test]["embeddings_per_second"] for test in words):
            figures = (f"{sets[test]['embeddings_per_second']:.2f}" for test in words)
            lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join([*lines, ""])


def rates(results: Mapping[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]:
    """Rates and intervals of `compare` by system and test set."""
    pick = [
        {name: {test: one[key] for test, one in sets.items()} for name, sets in results["systems"].items()}
        for key in ("rate", "interval")
    ]
    return pick[0], pick[1]


def write_comparison(results: Mapping[str, Any], folder: Path, name: str = "comparison") -> None:
    """
    Write `NAME.json`, `NAME.md`, `NAME.png` and, where `results` has `curves` (rates on held-out utterances by the step
    of a training), `NAME-curves.png`.
    """
    for ending, text in (("json", json.dumps(results, indent=1) + "\n"), ("md", markdown(results))):
        write_text(folder / f"{name}.{ending}", text)
    plot_error_rates(*rates(results), list(results["words"]), folder / f"{name}.png")
    if results.get("curves"):
        plot_curves(results["curves"], folder / f"{name}-curves.png")
