"""Any dataset with an audio and a text column that `datasets` loads from the Hub, a folder or a file."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
from datasets.exceptions import DatasetsError

from seam.data.corpora.utterances import (
    BAD_LINE,
    OUTSIDE,
    SPEAKER_NAMES,
    TEXT_NAMES,
    CorpusUtterance,
    Exclusion,
    is_elsewhere,
    select_splits,
)

AUDIO_NAME = "audio"
# Of the label after a row's number in an id. The label alone is not unique: in some corpora it belongs to a sentence.
MAX_LABEL_CHARACTERS = 80


def read(
    source: str | Path,
    splits: Sequence[str] = (),
    *,
    name: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
    streaming: bool = False,
    allow_remote: bool = False,
) -> Iterator[CorpusUtterance | Exclusion]:
    """
    Yield the utterances of a dataset.

    Args:
        source: Hub id, a folder that `load_dataset` or `load_from_disk` reads, or a Parquet file.
        splits: all by default.
        name: configuration of the dataset, such as `clean`.
        audio_column: by default `audio`, or the only column of the feature type `Audio`.
        text_column: by default `text`, `transcription`, `transcript` or `sentence`.
        streaming: read it row by row, without a copy in the cache.
        allow_remote: read audio that rows name outside the dataset, by path or URL.

    Yields:
        The utterance of each row, with the bytes of its audio file, or with its path where the row has no bytes.

    Raises:
        ValueError: no such split, configuration or column, or a dataset that `datasets` cannot load.
        OSError: no such dataset, or it cannot be reached.
    """
    try:
        for split, rows in _load(str(source), splits, name, streaming):
            columns = _columns(rows, audio_column, text_column, source)
            yield from _rows(rows, split, columns, Path(source), allow_remote)
    except DatasetsError as error:
        raise ValueError(f"datasets cannot read {source}: {error} {error.__cause__ or ''}") from error


def _load(source: str, splits: Sequence[str], name: str | None, streaming: bool) -> Iterable[tuple[str, Any]]:
    path = Path(source)
    arguments = {"path": "parquet", "data_files": source} if path.is_file() else {"path": source, "name": name}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(source)
        loaded = {str(loaded.split or ""): loaded} if isinstance(loaded, datasets.Dataset) else loaded
    elif splits and not streaming:  # the others are not fetched
        return zip(splits, datasets.load_dataset(**arguments, split=list(splits)), strict=True)
    else:
        loaded = datasets.load_dataset(**arguments, streaming=streaming)
    return [(split, loaded[split]) for split in select_splits(loaded, splits, source)]


def _columns(rows: Any, audio: str | None, text: str | None, source: str | Path) -> tuple[str, str]:
    """Return the names of the audio and the text column."""
    available = list(rows.features or next(iter(rows)))
    audios = [name for name in available if isinstance((rows.features or {}).get(name), datasets.Audio)]
    if audio is None and (AUDIO_NAME in available or len(audios) == 1):
        audio = AUDIO_NAME if AUDIO_NAME in available else audios[0]
    text = text or next((name for name in TEXT_NAMES if name in available), None)

    def require(kind: str, column: str | None) -> str:
        if column is None or column not in available:
            wanted = f"no column {column!r}" if column else f"no {kind} column that is known by its name or type"
            raise ValueError(f"{source} has {wanted}; its columns are {', '.join(available)}.")
        return column

    return require("audio", audio), require("text", text)


def _rows(
    rows: Any, split: str, columns: tuple[str, str], source: Path, allow_remote: bool
) -> Iterator[CorpusUtterance | Exclusion]:
    audio_column, text_column = columns
    available = rows.features or next(iter(rows))
    speaker_column = next((name for name in SPEAKER_NAMES if name in available), None)
    further = [name for name in ("id", speaker_column) if name in available]
    folder = source.absolute().parent if source.is_file() else source.absolute()
    rows = rows.select_columns(list(dict.fromkeys([audio_column, text_column, *further])))
    # Decoding needs torchcodec, and would lose the file as it is.
    for number, row in enumerate(rows.cast_column(audio_column, datasets.Audio(decode=False))):
        audio, text = row[audio_column] or {}, row[text_column]
        path = audio.get("path") or ""
        label = re.sub(r"[^\w.-]+", "_", str(row.get("id") or Path(path).stem), flags=re.ASCII)[:MAX_LABEL_CHARACTERS]
        id = f"{split}-{number:06d}" + f"-{label}" * bool(label)
        contents = audio.get("bytes")
        if contents is None and path and not allow_remote and is_elsewhere(path, source):
            yield Exclusion(id, OUTSIDE, f"{path} is not in {source}; --allow-remote reads it")
            continue
        if contents is None and "://" in path:
            try:
                with fsspec.open(path, "rb") as file:
                    contents = file.read()
            except (OSError, ValueError, ImportError) as error:  # of a protocol that is not known, or not installed
                yield Exclusion(id, "cannot be read", f"{path}: {error}")
                continue
        if contents is None and not path:
            yield Exclusion(id, "no audio file", f"{audio_column} is empty")
        elif not isinstance(text, str | None):
            yield Exclusion(id, BAD_LINE, f"{text_column} is {text!r}, not text")
        else:
            speaker = row.get(speaker_column)
            yield CorpusUtterance(
                id=id,
                audio=folder / path,
                text=text or "",
                speaker="" if speaker is None else str(speaker),
                corpus=source.absolute().stem if source.is_file() else source.absolute().name,
                split=split,
                contents=contents,
            )
