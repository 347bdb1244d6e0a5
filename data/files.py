"""Write files atomically, one process at a time; read JSON Lines, digest contents, put an error into one line."""

import difflib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

# How long to wait for another process: the workers of a killed one keep its lock for a few seconds.
LOCK_SECONDS = 10
# Full, over quota, over the limit of a file's size.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def recipe_file(path: str | Path) -> Path:
    """Return where a recipe lies: at `path`, or in the package, under the name that the documents give it."""
    shipped = Path(__file__).parents[1] / path
    return shipped if not Path(path).is_file() and shipped.is_file() else Path(path)


def check_path(name: str, what: str = "the checkpoint") -> None:
    """
    Check a name that is no folder: is it a mistyped path, or a Hub id?

    A name that begins as a path does, or with a folder that is here, or has more than one slash is a path.

    Args:
        name: of a checkpoint or a backbone.
        what: it names.

    Raises:
        FileNotFoundError: for a path, naming the nearest folder.
    """
    path = Path(name)
    is_path = (
        name.startswith((".", "~", os.sep)) or name.count("/") > 1 or (len(path.parts) > 1 and path.parent.is_dir())
    )
    if path.exists() or not is_path:
        return
    beside = [str(one) for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), beside, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise FileNotFoundError(f"cannot load {what} {name!r}: no such folder{hint}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Yield a temporary path that replaces `path` when the block ends.

    When the block raises, the temporary file is removed and an older file at `path` stays as it was. Whoever may read
    new files may read it, also where a library writes files for their owner alone, as safetensors does.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            if temporary.stat().st_mode != mode:
                temporary.chmod(mode)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file where the disk is full: the system's own error says neither what nor where."""
    try:
        yield
    except OSError as error:
        named = {error.filename, error.filename2} - {None}
        if error.errno not in NO_ROOM or (named and named.isdisjoint((str(path), f"{path}.tmp"))):
            raise
        raise OSError(f"{path} cannot be written: {error.strerror}.") from error


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's content atomically."""
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def write_text(path: Path, text: str) -> None:
    """
    Write a text file atomically.

    Names of files that are not UTF-8, the only text that cannot be written as it is, are written with escapes, as in
    JSON.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def locked(lock: Path, what: str, advice: str) -> Iterator[None]:
    """
    Hold a lock, so that no other process does the same meanwhile.

    Args:
        lock: the file that carries it, which stays.
        what: is being written, for the error.
        advice: what to do instead, for the error.

    Raises:
        OSError: while another process holds it.
    """
    holding = FileLock(lock, timeout=LOCK_SECONDS)
    try:
        holding.acquire()
    except Timeout as error:
        raise OSError(f"{what} is being written by another process; {advice}.") from error
    try:
        yield
    finally:
        holding.release()


def read_json_lines(path: Path, ignore_unfinished: bool = False) -> list[dict[str, Any]]:
    """
    Return the rows of a JSON Lines file.

    Args:
        ignore_unfinished: ignore a last line without a line end: its writer is still at work, or was interrupted.

    Raises:
        ValueError: a line is not a JSON object; the message has its number.
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
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {number} is damaged: it is no object.")
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


def mend_json_lines(path: Path, is_right: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """
    Take out of a JSON Lines file what is damaged, and return the rows that are left.

    An unfinished last line is what an interruption leaves; a warning names the number of other lines that go.

    Args:
        path: of a file that nobody else writes; a missing one has no rows.
        is_right: whether a row belongs into the file. It is asked once for each, in order.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    *lines, unfinished = content.split(b"\n")
    kept, rows = [], []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if is_right(row):
            kept.append(line + b"\n")
            rows.append(row)
    if len(kept) < len(lines):
        logger.warning(
            "%s: %s of %s lines were damaged, twice or of something else, and are taken out.",
            *(path, len(lines) - len(kept), len(lines)),
        )
    if unfinished or len(kept) < len(lines):
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))
    return rows


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
