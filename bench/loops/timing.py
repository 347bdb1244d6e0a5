"""Time and peak memory of functions, measured in turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm


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
