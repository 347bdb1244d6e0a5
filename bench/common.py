"""What the benches share: arguments, the machine and its speed, times and peaks of memory, and where findings go."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import transformers
import typer
from matplotlib.figure import Figure
from rich.console import Console
from tqdm.auto import tqdm

from seam.data.files import replacing, write_text


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


def measured_on(size: str, device: str, dtype: torch.dtype) -> dict:
    """What the JSON file begins with."""
    return {
        "size": size,
        "device": device,
        "hardware": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _cpu_name() -> str:
    names = [line.split(":", 1)[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0].strip() if names else platform.processor()


def machine(report: dict) -> str:
    """The device in words."""
    hardware = report["hardware"]
    return hardware["gpu"] or f"{hardware['cpu']}, {report['threads']} of {hardware['cores']} cores"


def save_plot(figure: Figure, report: dict, words: str, path: Path) -> None:
    """Write a figure as PNG. `words`: of the title, beside the size and where it was measured."""
    hardware = report["hardware"]
    figure.suptitle(
        f"size {report['size']}, {report['dtype']}, {words}, random weights; "
        f"{hardware['gpu'] or hardware['cpu']}, {report['date']}",
        fontsize=9,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Measured:
    """
    Args:
        seconds: of each repeat.
        peak: bytes in use at most: on a GPU those that torch allocated, else of the process.
        results: what each repeat returned.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    results: list = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def in_turn(
    functions: Mapping[str, Callable], repeats: int, device: torch.device, description: str
) -> dict[str, Measured]:
    """Call functions a, b, c, a, b, c, ..., so that what else the machine does meets all of them alike."""
    measured = {name: Measured() for name in functions}
    with tqdm(total=repeats * len(functions), desc=description, leave=False) as progress:
        for _ in range(repeats):
            for name, function in functions.items():
                progress.set_postfix_str(name)
                one = measured[name]
                reset_peak(device)
                synchronize(device)
                start = time.perf_counter()
                result = function()
                synchronize(device)
                one.seconds.append(time.perf_counter() - start)
                one.results.append(result)
                one.peak = max(one.peak, peak(device))
                progress.update()
    return measured


def of_sums(measured: Mapping[str, Measured], names: list[str]) -> float:
    """The median over the repeats of what several functions take together."""
    return statistics.median(map(sum, zip(*(measured[name].seconds for name in names), strict=True)))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes in use at most since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def in_use(device: torch.device) -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _status(name: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


BYTES = 2**29  # of the matrix that is read to measure the bandwidth: more than caches hold
SIDE = 2048  # of the square matrices that are multiplied
TRIES = 20  # of which the best counts: other work on the machine only ever slows it down


@dataclass
class Machine:
    """
    Args:
        bandwidth: bytes a second that a product of a large matrix with one vector reads.
        arithmetic: floating-point operations a second of a product of two matrices.
    """

    bandwidth: float
    arithmetic: float


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The speeds of a machine, in the type in which the models compute."""
    columns = 4096
    matrix = torch.full((BYTES // dtype.itemsize // columns, columns), 0.5, device=device, dtype=dtype)
    vector = torch.full((columns,), 0.5, device=device, dtype=dtype)
    square = torch.full((SIDE, SIDE), 0.5, device=device, dtype=dtype)
    reading = _best(lambda: torch.mv(matrix, vector), device)
    return Machine(BYTES / reading, 2 * SIDE**3 / _best(lambda: square @ square, device))


def _best(function, device: torch.device) -> float:
    seconds = []
    for _ in range(TRIES + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
