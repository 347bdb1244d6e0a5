"""
Files that are whole or not there, written to a temporary name and then renamed; JSON Lines files that go on where their
writer was interrupted; and what the errors met on the way say, in one line.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    The path to write to instead of `path`, which it becomes at the end. Where writing fails it is removed, and an older
    file stays as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def sha256_of(parts: Iterable[Any]) -> str:
    """
    Return the SHA-256 digest, in hexadecimal digits, of parts that follow each other.

    Args:
        parts: files (`Path`) by their content, lists and dicts as JSON with sorted keys, bytes and arrays as they are.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode() if isinstance(part, list | dict) else part)
    return digest.hexdigest()


def sentence_of(error: Exception) -> str:
    """An error's message in one line; of one that a `DataLoader`'s worker met, without the traceback around it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and "Original Traceback" in str(error):
        return re.sub(r"^[\w.]+: ", "", lines[-1])
    return " ".join(" ".join(lines).split())
