"""Steps a second of trainers, in turn."""

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from seam.bench.common import synchronize

# Of each training, which are not timed: the first one makes the optimizer's state, and its operations are counted.
WARM_UP_STEPS = 1


class _Ends(TrainerCallback):
    """When each step ended."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.seconds.append(time.perf_counter())


@dataclass
class Training:
    """
    Args:
        seconds: a step, from the end of the warm-up to that of the last step: reading the data counts.
        transcripts: the labels of every batch.
        operations: floating-point operations of a step's products, forward and backward (`FlopCounterMode`).
    """

    seconds: float
    transcripts: list[list[list[int]]]
    operations: int


def train(trainer: Trainer) -> Training:
    """Train as a user would; the first step is counted instead of timed."""
    ends, transcripts, training_step = _Ends(trainer.args.device), [], trainer.training_step
    counter = FlopCounterMode(display=False)

    def watched(model, inputs, *args, **kwargs):
        transcripts.append([row[row != -100].tolist() for row in inputs["labels"]])
        with counter if len(transcripts) == 1 else nullcontext():
            return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = watched
    trainer.add_callback(ends)
    trainer.train()
    timed = ends.seconds[WARM_UP_STEPS - 1 :]
    seconds = (timed[-1] - timed[0]) / (len(timed) - 1)
    return Training(seconds, transcripts, counter.get_total_flops())


def trained_in_turn(
    trainers: Mapping[str, Callable[[], Trainer]], repeats: int, description: str
) -> dict[str, list[Training]]:
    """Train a, b, c, a, b, c, ..., so that what else the machine does meets all of them alike."""
    trained = {name: [] for name in trainers}
    with tqdm(total=repeats * len(trainers), desc=description, leave=False) as progress:
        for _ in range(repeats):
            for name, make in trainers.items():
                progress.set_postfix_str(name)
                trained[name].append(train(make()))
                gc.collect()  # the optimizer's state
                progress.update()
    return trained
