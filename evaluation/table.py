"""Write the demo's version of the paper's Table 1, every system on every test set, as JSON, Markdown and a plot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seam.data.files import write_text
from seam.evaluation.hypotheses import SYSTEMS
from seam.evaluation.plots import ErrorRates, Intervals, plot_error_rates

INTERVALS = (
    "In parentheses: 95 % confidence intervals, by resampling the utterances 1000 times. They say nothing of other "
    "speakers or of another training run."
)


def error_rate_table(heading: str, wer: ErrorRates, intervals: Intervals, words: Mapping[str, int]) -> list[str]:
    """
    Return the lines of a Markdown table whose cells hold an error rate and its interval: `5.0 (3.7–6.4)`.

    Args:
        heading: of the column of systems.
        wer, intervals: word error rates in percent, and their lower and upper bounds.
        words: how many each test set has, in the order of the columns.
    """
    lines = [
        f"| {heading} | " + " | ".join(f"{test} ({count} words)" for test, count in words.items()) + " |",
        "|---|" + "---|" * len(words),
    ]
    for system, by_test in wer.items():
        cells = []
        for test in words:
            low, high = intervals[system][test]
            cells.append(f"{by_test[test]:.1f} ({low:.1f}–{high:.1f})")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return lines


def notes(wer: dict[str, dict[str, float]]) -> list[str]:
    """Return a sentence for each of the paper's comparisons: whether the LLM and FTG help here, and where."""

    def verdict(what: str, before: str, after: str) -> str:
        before, after = SYSTEMS[before].row, SYSTEMS[after].row
        sides: dict[str, list[str]] = {"lower": [], "higher": [], "equal": []}
        for test in wer[before]:
            change = wer[after][test] - wer[before][test]
            side = "equal" if abs(change) < 0.05 else ("lower" if change < 0 else "higher")
            sides[side].append(f"{test} ({change:+.1f})" if side != "equal" else test)
        found = [f"{side} on {', '.join(names)}" for side, names in sides.items() if names]
        return f"{what}: word error rate " + "; ".join(found) + "."

    return [
        verdict("The LLM, given Stage 1's first token, against Stage 1", "stage1", "full"),
        verdict("First Token Guidance", "full-noftg", "full"),
    ]


def markdown(table: dict[str, Any]) -> str:
    """Return the table of `seam.experiments.demo.compare_systems` and its notes as Markdown."""
    words = {test: table["words"][test] for test in sorted(table["words"])}
    lines = error_rate_table("WER %", table["wer"], table["interval"], words)
    return "\n".join([*lines, "", INTERVALS, "", *(f"- {note}" for note in table["notes"]), ""])


def write_table(table: dict[str, Any], folder: Path) -> None:
    """Write `table.json`, `table.md` and `table.png` into `folder`."""
    for name, text in (("table.json", json.dumps(table, indent=1)), ("table.md", markdown(table))):
        write_text(folder / name, text)
    plot_error_rates(table["wer"], table["interval"], sorted(table["words"]), folder / "table.png")
