"""LibriSpeech as OpenSLR packs it: SUBSET/SPEAKER/CHAPTER, with SPEAKER-CHAPTER.trans.txt and a .flac per utterance."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from seam.data.corpora.utterances import (
    NO_TRANSCRIPT,
    CorpusUtterance,
    Exclusion,
    numbered_lines,
    require_folder,
    select_splits,
)

SAMPLING_RATE = 16000


def read(source: str | Path, splits: Sequence[str] = ()) -> Iterator[CorpusUtterance | Exclusion]:
    """
    Yield the utterances of LibriSpeech.

    Args:
        source: the folder of the archive, its folder `LibriSpeech`, or one subset such as `test-other`.
        splits: subsets to read; all by default.

    Yields:
        The utterances in the order of the transcripts; recordings without a transcript are excluded.

    Raises:
        FileNotFoundError: no such folder; ValueError: another layout, or no such subset.
    """
    folder = require_folder(source)
    subsets = _subsets(folder)
    if not subsets:
        raise ValueError(
            f"{source} is not LibriSpeech as unpacked from OpenSLR: looked for SUBSET/SPEAKER/CHAPTER/*.trans.txt "
            "in it, in LibriSpeech/ below it, and for SPEAKER/CHAPTER/*.trans.txt."
        )
    for split in select_splits(subsets, splits, source):
        for chapter in sorted(path for path in subsets[split].glob("*/*") if path.is_dir()):
            yield from _chapter(chapter, split)


def _subsets(folder: Path) -> dict[str, Path]:
    if any(folder.glob("*/*/*.trans.txt")):
        return {folder.name: folder}
    parent = folder / "LibriSpeech" if (folder / "LibriSpeech").is_dir() else folder
    return {path.name: path for path in sorted(parent.iterdir()) if any(path.glob("*/*/*.trans.txt"))}


def _chapter(chapter: Path, split: str) -> Iterator[CorpusUtterance | Exclusion]:
    named = set()
    for transcripts in sorted(chapter.glob("*.trans.txt")):
        for _, line in numbered_lines(transcripts):
            id, *rest = line.split(maxsplit=1)
            named.add(id)
            yield CorpusUtterance(
                id=id,
                audio=chapter / f"{id}.flac",
                text="".join(rest),
                speaker=chapter.parent.name,
                corpus="librispeech",
                split=split,
                sampling_rate=SAMPLING_RATE,
            )
    for recording in sorted(chapter.glob("*.flac")):
        if recording.stem not in named:
            yield Exclusion(recording.stem, NO_TRANSCRIPT, f"no *.trans.txt in {chapter} names it")
