"""Read and write manifests: JSON Lines files with one utterance a line."""

import codecs
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import soundfile

from seam.data.files import replacing

CASINGS: dict[str, Callable[[str], str]] = {"lower": str.lower, "upper": str.upper, "keep": str}
# Names of one field, in the order in which messages give them: ours, NeMo's, and those of a `datasets` audiofolder.
NEMO_AUDIO = "audio_filepath"
AUDIO_NAMES = ("audio", NEMO_AUDIO, "file_name")
DURATION_NAMES = ("duration", "seconds")
DURATION_TOLERANCE_SECONDS = 1.0
DURATION_TOLERANCE = 0.1
MAX_DURATION_SECONDS = 1e9  # 30 years: what is above is no duration
MAX_SHOWN = 60


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
    said, `text` is `""`: silence and noise are trained and scored as any other utterance. `file_name` and `seconds`, as
    in the `metadata.jsonl` of a `datasets` audiofolder, may stand for `audio` and `duration`, and so may NeMo's
    `audio_filepath` for `audio`. Audio paths are relative to the manifest. A duration that is not stated is read from
    the recording's header.

    Args:
        path: the manifest, or a folder with a `metadata.jsonl`.
        split, corpus: read only the utterances with these labels.
        needs_text: whether a line without `text` is an error, as it is not in a manifest of noise.

    Raises:
        FileNotFoundError: no such manifest.
        ValueError: a line is not JSON in UTF-8, or a field is missing or not what it must be (the message names line
            and field), or no utterance is left.
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
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = parse_row(line)
                audio = path.parent / _audio_name(row)
                fields = utterance_fields(row, needs_text)
                duration = fields.pop("duration")
                duration = soundfile.info(audio).duration if duration is None else duration
            except (TypeError, ValueError, soundfile.LibsndfileError) as error:
                raise ValueError(f"{path}, line {number}: {str(error).rstrip('.')}.") from error
            utterance = Utterance(audio, duration=duration, **fields)
            if split in (None, utterance.split) and corpus in (None, utterance.corpus):
                yield utterance


def parse_row(content: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8, or raise a `ValueError` that says what is wrong with it."""
    try:
        row = json.loads(content.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8, which is the only encoding that is read") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: it is nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"{_shown(row)} is no JSON object; accepted: one object with the fields of an utterance")
    return row


def utterance_fields(row: dict[str, Any], needs_text: bool = True) -> dict[str, Any]:
    """
    Return what a row states of an utterance beside its audio, checked.

    Args:
        row: a JSON object, of a manifest or beside the audio in a shard.
        needs_text: see `read_manifest`.

    Returns:
        `text`, `duration` (`None` where none is stated), `speaker`, `corpus` and `split`. A label that is a whole
        number, as ids of speakers often are, is returned as its digits, one that is `null` as an empty string.

    Raises:
        ValueError: a field is missing or not what it must be; the message names it and what is accepted.
    """
    fields: dict[str, Any] = {"text": "", "duration": _duration(row)}
    if needs_text:
        if "text" not in row:
            raise ValueError("it lacks the field 'text'")
        fields["text"] = check_text("text", row["text"], "a string, empty where nothing is said")
    for name in ("speaker", "corpus", "split"):
        value = row.get(name)
        if value is None:
            value = ""
        elif isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        fields[name] = check_text(name, value, "a string")
    return fields


def check_text(name: str, value: Any, accepted: str) -> str:
    """Return a string that can be tokenized and written, or raise a `ValueError` that names the field."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_shown(value)}; accepted: {accepted}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        raise ValueError(
            f"{name} has {half} as character {error.start + 1}, half of a surrogate pair; accepted: whole characters"
        ) from error
    return value


def check_duration(utterance: Utterance, seconds: float) -> None:
    """
    Raise `ValueError` for a recording that is not as long as its utterance says, as where a row means a part of a file.

    Batches, budgets and the encoder's window are planned by what is stated. Stated durations are often rounded, and 0
    where they are unknown: they may be off by a second, or by a tenth.
    """
    off = abs(seconds - utterance.duration)
    if utterance.duration and off > max(DURATION_TOLERANCE_SECONDS, DURATION_TOLERANCE * utterance.duration):
        raise ValueError(
            f"the recording has {seconds:.2f} s, but its duration is stated as {utterance.duration:.2f} s; accepted: "
            "the duration of the whole file, or none."
        )


def _audio_name(row: dict[str, Any]) -> str:
    name, value = _only(row, AUDIO_NAMES)
    if name is None:
        raise ValueError(f"it lacks the field 'audio' (or {', '.join(map(repr, AUDIO_NAMES[1:]))})")
    audio = check_text(name, value, "the path of a recording")
    if not audio.strip() or "\0" in audio:
        raise ValueError(f"{name} is {_shown(audio)}; accepted: the path of a recording")
    if name == NEMO_AUDIO and row.get("offset"):  # without it, the transcript of a part would be that of the whole file
        raise ValueError(
            f"offset is {_shown(row['offset'])}; accepted: 0; seam data prepare audiofolder cuts the parts"
        )
    return audio


def _duration(row: dict[str, Any]) -> float | None:
    name, value = _only(row, DURATION_NAMES)
    if name is None:
        return None
    accepted = isinstance(value, int | float) and not isinstance(value, bool)
    if not accepted or not 0 < value <= MAX_DURATION_SECONDS:  # NaN compares with nothing
        raise ValueError(f"{name} is {_shown(value)}; accepted: a number of seconds above 0")
    return float(value)


def _only(row: dict[str, Any], names: Sequence[str]) -> tuple[str | None, Any]:
    """Return the one of some equivalent fields that a row has, with its value; raise for two that differ."""
    given = [name for name in names if row.get(name) is not None]
    for name in given[1:]:
        if row[name] != row[given[0]]:
            values = f"{_shown(row[given[0]])} and {_shown(row[name])}"
            raise ValueError(f"{given[0]} and {name} are {values}; accepted: one of them")
    return (given[0], row[given[0]]) if given else (None, None)


def _shown(value: Any) -> str:
    """Return a value as JSON, cut where it is long."""
    shown = json.dumps(value)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"


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
