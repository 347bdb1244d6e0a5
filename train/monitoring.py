"""Measure the throughput of a training, show its progress, and plot its curves."""

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
    Count the audio and the tokens that a training reads between two lines of its log, and the time that it takes.

    The counts stay on the batches' device until the line is written, so that no step waits for them.

    Args:
        frame_seconds: between two mel frames.
    """

    def __init__(self, frame_seconds: float):
        self.frame_seconds = frame_seconds
        self._reset()

    def _reset(self) -> None:
        self._start = perf_counter()
        self._paused = self._waited = 0.0
        self._frames = self._tokens = 0  # tensors on the batches' device from the first batch on
        self._epoch_start = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin to count."""
        self._reset()

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Begin to wait for the first batch: the loader starts its workers before it is asked for one."""
        self._epoch_start = perf_counter()

    def batches(self, iterator: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the same batches, and count them and the time spent waiting for them."""
        while True:
            start = perf_counter() if self._epoch_start is None else self._epoch_start
            self._epoch_start = None
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += perf_counter() - start
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
        """Leave the time that is spent in the context (evaluating, saving) out of the measurement."""
        start = perf_counter()
        yield
        self._paused += perf_counter() - start

    def measured(self) -> dict[str, float]:
        """
        Return the throughput of all ranks together since the last call; every rank must call this.

        - `audio_hours_per_hour`: audio without its padding, where batches hold speech. Encoder states of a model
          without `mask_speech_padding` count with their padding.
        - `tokens_per_second`: of the transcripts, with the end of each.
        - `utilisation` (%): time not spent waiting for a batch, of the rank that waited longest, because the others
          wait for it in turn.
        """
        seconds = perf_counter() - self._start - self._paused
        ranks = all_gather((float(self._frames), float(self._tokens), seconds, self._waited))
        frames, tokens, seconds, waited = zip(*ranks, strict=True)
        self._reset()
        speed = {"tokens_per_second": sum(tokens) / max(seconds), "utilisation": 100 * (1 - max(waited) / max(seconds))}
        if any(frames):
            speed = {"audio_hours_per_hour": sum(frames) * self.frame_seconds / max(seconds), **speed}
        return speed


class Progress(ProgressCallback):
    """
    Show the progress of a training, and an estimate of the time left from the mean of all steps since its start.

    transformers estimates it from the last few steps, without the evaluations and checkpoints between them, and counts
    the steps before a resume as taken in no time.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, smoothing=0, unit="step", dynamic_ncols=True
            )

    def on_prediction_step(self, args, state, control, **kwargs):
        """Say in the training's bar that an evaluation runs; without a training, advance the evaluation's own bar."""
        if self.training_bar is None:
            super().on_prediction_step(args, state, control, **kwargs)
        else:  # no second bar beneath that of the training
            self.training_bar.set_postfix_str("evaluating")

    def on_evaluate(self, args, state, control, **kwargs):
        """Close the evaluation's bar, or clear its mark in the training's."""
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_postfix_str("")

    def close(self) -> None:
        """Close the bars, so that the error that ends a training gets a line of its own."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()


# The title and unit of every panel, and its curves: keys of the log, with their labels and colours.
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
LOG_SCALE_RATIO = 10  # of the largest to the smallest loss, above which their axis is logarithmic
MAX_MARKED = 40  # points of a curve that are marked one by one


def plot_training_curves(log: Iterable[dict[str, float]], path: Path, title: str, best_step: int | None = None) -> None:
    """
    Plot losses, word error rates, learning rate and throughput over the steps, a panel for each that the log has.

    Args:
        log: `log_history` of a `TrainerState`. Where a step has two values the first is plotted: the second is from
            the evaluation at the end, of the weights that were kept.
        path: PNG to write.
        title: for instance the output folder.
        best_step: step of the weights that were kept, where it is not the last.
    """
    values: dict[str, dict[int, float]] = {}
    for row in log:
        for key, value in row.items():
            values.setdefault(key, {}).setdefault(row["step"], value)
    panels = [
        (name, unit, plotted)
        for name, unit, curves in PANELS
        if (plotted := {key: curve for key, curve in curves.items() if key in values})
    ]
    last = max(step for steps in values.values() for step in steps)
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.4), layout="constrained")
    for number, (name, unit, curves) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for key, (label, colour) in curves.items():
            x, y = zip(*sorted(values[key].items()), strict=True)
            axes.plot(x, y, color=colour, label=label, marker="." if len(x) <= MAX_MARKED else None, lw=1.2)
        if best_step is not None:
            axes.axvline(best_step, color="grey", lw=0.9, ls="--")
        axes.set_xlim(0, 1.02 * last)
        _format_axes(axes, name, unit, [value for key in curves for value in values[key].values()])
    best = "" if best_step is None else f"\nbest, and kept: step {best_step} (dashed)"
    figure.suptitle(title + best, fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _format_axes(axes: Axes, name: str, unit: str, values: list[float]) -> None:
    """Give a panel its title, labels, scale and legend; `values` are those of all its curves."""
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if name != "loss":
        # Before training there may be several times as many errors as words, which would flatten the rest of the curve.
        top = 100 if unit.startswith("%") and min(values) < 100 < max(values) else max(*values, 1e-12)
        axes.set_ylim(0, 1.05 * top)
        axes.ticklabel_format(axis="y", scilimits=(-3, 6))
    elif min(values) > 0 and max(values) > LOG_SCALE_RATIO * min(values):
        axes.set_yscale("log")
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize=8)
