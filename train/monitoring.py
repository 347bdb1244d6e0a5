"""What a training shows of itself: its throughput, its bar and its curves."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from seam.data.files import replacing
from seam.train.distributed import all_gather

FRAMES_PER_STATE = 2  # the encoder's second convolution halves the mel frames


class Throughput(TrainerCallback):
    """
    Counts what a training takes in, and the time that it takes for it, from one line of its log to the next. Nothing is
    read from the device before the line is written.

    Args:
        frame_seconds: between two mel frames.
    """

    def __init__(self, frame_seconds: float):
        self.frame_seconds = frame_seconds
        self._begin()

    def _begin(self) -> None:
        self._begun = perf_counter()
        self._not_counted = self._waited = 0.0
        self._frames = self._tokens = 0  # tensors of the batches' device, later
        self._epoch_begun = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch_begun = perf_counter()  # a loader starts its workers before it is asked for a batch

    def batches(self, iterator: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches, counted, and the time that they are waited for."""
        while True:
            begun = perf_counter() if self._epoch_begun is None else self._epoch_begun
            self._epoch_begun = None
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += perf_counter() - begun
            self._count(batch)
            yield batch

    def _count(self, batch: dict[str, Any]) -> None:
        self._tokens = self._tokens + (batch["labels"] != -100).sum()
        if "attention_mask" in batch:
            self._frames = self._frames + batch["attention_mask"].sum()
        elif "speech_mask" in batch:
            self._frames = self._frames + FRAMES_PER_STATE * batch["speech_mask"].sum()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluations and checkpoints: what is done here is no part of the time."""
        begun = perf_counter()
        yield
        self._not_counted += perf_counter() - begun

    def measured(self) -> dict[str, float]:
        """
        Since the line before, of all ranks together; all ranks must come here.

        - `audio_hours_per_hour`: audio without its padding, where the batches have any. States that a model without
          `mask_speech_padding` keeps are those of whole windows, and so counted.
        - `tokens_per_second`: of the transcripts, each with its end.
        - `utilisation` (%): time that was not spent waiting for a batch. Of several ranks it is that of the one which
          waited longest: the others wait for it in turn.
        """
        seconds = perf_counter() - self._begun - self._not_counted
        ranks = all_gather((float(self._frames), float(self._tokens), seconds, self._waited))
        frames, tokens, seconds, waited = zip(*ranks, strict=True)
        self._begin()
        speed = {"tokens_per_second": sum(tokens) / max(seconds), "utilisation": 100 * (1 - max(waited) / max(seconds))}
        if any(frames):
            speed = {"audio_hours_per_hour": sum(frames) * self.frame_seconds / max(seconds), **speed}
        return speed


class Progress(ProgressCallback):
    """
    The time left follows from the mean of all steps since the start, with the evaluations and checkpoints between them.
    As in transformers it would follow from the last few, and count the steps before a resume as made within the first.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, smoothing=0, unit="step", dynamic_ncols=True
            )

    def close(self) -> None:
        """Of a training that ends by an error, which gets a line of its own."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()


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
