"""What a bench says of where it was measured: in its JSON, on its picture and in the terminal."""

import os
import platform
from datetime import date
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure

from seam.data.files import replacing


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
