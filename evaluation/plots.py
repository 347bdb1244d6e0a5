"""Plots of the reports: error rates by system and test set, learning curves, histograms."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from seam.data.files import replacing

# {system: {test set: value}}
ErrorRates = Mapping[str, Mapping[str, float]]
Intervals = Mapping[str, Mapping[str, Sequence[float]]]


def plot_error_rates(wer: ErrorRates, intervals: Intervals, tests: Sequence[str], path: Path) -> None:
    """Plot a panel for each test set with a row for each system: its error rate as a point, and its interval."""
    figure = Figure(figsize=(3 + 2.5 * len(tests), 0.8 + 0.28 * len(wer)), layout="constrained")
    panels = figure.subplots(1, len(tests), sharey=True, squeeze=False)[0]
    rows = np.arange(len(wer))
    for axes, test in zip(panels, tests, strict=True):
        points = np.array([by_test[test] for by_test in wer.values()])
        low, high = np.array([intervals[system][test] for system in wer]).T
        reach = np.maximum([points - low, high - points], 0)  # a bootstrap interval need not contain the error rate
        axes.errorbar(points, rows, xerr=reach, fmt="o", markersize=4, linewidth=1)
        for row, point in enumerate(points):
            axes.annotate(f"{point:.1f}", (point, row), (0, 4), textcoords="offset points", fontsize=7, ha="center")
        axes.set_title(textwrap.fill(test, 30), fontsize=9)
        axes.set_xlabel("word error rate, %", fontsize=8)
        axes.set_xlim(left=0)
        axes.grid(axis="x", linewidth=0.4)
    panels[0].set_yticks(rows, wer, fontsize=8)
    panels[0].set_ylim(len(wer) - 0.5, -0.8)
    _save(figure, path)


def plot_curves(curves: Mapping[str, Sequence[Sequence[Sequence[float]]]], path: Path) -> None:
    """Plot error rates over the steps of trainings, given each seed's `(step, percent)` by system; bold: their mean."""
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
    Plot a panel for each test set with a histogram of each of its series and a dashed line at the series' mean.

    Args:
        panels: values by test set and series.
        means: the positions of the lines, by test set and series.
        label: of the values.
        path: of the PNG.
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
