"""Tables and plot of the findings of `bench.inference`."""

from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from seam.bench.common import device_name, save_plot

# Targets: the greatest ratio, by batch size; `None` stands for all sizes.
TARGETS = {
    "stage1_vs_whisper": {1: 1.05, 4: 1.0, 8: 1.0},
    "llm_vs_plain": {1: 0.15, 8: 0.3},
    "seam_vs_whisper": {1: 1.6},
    "seam_draft_vs_whisper": {1: 0.7},
    "lookup_share": {None: 0.1},
}


def target(metric: str, batch: int) -> float | None:
    """Return the target of a metric at a batch size, or `None` where there is none."""
    targets = TARGETS.get(metric, {})
    return targets.get(batch, targets.get(None))


def print_findings(report: dict, console: Console) -> None:
    """Print the findings of `bench.inference` as tables."""
    console.print(
        f"Size {report['size']}, {report['dtype']}, {report['tokens']} tokens, on {device_name(report)}: reads "
        f"{report['bandwidth_gb_per_s']:.1f} GB/s, computes {report['tflop_per_s']:.2f} TFLOP/s. Random weights; "
        "predictions near an embedding, as trained ones are, but for 'random'."
    )
    if report["rows"]:
        console.print(_ratios(report["rows"]))
    if report["systems"]:
        console.print(_systems(report["systems"]))
    if report["profile"]:
        console.print(_profile(report["profile"]))
    for check in report["checks"]:
        if check["differing"]:
            console.print(
                f"batch {check['batch']}: of {check['rows']} rows {check['differing']} of {check['fast']} differ from "
                f"{check['plain']}, {check['ties']} by a numerical tie (bf16 steps between the logits: "
                f"{', '.join(f'{gap:.1f}' for gap in check['gaps'])})"
            )
    if report["checks"] and not any(check["differing"] for check in report["checks"]):
        console.print(f"Every fast loop wrote what the plain one did ({len(report['checks'])} comparisons).")


def _ratios(rows: list[dict]) -> Table:
    table = Table("batch", "metric", "ratio", "at most", "seconds", "against", "")
    for row in rows:
        greatest = target(row["metric"], row["batch"])
        details = {"agreement", "loop", "times", "before_gb", "after_gb"} & row.keys()
        table.add_row(
            str(row["batch"]),
            row["metric"],
            f"{row['ratio']:.3f}",
            "" if greatest is None else f"{greatest:g} {'✓' if row['ratio'] <= greatest else '✗'}",
            _number(row.get("seconds")),
            _number(row.get("against_seconds", row.get("roofline_seconds"))),
            ", ".join(
                f"{key} {row[key]:.4g}" if isinstance(row[key], float) else f"{key} {row[key]}"
                for key in sorted(details)
            ),
        )
    return table


def _systems(systems: list[dict]) -> Table:
    columns = {
        "seconds": "seconds",
        "seconds_per_token": "s per token",
        "rtfx": "RTFx",
        "peak_gb": "peak, GB",
        "forwards_of_the_batch": "forwards",
        "accepted": "accepted",
        "rejected": "rejected",
    }
    table = Table("batch", "part", "system", *columns.values())
    for system in systems:
        table.add_row(
            str(system["batch"]), system["part"], system["system"], *(_number(system.get(key)) for key in columns)
        )
    return table


def _profile(profile: list[dict]) -> Table:
    table = Table("batch", "loop", "tokens", "component", "seconds", "share")
    for loop in profile:
        total = sum(loop["components"].values())
        labels = [str(loop["batch"]), loop["loop"], str(loop["tokens"])]
        for name, seconds in loop["components"].items():
            if seconds:
                table.add_row(*labels, name, _number(seconds), f"{seconds / total:.1%}")
                labels = ["", "", ""]
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def write_plot(report: dict, path: Path) -> None:
    """
    Write a PNG of two plots.

    Left: seconds of the LLM with drafts relative to its plain loop, by the agreement of the drafts. Right: the ratios
    that have a target, and the targets.
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
