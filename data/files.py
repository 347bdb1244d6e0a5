"""Write files atomically, read JSON Lines, digest contents, and put an error's message into one line."""

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
    Yield a temporary path that replaces `path` when the block ends.

    When the block raises, the temporary file is removed and an older file at `path` stays as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json_lines(path: Path, ignore_unfinished: bool = False) -> list[dict[str, Any]]:
    """
    Return the rows of a JSON Lines file.

    Args:
        ignore_unfinished: ignore a last line without a line end: its writer is still at work, or was interrupted.

    Raises:
        ValueError: a line is not JSON; the message has its number.
    """
    *lines, last = path.read_bytes().split(b"\n")
    if last and not ignore_unfinished:
        lines.append(last)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged: {error}.") from error
    return rows


def repair_json_lines(path: Path) -> list[dict[str, Any]]:
    """
    Cut off the unfinished last line that an interrupted run leaves, and return the rows.

    A missing file has no rows.
    """
    if not path.is_file():
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return read_json_lines(path)


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


def one_line(error: Exception) -> str:
    """
    Return an error's message in one line.

    An error of a `DataLoader`'s worker loses the traceback that torch puts around its message.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and "Original Traceback" in str(error):
        return re.sub(r"^[\w.]+: ", "", lines[-1])
    return " ".join(" ".join(lines).split())
