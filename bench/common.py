"""What the benches share: checks of arguments, reports, the speed of the machine, seconds and peak memory of calls."""

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

RECIPES = Path(__file__).parents[1] / "recipes"


def check_size_and_device(size: str, sizes: Collection[str], device: str) -> None:
    """Raise `typer.BadParameter` for an unknown size, or a device that torch does not find."""
    if size not in sizes:
        raise typer.BadParameter(f"--size is {size!r}; accepted: {', '.join(sizes)}.")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device is {device!r}; accepted: cpu, cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device is cuda, but torch finds no GPU.")


def parse_parts(only: str, parts: Collection[str]) -> list[str]:
    """Split the comma-separated names given to `--only`. Raises `typer.BadParameter` for an unknown one."""
    unknown = [name for name in only.split(",") if name not in parts]
    if unknown:
        raise typer.BadParameter(f"--only names {unknown[0]!r}; accepted: {', '.join(parts)}.")
    return only.split(",")


def save_and_print(
    reports: Iterator[dict],
    json_file: Path | None,
    plot: Path | None,
    print_findings: Callable[[dict, Console], None],
    write_plot: Callable[[dict, Path], None],
) -> None:
    """Write each report to the JSON file as it arrives, lest an interrupted run lose it; print and plot the last."""
    for report in reports:
        if json_file is not None:
            write_text(json_file, json.dumps(report, indent=1) + "\n")
    print_findings(report, Console(width=None if sys.stdout.isatty() else 150))
    if plot is not None:
        write_plot(report, plot)


def describe_run(size: str, device: str, dtype: torch.dtype) -> dict:
    """Return the fields that the JSON file begins with: size, hardware, versions."""
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


def device_name(report: dict) -> str:
    """Return the name of the GPU, or of the CPU with the number of its cores that were used."""
    hardware = report["hardware"]
    return hardware["gpu"] or f"{hardware['cpu']}, {report['threads']} of {hardware['cores']} cores"


def save_plot(figure: Figure, report: dict, details: str, path: Path) -> None:
    """
    Write a figure as PNG.

    Args:
        figure: to which the title is added.
        report: whose size, data type, hardware and date the title names.
        details: what else the title says.
        path: of the PNG.
    """
    hardware = report["hardware"]
    figure.suptitle(
        f"size {report['size']}, {report['dtype']}, {details}, random weights; "
        f"{hardware['gpu'] or hardware['cpu']}, {report['date']}",
        fontsize=9,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def synchronize(device: torch.device) -> None:
    """Wait until the work queued on an accelerator is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Measurement:
    """
    Hold the time, the peak memory and the results of the repeated calls of a function.

    Args:
        seconds: per repeat.
        peak: largest number of bytes in use: on a GPU as allocated by torch, otherwise of the process.
        results: return value of each repeat.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    results: list = field(default_factory=list)

    @property
    def median(self) -> float:
        """Return the median of the repeats, in seconds."""
        return statistics.median(self.seconds)


def measure_in_turn(
    functions: Mapping[str, Callable], repeats: int, device: torch.device, description: str
) -> dict[str, Measurement]:
    """Call functions in the order a, b, c, a, b, c, ..., so that other load on the machine affects all alike."""
    measured = {name: Measurement() for name in functions}
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


def median_of_sums(measured: Mapping[str, Measurement], names: list[str]) -> float:
    """Return the median over the repeats of the seconds that several functions take together."""
    return statistics.median(map(sum, zip(*(measured[name].seconds for name in names), strict=True)))


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of `peak`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Return the largest number of bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _memory_of_process("VmHWM")


def memory_in_use(device: torch.device) -> int:
    """Return the number of bytes in use now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _memory_of_process("VmRSS")


def _memory_of_process(name: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


BYTES = 2**29  # size of the matrix that is read to measure the bandwidth: larger than any cache
SIDE = 2048  # of the square matrices that are multiplied to measure the arithmetic
TRIES = 20  # the fastest counts: other load on the machine can only slow it down


@dataclass
class Machine:
    """
    Hold the speed of a machine.

    Args:
        bandwidth: bytes per second read by the product of a large matrix and a vector.
        arithmetic: floating-point operations per second of the product of two large matrices.
    """

    bandwidth: float
    arithmetic: float


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure bandwidth and arithmetic in the data type in which the models compute."""
    columns = 4096
    matrix = torch.full((BYTES // dtype.itemsize // columns, columns), 0.5, device=device, dtype=dtype)
    vector = torch.full((columns,), 0.5, device=device, dtype=dtype)
    square = torch.full((SIDE, SIDE), 0.5, device=device, dtype=dtype)
    reading = _best_seconds(lambda: torch.mv(matrix, vector), device)
    return Machine(BYTES / reading, 2 * SIDE**3 / _best_seconds(lambda: square @ square, device))


def _best_seconds(function: Callable, device: torch.device) -> float:
    seconds = []
    for _ in range(TRIES + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
