"""JSON Lines files that are written row by row, and go on where they were interrupted."""

import json
import os
from pathlib import Path
from typing import Any


def read_rows(path: Path, unfinished: bool = False) -> list[dict[str, Any]]:
    """
    Args:
        unfinished: leave out a last line that has no end yet: its writer is at work, or was interrupted.

    Raises:
        ValueError: for a line that is not JSON, by its number.
    """
    *lines, last = path.read_bytes().split(b"\n")
    if last and not unfinished:
        lines.append(last)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged: {error}.") from error
    return rows


def repair(path: Path) -> list[dict[str, Any]]:
    """Cut off the unfinished last line that an interrupted run leaves, and return the rows; none of a missing file."""
    if not path.is_file():
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return read_rows(path)
