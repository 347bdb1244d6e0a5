"""
Time the steps of trainers: of several in turn, or of one in new processes, where its peak memory is its own.

    python -m seam.bench.training.step_timing SYSTEM SIZE DEVICE BATCH STEPS FOLDER
    torchrun --nproc_per_node 2 -m seam.bench.training.step_timing ...

prints seconds per step and peak memory as JSON.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from seam.bench.common import peak, reset_peak, synchronize
from seam.bench.training.trainer_builders import BUILDERS
from seam.bench.training.training_setup import Setting
from seam.data.manifest import read_manifest

# Not timed: the first step allocates the optimizer's state, and counting its operations takes time.
WARM_UP_STEPS = 1


class _StepEnds(TrainerCallback):
    """Record when each step ended."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.seconds.append(time.perf_counter())


@dataclass
class Training:
    """
    Hold what was measured in a training.

    Args:
        seconds: per step, from the end of the warm-up to the end of the last step: loading data is included.
        transcripts: the labels of every batch.
        operations: floating-point operations of the matrix products of a step, forward and backward.
    """

    seconds: float
    transcripts: list[list[list[int]]]
    operations: int


def train(trainer: Trainer) -> Training:
    """Train as a user would, counting the operations of the first step and timing the others."""
    ends, transcripts, training_step = _StepEnds(trainer.args.device), [], trainer.training_step
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


def train_in_turn(
    trainers: Mapping[str, Callable[[], Trainer]], repeats: int, description: str
) -> dict[str, list[Training]]:
    """Train in the order a, b, c, a, b, c, ..., so that other load on the machine affects all of them alike."""
    trained = {name: [] for name in trainers}
    with tqdm(total=repeats * len(trainers), desc=description, leave=False) as progress:
        for _ in range(repeats):
            for name, make in trainers.items():
                progress.set_postfix_str(name)
                trained[name].append(train(make()))
                gc.collect()  # frees the optimizer's state
                progress.update()
    return trained


def run_in_new_process(
    system: str, setting: Setting, batch: int, processes: int = 1, threads: int | None = None
) -> dict:
    """
    Train a system in new processes and return what `main` prints.

    Args:
        system: one of `BUILDERS`.
        setting: of the run.
        batch: utterances per step of each process.
        processes: number of processes that train together.
        threads: of each process; by default torch's choice.
    """
    arguments = [system, setting.size, setting.device, batch, setting.steps, setting.folder]
    launcher = [] if processes == 1 else ["torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m"]
    command = [sys.executable, "-m", *launcher, "seam.bench.training.step_timing", *arguments]
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed with exit status {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def main(system: str, size: str, device: str, batch: str, steps: str, folder: str) -> None:
    """Train one system and print its peak memory and seconds a step as JSON."""
    transformers.logging.set_verbosity_error()
    utterances = read_manifest(Path(folder) / "speech" / "manifest.jsonl")
    setting = Setting(size, device, int(batch), int(steps), utterances, Path(folder))
    trainer = BUILDERS[system](setting)()
    device = trainer.args.device
    reset_peak(device)
    training = train(trainer)
    if trainer.args.process_index == 0:
        found = {"seconds": training.seconds, "peak_bytes": peak(device), "threads": torch.get_num_threads()}
        print(json.dumps(found))
    PartialState().destroy_process_group()  # or gloo's threads may abort a process that exits before the others


if __name__ == "__main__":
    main(*sys.argv[1:])
