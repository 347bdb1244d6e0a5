"""
The systems that are evaluated, and the hypotheses of a run of `seam.evaluation.decoding`.

A run is a folder with `run.json` and one JSON Lines file for each system. It is read without torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seam.data.files import read_json_lines


@dataclass(frozen=True)
class System:
    """
    One way to transcribe, which is evaluated by itself.

    Args:
        description: in reports.
        row: heading of its row in the demo's table.
        suffix: what `seam compare` adds to a training's label for this system's row; empty where it adds nothing.
        generate: its arguments of `generate`.
    """

    description: str
    row: str
    suffix: str = ""
    generate: Mapping[str, bool] = field(default_factory=dict)


SYSTEMS = {
    "stage1": System(
        description="Stage 1 without the LLM",
        row="SEAM w/o LLM (Stage 1)",
        suffix="Stage 1",
        generate={"use_llm": False},
    ),
    "full": System(
        description="the full model, with First Token Guidance",
        row="SEAM full, w/ FTG",
        suffix="with FTG",
        generate={"use_llm": True, "first_token_guidance": True},
    ),
    "full-noftg": System(
        description="the full model without it",
        row="SEAM full, w/o FTG",
        suffix="without FTG",
        generate={"use_llm": True, "first_token_guidance": False},
    ),
    "whisper": System(description="Whisper's own decoder", row="Whisper, its own decoder"),
}
"""By the name that `seam evaluate --systems` takes, in the order in which they are decoded."""
# The rows of the paper's Table 1. The last of these that was run is the model's own result, as on its card.
TABLE_1 = ("whisper", "stage1", "full-noftg", "full")


def read_hypotheses(folder: str | Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """
    Read a finished run.

    Returns:
        `run.json`, and the rows of every system in the order of the manifests.

    Raises:
        FileNotFoundError: when there is no run; ValueError: when it was not finished, or a file is damaged.
    """
    folder = Path(folder)
    run = read_run(folder)
    utterances = sum(manifest["utterances"] for manifest in run["data"])
    systems = {}
    for system in run["systems"]:
        path = rows_path(folder, system)
        rows = sorted(read_json_lines(path), key=lambda row: row["id"]) if path.is_file() else []
        if [row["id"] for row in rows] != list(range(utterances)):
            count = len({row["id"] for row in rows})
            if count < utterances:
                raise ValueError(
                    f"{path} holds {count} of {utterances} utterances; the same `seam evaluate` finishes it."
                )
            raise ValueError(
                f"{path} holds other utterances than the {utterances} of run.json, or some of them twice; the same "
                "`seam evaluate` mends it."
            )
        systems[system] = rows
    return run, systems


def read_run(folder: Path) -> dict[str, Any]:
    """Return the content of `run.json`. Raises as [`read_hypotheses`] does."""
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} holds no run of `seam evaluate`.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def rows_path(folder: Path, system: str) -> Path:
    """Return the path of a system's hypotheses."""
    return folder / "hypotheses" / f"{system}.jsonl"
