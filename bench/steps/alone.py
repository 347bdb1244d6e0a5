"""
One system in a process of its own, or in several: its peak memory and its seconds a step, as JSON.

    python -m seam.bench.steps.alone SYSTEM SIZE DEVICE BATCH STEPS FOLDER
    torchrun --nproc_per_node 2 -m seam.bench.steps.alone ...
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from accelerate import PartialState

from seam.bench.common import peak, reset_peak
from seam.bench.steps.clock import train
from seam.bench.steps.systems import BUILDERS, Setting
from seam.data.manifest import read_manifest


def run_alone(system: str, setting: Setting, batch: int, processes: int = 1, threads: int | None = None) -> dict:
    """
    What `main` prints of a system in new processes.

    Args:
        batch: of each process.
        threads: of each process; by default torch's choice.
    """
    arguments = [system, setting.size, setting.device, batch, setting.steps, setting.folder]
    launcher = [] if processes == 1 else ["torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m"]
    command = [sys.executable, "-m", *launcher, "seam.bench.steps.alone", *arguments]
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def main(system: str, size: str, device: str, batch: str, steps: str, folder: str) -> None:
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
    PartialState().destroy_process_group()  # or gloo's threads may abort a process that ends before the others


if __name__ == "__main__":
    main(*sys.argv[1:])
