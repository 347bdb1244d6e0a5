"""The picture of the findings of `bench.inference`."""

from pathlib import Path

from matplotlib.figure import Figure

from seam.bench.loops.tables import TARGETS, target
from seam.bench.report import save_plot


def write_plot(report: dict, path: Path) -> None:
    """
    Write a PNG. Left: the LLM's pass that checks drafts, relative to its plain loop, by the agreement of the drafts.
    Right: the ratios that have a target, and the targets.
    """
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    curve, targets = figure.subplots(1, 2)
    batches = sorted({row["batch"] for row in report["rows"]})
    for place, batch in enumerate(batches):
        rows = [row for row in report["rows"] if row["batch"] == batch]
        points = [row for row in rows if row["metric"].startswith("llm_vs_plain_agreement_")]
        colour = f"C{place}"
        if points:
            x, y = ([point[key] for point in points] for key in ("agreement", "ratio"))
            curve.plot([100 * agreement for agreement in x], y, color=colour, marker="o", label=f"batch {batch}")
        found = {row["metric"]: row["ratio"] for row in rows}
        for line, metric in enumerate(TARGETS):
            height = line + 0.8 * ((place + 0.5) / len(batches) - 0.5)
            if metric in found:
                targets.plot(found[metric], height, color=colour, marker="o", label=f"batch {batch}")
            if target(metric, batch) is not None:
                targets.plot(target(metric, batch), height, color=colour, marker="|", markersize=14, markeredgewidth=2)
    curve.axhline(1, color="grey", lw=0.8)
    curve.set(xlabel="agreement of the draft, %", ylabel="checked / plain", ylim=(0, None))
    curve.set_title("LLM: seconds relative to the plain loop", fontsize=10)
    targets.set(xlabel="ratio (bars: greatest that is allowed)", xlim=(0, None))
    targets.set_yticks(range(len(TARGETS)), list(TARGETS))
    targets.invert_yaxis()
    for axes in (curve, targets):
        axes.grid(alpha=0.3)
        labels = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each batch once
        if labels:
            axes.legend(labels.values(), labels.keys(), fontsize=8)
    save_plot(figure, report, f"{report['tokens']} tokens", path)
