"""Utterances as the readers of corpora yield them, and what the readers share."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NO_TRANSCRIPT = "no transcript"
BAD_LINE = "bad line"
OUTSIDE = "outside the corpus"
# The reason for a segment that the corpus itself excludes from scoring: nothing is wrong with it.
NOT_SCORED = "not scored"

# Columns of the transcript and of the speaker in corpora on the Hub and in audiofolders, the most usual first.
TEXT_NAMES = ("text", "transcription", "transcript", "sentence")
SPEAKER_NAMES = ("speaker", "speaker_id", "client_id")


@dataclass(frozen=True)
class CorpusUtterance:
    """
    An utterance as its corpus describes it, before any check.

    Args:
        id: unique within the corpus.
        audio: the audio file; where `contents` is given, only the name that the corpus gives to it.
        text: its transcript. Bytes that are not UTF-8 are kept as lone surrogates (PEP 383).
        speaker, corpus, split: as in a manifest.
        segment: start and end in seconds, where the utterance is a part of the file.
        contents: bytes of the audio file, where the corpus does not consist of files.
        sampling_rate: of all recordings of the corpus, in Hz; `None` where they differ.
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
class Exclusion:
    """
    An utterance that is left out of the manifest, and why.

    Args:
        name: the id of the utterance, a file, or a line of a file.
        reason: in the same words for all utterances that are left out for it.
        detail: the particulars of this one.
    """

    name: str
    reason: str
    detail: str = ""


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """
    Yield the lines of a transcript file that are not blank, with their numbers.

    Bytes that are not UTF-8 become lone surrogates, which the check of the text finds: they do not stop the reader.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def require_folder(source: str | Path) -> Path:
    """Return the folder as an absolute path, or raise `FileNotFoundError`."""
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"{source}: no such folder.")
    return folder.absolute()


def select_splits(available: Iterable[str], splits: Sequence[str], source: str | Path) -> list[str]:
    """Return the requested splits, by default all, or raise `ValueError` for one that the corpus does not have."""
    available = list(available)
    for split in splits:
        if split not in available:
            raise ValueError(f"{source} has no split {split!r}; it has {', '.join(available)}.")
    return [split for split in available if split in splits or not splits]


def outside(path: Path, root: Path) -> bool:
    """
    Return whether a path leaves a folder by `..` or by being absolute.

    Links are followed: whoever unpacked the corpus has put them there.
    """
    return not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


def is_elsewhere(name: str, source: str | Path) -> bool:
    """
    Return whether a path in a row of `datasets` is of another place than its dataset.

    Whoever wrote the rows may have named any file of the reader's machine, or of a service that it has access to. Of a
    dataset in a folder, what is in the folder is its own; of one of the Hub, what is in its repository there or what
    `datasets` and `huggingface_hub` have fetched.

    Args:
        name: a path or a URL, chained ones too (`zip://a.wav::/folder/b.zip`).
        source: the folder or file that was loaded, or a Hub id.
    """
    name = name.rpartition("::")[2]
    if Path(source).exists():
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        return "://" in name or outside(folder / name, folder)
    import datasets
    from huggingface_hub import constants

    if name.startswith((f"hf://datasets/{source}@", f"hf://datasets/{source}/")) and ".." not in name.split("/"):
        return False
    caches = datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE
    return not Path(name).is_absolute() or all(outside(Path(name), Path(cache)) for cache in caches)
