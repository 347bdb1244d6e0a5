"""How fast a training goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from transformers import TrainerCallback

from seam.train.ranks import of_all_ranks

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
        ranks = of_all_ranks((float(self._frames), float(self._tokens), seconds, self._waited))
        frames, tokens, seconds, waited = zip(*ranks, strict=True)
        self._begin()
        speed = {"tokens_per_second": sum(tokens) / max(seconds), "utilisation": 100 * (1 - max(waited) / max(seconds))}
        if any(frames):
            speed = {"audio_hours_per_hour": sum(frames) * self.frame_seconds / max(seconds), **speed}
        return speed
