"""What the readers of corpora yield, and what they share."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NO_TRANSCRIPT = "no transcript"
BAD_LINE = "bad line"
# A segment that the corpus itself excludes from scoring: nothing is wrong with it.
NOT_SCORED = "not scored"

# Names that corpora on the Hub and audiofolders give to the transcript and to the speaker, the most usual first.
TEXT_NAMES = ("text", "transcription", "transcript", "sentence")
SPEAKER_NAMES = ("speaker", "speaker_id", "client_id")


@dataclass(frozen=True)
class Found:
    """
    An utterance as a corpus states it, not checked.

    Args:
        id: its name in the corpus; two utterances must not have the same.
        audio: the file that holds it; where `contents` is given, only the name that the corpus gives to it.
        text: its transcript. Bytes that are not UTF-8 are kept as lone surrogates (PEP 383).
        speaker, corpus, split: as in a manifest.
        segment: start and end in seconds, where it is a part of the file.
        contents: bytes of the audio file, where the corpus holds no files.
        sampling_rate: that the corpus promises, in Hz.
    """

    id: str
    audio: Path
    text: str
    speaker: str
    corpus: str
    split: str
    segment: tuple[float, float] | None = None
    contents: bytes | None = None
    sampling_rate: int | None = None


@dataclass(frozen=True)
class LeftOut:
    """
    Args:
        name: of what is left out: the id of an utterance, a file, or a line of a file.
        reason: why, in words that are the same for all that have it.
        detail: what is particular to this one.
    """

    name: str
    reason: str
    detail: str = ""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """
    Numbered lines of a transcript file that are not blank. One with bytes that are not UTF-8 does not cost the others:
    they come as lone surrogates, which the check of the text finds.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def require_folder(source: str | Path) -> Path:
    """The folder as an absolute path. Raises `FileNotFoundError` when there is none."""
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"{source}: no such folder.")
    return folder.absolute()


def chosen(available: Iterable[str], splits: Sequence[str], source: str | Path) -> list[str]:
    """The splits asked for, or all. Raises `ValueError` for one that the corpus does not have."""
    available = list(available)
    for split in splits:
        if split not in available:
            raise ValueError(f"{source} has no split {split!r}; it has {', '.join(available)}.")
    return [split for split in available if split in splits or not splits]
