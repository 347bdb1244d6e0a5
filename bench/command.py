"""What the commands of both benches have in common: what they accept, and where their findings go."""

import json
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
import typer
from rich.console import Console

from seam.data.files import write_text


def check_machine(size: str, sizes: Collection[str], device: str) -> None:
    """Raise `typer.BadParameter` for a size that there is not, or a device that torch does not find."""
    if size not in sizes:
        raise typer.BadParameter(f"--size is {size!r}; accepted: {', '.join(sizes)}.")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device is {device!r}; accepted: cpu, cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device is cuda, but torch finds no GPU.")


def named_parts(only: str, parts: Collection[str]) -> list[str]:
    """What `--only` names, with commas between them. Raises `typer.BadParameter` for a part that there is not."""
    unknown = [name for name in only.split(",") if name not in parts]
    if unknown:
        raise typer.BadParameter(f"--only names {unknown[0]!r}; accepted: {', '.join(parts)}.")
    return only.split(",")


def publish(
    reports: Iterator[dict],
    json_file: Path | None,
    plot: Path | None,
    print_findings: Callable[[dict, Console], None],
    write_plot: Callable[[dict, Path], None],
) -> None:
    """Write every report over the one before, as it comes, so that none is lost; print and draw the last."""
    for report in reports:
        if json_file is not None:
            write_text(json_file, json.dumps(report, indent=1) + "\n")
    print_findings(report, Console(width=None if sys.stdout.isatty() else 150))
    if plot is not None:
        write_plot(report, plot)
