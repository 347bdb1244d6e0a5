"""
Compare SEAM's trainings with those of transformers and PEFT, on one machine in one run, with random weights.

    python -m bench.training --size tiny|base|small|paper [--device cpu|cuda] [--batch N] [--json FILE] [--plot FILE]

The baseline of Stage 1 is transformers' `Seq2SeqTrainer`, which fine-tunes a Whisper with a frozen encoder and a
decoder of the aligner's sizes. That of Stage 2 is transformers' `Trainer` with PEFT's LoRA on the same language model,
over as many tokens. Recordings fill the encoder's window; they, batches, optimizer and precision are equal for all. All
are trained through `Trainer.train`, in turn, a few steps at a time. Ratios are of steps per second: above 1, SEAM is
faster.

`training_setup.py` describes the sizes. In the names of metrics `peer` is the baseline. `stage1_vs_peer` is relative to
a Whisper whose embedding table is frozen, so that both train equally many layers; `..._with_table` relative to one that
trains it, as fine-tuning does. `..._cached` reads encoder states from disk (`data.encoder_states`). Each part
(`--only`) is measured by itself; peak memory and several processes in new processes.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import peft
import transformers
import typer

from seam.bench.common import check_size_and_device, describe_run, parse_parts, save_and_print
from seam.bench.training.training_measurements import PARTS, Findings
from seam.bench.training.training_results import print_findings, write_plot
from seam.bench.training.training_setup import SIZES, Setting, sizes_of, write_speech


def measure(
    size: str, device: str, batch: int, steps: int, repeats: int, parts: list[str], folder: Path
) -> Iterator[dict]:
    """Yield the content of the JSON file after each part."""
    transformers.logging.set_verbosity_error()
    utterances = write_speech(folder / "speech", steps * batch, sizes_of(size).window)
    setting, findings = Setting(size, device, batch, steps, utterances, folder), Findings()
    about = {
        **describe_run(size, device, setting.sizes.dtype),
        "peft": peft.__version__,
        "batch": batch,
        "steps": steps,
        "repeats": repeats,
        "seconds_of_speech": statistics.mean(one.duration for one in utterances),
        "tokens": statistics.mean(len(setting.processor.transcript_ids(one.text)) for one in utterances),
        "skipped": [name for name in PARTS if name not in parts],
    }
    for part in parts:
        PARTS[part](setting, findings, repeats)
        yield {**about, **vars(findings)}


def main(
    size: Annotated[str, typer.Option(help=f"{', '.join(SIZES)}.")] = "base",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(min=2, help="Utterances per step.")] = 8,
    steps: Annotated[int, typer.Option(min=3, help="Steps per training; the first is not timed.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each training; medians are reported.")] = 5,
    only: Annotated[str | None, typer.Option(help=f"Parts, of {', '.join(PARTS)}.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG.")] = None,
):
    """Measure SEAM's trainings against transformers and PEFT."""
    check_size_and_device(size, SIZES, device)
    if batch % 2:
        raise typer.BadParameter(f"--batch is {batch}; accepted: even numbers, which two processes can share.")
    parts = _parts(only, device)
    with tempfile.TemporaryDirectory() as folder:
        reports = measure(size, device, batch, steps, repeats, parts, Path(folder))
        save_and_print(reports, json_file, plot, print_findings, write_plot)


def _parts(text: str | None, device: str) -> list[str]:
    if text is None:
        return [name for name in PARTS if name != "utilisation" or device == "cuda"]
    return parse_parts(text, PARTS)


if __name__ == "__main__":
    typer.run(main)
