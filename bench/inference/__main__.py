"""
Compare SEAM's two loops with stock transformers, on one machine in one run, with random weights.

    python -m bench.inference --size tiny|small|paper [--device cpu|cuda] [--batch 1,4,8] [--json FILE] [--plot FILE]

Measured are (a) stock Whisper's `generate` with a decoder of the aligner's own layers; (b) stock Qwen3's greedy
`generate` on SEAM's prompts; (c) SEAM's loops, with and without drafts. Complete systems are sums of these. All decode
the same number of tokens, since none predicts an end. Sizes paper and small are those of `recipes`, in bf16; tiny is in
fp32.

Drafts are the plain loop's own text with a given share of tokens substituted, deleted or inserted, others in each
repeat. Predictions of Stage 1 lie as near to an embedding as those of a trained model (see `synthetic_model.py`),
except for `lookup_share_random`. `seam_*` are complete systems; in `seam_draft_*` Stage 1 verifies a draft, too, and
the time of the draft head is included. Each part (`--only`) is measured by itself; `linearity` decodes up to four times
as many tokens, and gives the LLM an utterance that is as many times as long.

At paper size on two cores, a batch of one takes half an hour and 15 GB of memory. Stock `generate` of the LLM copies
its output matrix for each row of a batch: 8 rows take 10 GB more. `--only llm` drops the models that the LLM does not
need, `--only stage_1` skips the LLM's loops.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer

from seam.bench.common import check_size_and_device, describe_run, measure_machine, parse_parts, save_and_print
from seam.bench.inference.decoding_loops import Speech
from seam.bench.inference.decoding_measurements import LENGTHS, LLM_PARTS, PARTS, PARTS_OF_ALL, Findings, Setting
from seam.bench.inference.decoding_results import print_findings, write_plot
from seam.bench.inference.synthetic_model import SIZES, build, lookup, stock_whisper


@torch.no_grad()
def measure(
    size: str, device: str, batches: list[int], tokens: int, repeats: int, parts: list[str], active: int | None = None
) -> Iterator[dict]:
    """Measure all parts for all batch sizes; yield the content of the JSON file after each batch size."""
    transformers.logging.set_verbosity_error()  # silences warnings about generation flags that are ignored
    model = build(size, device)
    whisper, machine = stock_whisper(model), measure_machine(model.device, model.dtype)
    tables = lookup(model), None if active is None else lookup(model, active)
    findings, speech = Findings(), {batch: Speech.random(model, batch) for batch in batches}
    if LLM_PARTS.issuperset(parts):
        model.encoder = model.bridge = whisper = None  # frees memory for stock `generate`
    about = {
        **describe_run(size, device, model.dtype),
        "tokens": tokens,
        "repeats": repeats,
        "active_vocabulary": active,
        "bandwidth_gb_per_s": machine.bandwidth / 1e9,
        "tflop_per_s": machine.arithmetic / 1e12,
    }
    for batch in batches:
        setting = Setting(model, whisper, tables[0], machine, speech[batch], tokens, repeats, tables[1])
        for part in parts:
            PARTS[part](setting, findings)
        yield {**about, **vars(findings)}


def main(
    size: Annotated[str, typer.Option(help="tiny, small or paper.")] = "paper",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between them.")] = "1",
    tokens: Annotated[int, typer.Option(min=4, help="Tokens that each loop decodes.")] = 90,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each measurement; medians are reported.")] = 3,
    only: Annotated[
        str | None, typer.Option(help=f"Parts, of {', '.join(PARTS)}. By default all, at size tiny memory, too.")
    ] = None,
    active: Annotated[
        int | None, typer.Option(min=1, help="Measure Stage 1 with an active vocabulary of this many ids, too.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG.")] = None,
):
    """Measure SEAM's loops against stock transformers."""
    batches, parts = _batches(batch), _parts(only, size)
    check_size_and_device(size, SIZES, device)
    longest = tokens * (max(LENGTHS) if "linearity" in parts else 1)
    if longest > 447:
        raise typer.BadParameter(f"--tokens: {longest} tokens would be decoded; the aligner has positions for 447.")
    if active is not None and active <= longest:
        raise typer.BadParameter(f"--active is {active}; accepted: more than the {longest} tokens that are decoded.")
    reports = measure(size, device, batches, tokens, repeats, parts, active)
    save_and_print(reports, json_file, plot, print_findings, write_plot)


def _batches(text: str) -> list[int]:
    if not all(part.isdigit() and int(part) > 0 for part in text.split(",")):
        raise typer.BadParameter(f"--batch is {text!r}; accepted: numbers above 0 with commas between them.")
    return [int(part) for part in text.split(",")]


def _parts(text: str | None, size: str) -> list[str]:
    if text is None:
        return [name for name in PARTS_OF_ALL if name != "memory" or size == "tiny"]
    return parse_parts(text, PARTS)


if __name__ == "__main__":
    typer.run(main)
