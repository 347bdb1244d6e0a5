"""The picture of the findings of `bench.training`."""

from pathlib import Path

from matplotlib.figure import Figure

from seam.bench.common import save_plot
from seam.bench.steps.tables import GREATEST, LEAST


def write_plot(report: dict, path: Path) -> None:
    """Write a PNG: the ratios with their ranges, and the targets as bars."""
    rows = [row for row in report["rows"] if "utilisation" not in row["metric"]]
    figure = Figure(figsize=(10, 1.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        reach = [[row["ratio"] - row["least"]], [row["greatest"] - row["ratio"]]]
        axes.errorbar(row["ratio"], place, xerr=reach, color="C0", marker="o", capsize=3)
        for targets, colour in ((LEAST, "C2"), (GREATEST, "C3")):
            if row["metric"] in targets:
                axes.plot(targets[row["metric"]], place, color=colour, marker="|", markersize=16, markeredgewidth=2)
    axes.axvline(1, color="grey", lw=0.8)
    axes.set(xlim=(0, None), xlabel="ratio (green bar: at least; red bar: at most)")
    axes.set_yticks(range(len(rows)), [row["metric"] for row in rows])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    save_plot(figure, report, f"batch {report['batch']}", path)
