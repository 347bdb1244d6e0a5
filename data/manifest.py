"""Manifests: one JSON object a line, one utterance each."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import soundfile

from seam.data.files import replacing

CASINGS = {"lower": str.lower, "upper": str.upper, "keep": str}


@dataclass(frozen=True)
class Utterance:
    """
    Args:
        audio: path of the recording.
        text: its transcript.
        duration: seconds.
        speaker, corpus, split: labels to select and to report by; empty where unknown.
    """

    audio: Path
    text: str
    duration: float
    speaker: str = ""
    corpus: str = ""
    split: str = ""


def read_manifest(
    path: str | Path, split: str | None = None, corpus: str | None = None, needs_text: bool = True
) -> list[Utterance]:
    """
    Read a manifest (JSON Lines with `audio`, `text`, and optionally `duration`, `speaker`, `corpus`, `split`), or the
    `metadata.jsonl` of a `datasets` audiofolder, whose names for the first and third are `file_name` and `seconds`.
    Audio paths are relative to the manifest; a duration that is not stated is read from the recording's header.

    Args:
        split, corpus: keep only these.
        needs_text: whether a line without `text` is an error; it is none in a manifest of noise.

    Raises:
        FileNotFoundError: no such manifest.
        ValueError: a line that is not JSON or lacks a field (named with its line number), or nothing left.
    """
    utterances = list(utterances_of(path, split, corpus, needs_text))
    if not utterances:
        raise ValueError(f"{manifest_file(path)} holds no utterance" + (f" of split {split!r}." if split else "."))
    return utterances


def manifest_file(path: str | Path) -> Path:
    """The manifest itself, where a folder is given. Raises `FileNotFoundError`."""
    path = Path(path)
    path = path / "metadata.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest.")
    return path


def utterances_of(
    path: str | Path, split: str | None = None, corpus: str | None = None, needs_text: bool = True
) -> Iterator[Utterance]:
    """One by one what `read_manifest` returns; nothing of a manifest that holds none."""
    path = manifest_file(path)
    # Lines end with \n only: a JSON string may hold other characters that `splitlines` cuts at, such as U+2028.
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                audio = path.parent / (row["audio"] if "audio" in row else row["file_name"])
                text = row["text"] if needs_text else row.get("text", "")
                duration = stated_duration(row)
                duration = soundfile.info(audio).duration if duration is None else duration
                utterance = Utterance(audio, text, duration, **labels(row))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
            except KeyError as error:
                raise ValueError(f"{path}, line {number} lacks the field {error}.") from error
            except (TypeError, ValueError, soundfile.LibsndfileError) as error:
                raise ValueError(f"{path}, line {number}: {error}.") from error
            if split in (None, utterance.split) and corpus in (None, utterance.corpus):
                yield utterance


def stated_duration(row: dict) -> float | None:
    """Seconds, or `None` where a line does not say."""
    return next((float(row[name]) for name in ("duration", "seconds") if name in row), None)


def labels(row: dict) -> dict[str, str]:
    """Those fields of an utterance that a line may leave out."""
    return {name: row.get(name, "") for name in ("speaker", "corpus", "split")}


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> Path:
    """
    Write a manifest with audio paths relative to it, to a temporary name and then renamed. When `utterances` raises,
    an older manifest stays as it was.
    """
    path = Path(path)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for one in utterances:
            row = {
                "audio": os.path.relpath(one.audio, path.parent),
                "text": one.text,
                "duration": round(one.duration, 3),
                "speaker": one.speaker,
                "corpus": one.corpus,
                "split": one.split,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
