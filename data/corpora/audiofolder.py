"""A folder of recordings with `metadata.jsonl` or `metadata.csv`, as `datasets` reads it, or a manifest of ours."""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

from seam.data.corpora.utterances import (
    BAD_LINE,
    NO_TRANSCRIPT,
    SPEAKER_NAMES,
    TEXT_NAMES,
    CorpusUtterance,
    Exclusion,
    numbered_lines,
)
from seam.data.manifest import NEMO_AUDIO

METADATA = ("metadata.jsonl", "metadata.csv")
AUDIO_NAMES = ("file_name", "audio", NEMO_AUDIO)
MAX_SECONDS = 1e6  # 11 days
MAX_FIELD_LINES = 100  # of one field of CSV
_SPLITS = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}


def read(source: str | Path, splits: Sequence[str] = ()) -> Iterator[CorpusUtterance | Exclusion]:
    """
    Yield the utterances of an audiofolder or of a manifest.

    Args:
        source: a folder with metadata in it or in folders below it, a metadata file, or a manifest. Its columns are
            `file_name` (or `audio`), relative to it; `text`, `transcription`, `transcript` or `sentence`; and, where
            known, `speaker`, `corpus` and `split`.
        splits: keep only these. Without a column `split`, a recording below a folder `train`, `validation`, `dev`, …
            is of the split that `datasets` gives to it.

    Yields:
        The utterances of the metadata; recordings of a folder without metadata are excluded.

    Raises:
        FileNotFoundError: no such folder or file; ValueError: no metadata, or in a format that is not known.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder or manifest.")
    root = source.absolute() if source.is_dir() else source.absolute().parent
    files = sorted(path for name in METADATA for path in source.rglob(name)) if source.is_dir() else [source.absolute()]
    if not files:
        raise ValueError(f"{source} is no audiofolder: looked for {' or '.join(METADATA)} in it and in its folders.")
    named = set()
    for path in files:
        path = path.absolute()
        for number, row in _rows(path):
            one = _utterance(row, path, root) if isinstance(row, dict) else row
            if isinstance(one, Exclusion):
                yield replace(one, name=f"{path.relative_to(root)}, line {number}")
                continue
            named.add(one.audio)
            if not splits or one.split in splits:
                yield one
    if source.is_dir() and not splits:
        for recording in sorted(root.rglob("*")):
            if recording.suffix.lower() in AudioFolder.EXTENSIONS and recording not in named:
                yield Exclusion(str(recording.relative_to(root)), NO_TRANSCRIPT, "no line of the metadata names it")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | Exclusion]]:
    """Yield rows with their line numbers; an `Exclusion` without a name for a line that is no row."""
    if path.suffix == ".csv":
        yield from _csv_rows(path)
    elif path.suffix in (".jsonl", ".json"):
        for number, line in numbered_lines(path):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and nesting, as well
                yield number, Exclusion("", BAD_LINE, f"not JSON: {error}")
                continue
            yield number, row if isinstance(row, dict) else Exclusion("", BAD_LINE, f"not an object: {row!r:.200}")
    else:
        raise ValueError(f"{path}: metadata are read from .jsonl and .csv.")


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | Exclusion]]:
    """
    Yield the rows of a CSV file with the number of their last line.

    A field in quotation marks may have several lines. A mark that is not closed would take all lines to the next one
    into its field: a row is the fewest lines that have as many columns as the header, and where there are none such,
    it is one bad line.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = file.readlines()
    header = _fields(lines[:1]) or []
    number = 1
    while number < len(lines):
        first = _fields(lines[number : number + 1])
        taken, fields = 1, first
        while fields is None and taken < min(MAX_FIELD_LINES, len(lines) - number):
            taken += 1
            fields = _fields(lines[number : number + taken])
            fields = fields if fields is None or len(fields) == len(header) else None
        if fields is None:
            yield (
                number + 1,
                Exclusion("", BAD_LINE, "a quotation mark that is not closed, or a field of 128 kB and more"),
            )
            number += 1
            continue
        number += taken
        if not fields:
            continue
        row = dict(zip(header, fields, strict=False))
        detail = f"{len(fields)} columns instead of {len(header)}"
        yield number, row if len(fields) == len(header) else Exclusion("", BAD_LINE, detail)


def _fields(lines: list[str]) -> list[str] | None:
    """Return the fields of one row of CSV; `None` for lines that are not one row."""
    try:
        rows = list(csv.reader(lines, strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else [] if not rows else None


def _utterance(row: dict[str, Any], path: Path, root: Path) -> CorpusUtterance | Exclusion:
    """Return the utterance of a row; an `Exclusion` without a name for a row that lacks a field."""
    audio, text = (next((row[name] for name in names if name in row), None) for names in (AUDIO_NAMES, TEXT_NAMES))
    if not isinstance(audio, str) or not isinstance(text, str):
        names = TEXT_NAMES if isinstance(audio, str) else AUDIO_NAMES
        return Exclusion("", BAD_LINE, f"no string in a field {' or '.join(names)}")
    segment = _segment(row) if row.get(NEMO_AUDIO) == audio else None
    if isinstance(segment, Exclusion):
        return segment
    speaker = next((row[name] for name in SPEAKER_NAMES if row.get(name) not in (None, "")), "")
    file = Path(os.path.normpath(path.parent / audio))
    return CorpusUtterance(
        id=(audio if path.parent == root else str(path.parent.relative_to(root) / audio)) + _part(segment),
        audio=file,
        text=text,
        speaker=str(speaker),
        corpus=str(row.get("corpus") or root.name),
        split=str(row.get("split") or _split(file, root)),
        segment=segment,
    )


def _segment(row: dict[str, Any]) -> tuple[float, float] | Exclusion | None:
    """Return start and end of the part of a recording that a row of NeMo means; `None` for the whole."""
    if not row.get("offset"):
        return None
    start, seconds = row["offset"], row.get("duration")
    for value in (start, seconds):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_SECONDS:
            return Exclusion("", BAD_LINE, f"offset {start!r} and duration {seconds!r} are not seconds above 0")
    return float(start), float(start) + float(seconds)  # type: ignore[arg-type] # they are numbers, see above


def _part(segment: tuple[float, float] | None) -> str:
    """Return what tells the parts of a recording apart in ids."""
    return "" if segment is None else f"-{segment[0]:.2f}-{segment[1]:.2f}"


def _split(file: Path, root: Path) -> str:
    """Return the split that the folders of a recording name, the outermost first, or an empty string."""
    folders = file.relative_to(root).parts[:-1] if file.is_relative_to(root) else ()
    for folder in folders:
        for word in re.split(r"[-._ \d]+", folder.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""
