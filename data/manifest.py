"""Manifests: one JSON object a line, one utterance each."""

import json
import os
from collections.abc import Iterable
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


def read_manifest(path: str | Path, split: str | None = None, corpus: str | None = None) -> list[Utterance]:
    """
    Read a manifest (JSON Lines with `audio`, `text`, and optionally `duration`, `speaker`, `corpus`, `split`), or the
    `metadata.jsonl` of a `datasets` audiofolder, whose names for the first and third are `file_name` and `seconds`.
    Audio paths are relative to the manifest; a duration that is not stated is read from the recording's header.

    Args:
        split, corpus: keep only these.

    Raises:
        FileNotFoundError: no such manifest.
        ValueError: a line that is not JSON or lacks a field (named with its line number), or nothing left.
    """
    path = Path(path)
    path = path / "metadata.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest.")
    utterances = []
    # Lines end with \n only: a JSON string may hold other characters that `splitlines` cuts at, such as U+2028.
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                utterance = Utterance(
                    audio=path.parent / (row["audio"] if "audio" in row else row["file_name"]),
                    text=row["text"],
                    duration=_duration(row, path.parent),
                    speaker=row.get("speaker", ""),
                    corpus=row.get("corpus", ""),
                    split=row.get("split", ""),
                )
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
            except KeyError as error:
                raise ValueError(f"{path}, line {number} lacks the field {error}.") from error
            except (TypeError, ValueError, soundfile.LibsndfileError) as error:
                raise ValueError(f"{path}, line {number}: {error}.") from error
            if split in (None, utterance.split) and corpus in (None, utterance.corpus):
                utterances.append(utterance)
    if not utterances:
        raise ValueError(f"{path} holds no utterance" + (f" of split {split!r}." if split else "."))
    return utterances


def _duration(row: dict, folder: Path) -> float:
    """Seconds, as stated or else as the header of the recording says."""
    for name in ("duration", "seconds"):
        if name in row:
            return float(row[name])
    return soundfile.info(folder / (row["audio"] if "audio" in row else row["file_name"])).duration


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
