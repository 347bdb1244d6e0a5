"""Error rates as rows of Markdown and as bars, for every table of systems and test sets; histograms."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from seam.data.files import replacing

INTERVALS = (
    "In parentheses: 95 % confidence intervals, by resampling the utterances 1000 times. They say nothing of other "
    "speakers or of another training run."
)

# {system: {test set: value}}
Rates = Mapping[str, Mapping[str, float]]
Intervals = Mapping[str, Mapping[str, Sequence[float]]]


def rate_table(heading: str, wer: Rates, intervals: Intervals, words: Mapping[str, int]) -> list[str]:
    """
    Lines of a Markdown table, a rate as `5.0 (3.7–6.4)` with its interval.

    Args:
        heading: of the column of systems.
        wer, intervals: percent, and its lower and upper bound.
        words: of each test set, in the order of the columns.
    """
    lines = [
        f"| {heading} | " + " | ".join(f"{test} ({count} words)" for test, count in words.items()) + " |",
        "|---|" + "---|" * len(words),
    ]
    for system, rates in wer.items():
        cells = []
        for test in words:
            low, high = intervals[system][test]
            cells.append(f"{rates[test]:.1f} ({low:.1f}–{high:.1f})")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return lines


def plot_error_rates(wer: Rates, intervals: Intervals, tests: Sequence[str], path: Path) -> None:
    """Bars of every system for each test set, with their intervals."""
    figure = Figure(figsize=(2.2 * len(tests) + 2, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(wer)
    for index, (system, rates) in enumerate(wer.items()):
        heights = np.array([rates[test] for test in tests])
        low, high = np.array([intervals[system][test] for test in tests]).T
        reach = np.maximum([heights - low, high - heights], 0)  # a bootstrap interval need not contain the rate
        bars = axes.bar(
            np.arange(len(tests)) + index * width, heights, width, yerr=reach, error_kw={"lw": 0.8}, label=system
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(np.arange(len(tests)) + 0.4 - width / 2, [textwrap.fill(test, 20) for test in tests])
    axes.set_ylabel("word error rate, %")
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_curves(curves: Mapping[str, Sequence[Sequence[Sequence[float]]]], path: Path) -> None:
    """Error rates in the course of trainings: by system, each seed's `(step, percent)`. Bold: the mean of the seeds."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, (system, seeds) in enumerate(curves.items()):
        points = np.array(seeds)
        axes.plot(points[..., 0].T, points[..., 1].T, color=f"C{index}", linewidth=0.5, alpha=0.5)
        axes.plot(*points.mean(0).T, color=f"C{index}", label=system)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("word error rate of held-out utterances, %")
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_histograms(
    panels: Mapping[str, Mapping[str, np.ndarray]], means: Mapping[str, Mapping[str, float]], label: str, path: Path
) -> None:
    """
    One panel a test set, with one histogram for each of its series and a dashed line at that series' mean.

    Args:
        panels: values by test set and series.
        means: what the lines mark, by test set and series.
        label: of the values.
    """
    figure = Figure(figsize=(7, 1 + 2.5 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    largest = max(values.max() for series in panels.values() for values in series.values())
    bins = np.linspace(0, max(largest, 1), 41)
    for axes, (test, series) in zip(rows[:, 0], panels.items(), strict=True):
        for index, (name, values) in enumerate(series.items()):
            mean = means[test][name]
            axes.hist(values, bins, alpha=0.5, color=f"C{index}", label=f"{name}: {mean:.2f}")
            axes.axvline(mean, color=f"C{index}", linestyle="--", linewidth=1)
        axes.set_title(test, fontsize=9)
        axes.set_ylabel("utterances")
        axes.legend(fontsize=8)
    rows[-1, 0].set_xlabel(label)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
