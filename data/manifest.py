"""Read and write manifests: JSON Lines files with one utterance a line."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import soundfile

from seam.data.files import replacing

CASINGS: dict[str, Callable[[str], str]] = {"lower": str.lower, "upper": str.upper, "keep": str}


class AudioBytes(Protocol):
    """A recording that is no file of its own: one in a tar file, or in memory. Its string is its name."""

    def read(self) -> bytes:
        """Return the content of the audio file."""


@dataclass(frozen=True)
class Utterance:
    """
    A recording with its transcript.

    Args:
        audio: path of the recording, or something that reads it.
        text: its transcript; empty where nothing is said.
        duration: in seconds.
        speaker, corpus, split: labels to select and to report by; empty where unknown.
    """

    audio: Path | AudioBytes
    text: str
    duration: float
    speaker: str = ""
    corpus: str = ""
    split: str = ""


def read_manifest(
    path: str | Path, split: str | None = None, corpus: str | None = None, needs_text: bool = True
) -> list[Utterance]:
    """
    Read a manifest.

    A line has the fields `audio` and `text` and may have `duration`, `speaker`, `corpus` and `split`. Where nothing is
    said, `text` is `""`: silence and noise are trained and scored as any other utterance. In the
    `metadata.jsonl` of a `datasets` audiofolder, `file_name` and `seconds` may stand for `audio` and `duration`. Audio
    paths are relative to the manifest. A duration that is not stated is read from the recording's header.

    Args:
        path: the manifest, or a folder with a `metadata.jsonl`.
        split, corpus: read only the utterances with these labels.
        needs_text: whether a line without `text` is an error, as it is not in a manifest of noise.

    Raises:
        FileNotFoundError: no such manifest.
        ValueError: a line is not JSON or lacks a field (the message has its number), or no utterance is left.
    """
    utterances = list(iter_manifest(path, split, corpus, needs_text))
    if not utterances:
        raise ValueError(f"{manifest_file(path)} holds no utterance" + (f" of split {split!r}." if split else "."))
    return utterances


def manifest_file(path: str | Path) -> Path:
    """Return the path of the manifest, which may be that of its folder, or raise `FileNotFoundError`."""
    path = Path(path)
    path = path / "metadata.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest.")
    return path


def iter_manifest(
    path: str | Path, split: str | None = None, corpus: str | None = None, needs_text: bool = True
) -> Iterator[Utterance]:
    """Yield what `read_manifest` returns, one by one; a manifest without utterances is no error here."""
    path = manifest_file(path)
    # Lines end with \n only: a JSON string may contain characters that `splitlines` splits at, such as U+2028.
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                audio = path.parent / (row["audio"] if "audio" in row else row["file_name"])
                text = row["text"] if needs_text else row.get("text", "")
                if needs_text and not isinstance(text, str):
                    raise TypeError(f"text is {json.dumps(text)}; accepted: a string, empty where nothing is said")
                duration = stated_duration(row)
                duration = soundfile.info(audio).duration if duration is None else duration
                utterance = Utterance(audio, text, duration, **optional_fields(row))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
            except KeyError as error:
                raise ValueError(f"{path}, line {number} lacks the field {error}.") from error
            except (TypeError, ValueError, soundfile.LibsndfileError) as error:
                raise ValueError(f"{path}, line {number}: {error}.") from error
            if split in (None, utterance.split) and corpus in (None, utterance.corpus):
                yield utterance


def stated_duration(row: dict[str, Any]) -> float | None:
    """Return the duration in seconds that a line states, or `None`."""
    return next((float(row[name]) for name in ("duration", "seconds") if name in row), None)


def optional_fields(row: dict[str, Any]) -> dict[str, str]:
    """Return the labels of an utterance, empty where a line has none."""
    return {name: row.get(name, "") for name in ("speaker", "corpus", "split")}


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> Path:
    """
    Write a manifest atomically, with audio paths relative to it.

    When `utterances` raises, an older manifest stays as it was.

    Raises:
        ValueError: an utterance whose audio is not a file.
    """
    path = Path(path)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for one in utterances:
            if not isinstance(one.audio, Path):
                raise ValueError(f"{one.audio} cannot be in a manifest: it is not a file.")
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
