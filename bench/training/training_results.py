"""Tables and plot of the findings of `bench.training`."""

from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from seam.bench.common import device_name, save_plot

# Targets: the least ratio of speeds, the greatest of memory.
LEAST = {
    "stage1_vs_peer": 0.95,
    "stage1_cached_vs_peer": 1.3,
    "stage2_vs_peft": 0.95,
}
GREATEST = {"stage1_memory_vs_peer_and_table": 1.0}


def target(metric: str) -> str:
    """Return the target of a metric in words, or an empty string."""
    if metric in LEAST:
        return f"at least {LEAST[metric]:g}"
    return f"at most {GREATEST[metric]:g}" if metric in GREATEST else ""


def is_met(metric: str, ratio: float) -> bool:
    """Return whether a ratio meets its target."""
    return LEAST.get(metric, 0) <= ratio <= GREATEST.get(metric, float("inf"))


def print_findings(report: dict, console: Console) -> None:
    """Print the findings of `bench.training` as tables."""
    console.print(
        f"Size {report['size']}, {report['dtype']}, batch {report['batch']}, {report['seconds_of_speech']:.0f} s and "
        f"{report['tokens']:.0f} tokens an utterance, on {device_name(report)}. Random weights."
    )
    ratios = Table("metric", "ratio", "range", "target")
    for row in report["rows"]:
        mark = ("✓" if is_met(row["metric"], row["ratio"]) else "✗") if target(row["metric"]) else ""
        ratios.add_row(
            row["metric"],
            f"{row['ratio']:.3f}",
            f"{row['least']:.3f} to {row['greatest']:.3f}",
            f"{target(row['metric'])} {mark}",
        )
    console.print(ratios)
    systems = Table("part", "system", "seconds", "TFLOP", "peak, GB", "utterances")
    for one in report["systems"]:
        numbers = (one.get(key) for key in ("seconds", "tflop", "peak_gb", "utterances"))
        systems.add_row(one["part"], one["system"], *("" if n is None else f"{n:.4g}" for n in numbers))
    console.print(systems)
    if report["skipped"]:
        why = (
            ""
            if report["hardware"]["gpu"]
            else " (utilisation is for a GPU: without one it is left out unless it is named)"
        )
        console.print(f"Not measured: {', '.join(report['skipped'])}{why}.")


def write_plot(report: dict, path: Path) -> None:
    """Write a PNG with the ratios, their ranges, and the targets as bars."""
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
