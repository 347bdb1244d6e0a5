"""The picture of a training."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seam.data.files import replacing

# Of every panel its title and unit, and the numbers of the log in it, with their names and colours.
PANELS = [
    ("loss", "", {"loss": ("training", "C0"), "eval_loss": ("validation", "C1")}),
    (
        "word error rate on the validation set",
        "%",
        {
            "eval_stage1_wer": ("Stage 1", "C2"),
            "eval_wer": ("language model", "C3"),
            "eval_draft_wer": ("draft", "C4"),
        },
    ),
    ("agreement of the draft with Stage 1", "% of the tokens", {"eval_draft_agreement": ("", "C4")}),
    ("learning rate", "", {"learning_rate": ("", "C0")}),
    ("throughput: audio", "hours per hour", {"audio_hours_per_hour": ("", "C0")}),
    ("throughput: transcripts", "tokens per second", {"tokens_per_second": ("", "C0")}),
    ("utilisation: not waiting for data", "% of the time", {"utilisation": ("", "C0")}),
]
COLUMNS, WIDTH, HEIGHT = 3, 4.6, 3.1  # of a panel, in inches
SPREAD = 10  # largest by smallest, from which on a loss is drawn on a logarithmic scale
FEW = 40  # points that are marked one by one


def write_curves(log: Iterable[dict[str, float]], path: Path, title: str, best_step: int | None = None) -> None:
    """
    Write a PNG: losses, word error rates, learning rate and speed over the steps, a panel for each that there is.

    Args:
        log: `log_history` of a `TrainerState`. Of two numbers for the same step the first is drawn; a later one is that
            of the weights which were kept at the end.
        path: of the PNG.
        title: for instance the output folder.
        best_step: whose weights were kept, where they are not the last.
    """
    numbers: dict[str, dict[int, float]] = {}
    for row in log:
        for key, value in row.items():
            numbers.setdefault(key, {}).setdefault(row["step"], value)
    panels = [
        (name, unit, drawn)
        for name, unit, curves in PANELS
        if (drawn := {key: curve for key, curve in curves.items() if key in numbers})
    ]
    last = max(step for steps in numbers.values() for step in steps)
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.4), layout="constrained")
    for place, (name, unit, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        for key, (label, colour) in curves.items():
            steps, values = zip(*sorted(numbers[key].items()), strict=True)
            axes.plot(steps, values, color=colour, label=label, marker="." if len(steps) <= FEW else None, lw=1.2)
        if best_step is not None:
            axes.axvline(best_step, color="grey", lw=0.9, ls="--")
        axes.set_xlim(0, 1.02 * last)
        _set_up(axes, name, unit, [value for key in curves for value in numbers[key].values()])
    best = "" if best_step is None else f"\nbest, and kept: step {best_step} (dashed)"
    figure.suptitle(title + best, fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _set_up(axes: Axes, name: str, unit: str, values: list[float]) -> None:
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if name != "loss":
        # What is untrained may have several times as many errors as there are words: nobody looks at those.
        top = 100 if unit.startswith("%") and min(values) < 100 < max(values) else max(*values, 1e-12)
        axes.set_ylim(0, 1.05 * top)
        axes.ticklabel_format(axis="y", scilimits=(-3, 6))
    elif min(values) > 0 and max(values) > SPREAD * min(values):
        axes.set_yscale("log")
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize=8)
