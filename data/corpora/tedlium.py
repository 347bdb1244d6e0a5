"""TED-LIUM 2 and 3: SPLIT/stm/TALK.stm has the transcripts of the segments of SPLIT/sph/TALK.sph."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from seam.data.corpora.utterances import (
    BAD_LINE,
    NO_TRANSCRIPT,
    NOT_SCORED,
    CorpusUtterance,
    Exclusion,
    numbered_lines,
    require_folder,
    select_splits,
)

SAMPLING_RATE = 16000
SPLITS = ("train", "dev", "test")
IGNORED = "ignore_time_segment_in_scoring"
GAP = "inter_segment_gap"
MAX_SECONDS = 1e6  # 11 days; a talk has minutes
# Segments follow each other without a gap, with times rounded to 10 ms: a larger overlap is an error of the corpus.
OVERLAP_SECONDS = 0.1

# `<o,f0,male>`, or `<F0_M>` in the first releases; not a word such as `<unk>`.
LABEL = re.compile(r"<([^<>]*,[^<>]*|F\d_[MF])>")
# Not words: `<unk>`, `<sil>`, `{NOISE}`, `[NOISE]`.
NOT_A_WORD = re.compile(r"<[^<>]*>|\{[^{}]*\}|\[[^\[\]]*\]")
# The number of a pronunciation: `read(2)`.
VARIANT = re.compile(r"\(\d+\)$")
UTTERANCE_NAME = re.compile(r"\(\S+\)")
# Words that begin with an apostrophe; any other apostrophe was cut off the word before it: `it 's`, `students '`.
ELISIONS = {"'bout", "'cause", "'em", "'n", "'round", "'til", "'till", "'tis", "'twas"}


@dataclass(frozen=True)
class Segment:
    """One line of an STM file; times in seconds."""

    talk: str
    speaker: str
    start: float
    end: float
    words: list[str]

    @property
    def id(self) -> str:
        """Name the segment by talk, start and end in hundredths of a second, as Kaldi's recipes do."""
        return f"{self.talk}-{round(self.start * 100):07d}-{round(self.end * 100):07d}"


def read(source: str | Path, splits: Sequence[str] = ()) -> Iterator[CorpusUtterance | Exclusion]:
    """
    Yield the utterances of TED-LIUM.

    Args:
        source: release 2, or release 3, of which the `legacy` splits are read, or one split of either.
        splits: of `train`, `dev` and `test`; all by default.

    Yields:
        The segments of each talk in temporal order. Segments that are not scored, segments that begin before the one
        before them ends, and recordings without an STM file are excluded.

    Raises:
        FileNotFoundError: no such folder; ValueError: another layout, or no such split.
    """
    folder = require_folder(source)
    folders = _splits(folder)
    if not folders:
        raise ValueError(
            f"{source} is not TED-LIUM as unpacked: looked for {{{','.join(SPLITS)}}}/stm/*.stm in it and in legacy/ "
            "below it, and for stm/*.stm."
        )
    for split in select_splits(folders, splits, source):
        yield from _split(folders[split], split)


def _splits(folder: Path) -> dict[str, Path]:
    if any(folder.glob("stm/*.stm")):
        return {folder.name: folder}
    parent = folder / "legacy" if (folder / "legacy").is_dir() else folder
    return {name: parent / name for name in SPLITS if any((parent / name).glob("stm/*.stm"))}


def _split(folder: Path, split: str) -> Iterator[CorpusUtterance | Exclusion]:
    talks = set()
    for path in sorted(folder.glob("stm/*.stm")):
        talks.add(path.stem)
        yield from _talk(path, folder / "sph", split)
    for recording in sorted(folder.glob("sph/*.sph")):
        if recording.stem not in talks:
            yield Exclusion(recording.stem, NO_TRANSCRIPT, f"no {recording.stem}.stm in {folder / 'stm'}")


def _talk(path: Path, recordings: Path, split: str) -> Iterator[CorpusUtterance | Exclusion]:
    segments = []
    for number, line in numbered_lines(path):
        if line.startswith(";;"):
            continue
        try:
            segments.append(parse(line))
        except ValueError as error:
            yield Exclusion(f"{path.name}, line {number}", BAD_LINE, f"{error}: {line!r}")
    last_end = 0.0
    for one in sorted(segments, key=lambda segment: segment.start):
        if one.speaker == GAP or [word.lower() for word in one.words[:1]] == [IGNORED]:
            yield Exclusion(one.id, NOT_SCORED)
            continue
        if one.start < last_end - OVERLAP_SECONDS:
            detail = f"begins at {one.start:.2f} s, but the segment before it ends at {last_end:.2f} s"
            yield Exclusion(one.id, "overlapping segment", detail)
            continue
        last_end = max(last_end, one.end)
        yield CorpusUtterance(
            id=one.id,
            audio=recordings / f"{one.talk}.sph",
            text=transcript(one.words),
            speaker=one.speaker,
            corpus="tedlium",
            split=split,
            segment=(one.start, one.end),
            sampling_rate=SAMPLING_RATE,
        )


def parse(line: str) -> Segment:
    """
    Parse a line `talk channel speaker start end [<label>] words …`, NIST's segment time mark format.

    Raises:
        ValueError: too few fields, or not an interval of time.
    """
    fields = line.split()
    if len(fields) < 5:
        raise ValueError("fewer fields than talk, channel, speaker, start and end")
    talk, _, speaker, *times = fields[:5]
    try:
        start, end = map(float, times)
    except ValueError:
        raise ValueError("start or end is not a number") from None
    if not 0 <= start < end < MAX_SECONDS:
        raise ValueError("start and end are not an interval of time")
    words = fields[5:]
    return Segment(talk, speaker, start, end, words[1:] if words and LABEL.fullmatch(words[0]) else words)


def transcript(words: Sequence[str]) -> str:
    """
    Join words to a transcript in the usual spelling.

    Apostrophes are joined to the word before them (`it 's`), as Kaldi's recipes for TED-LIUM and the Whisper normaliser
    do. Marks of noise, of unintelligible words and of pronunciations are removed, and so is the name of the utterance
    that some releases append.
    """
    if words and UTTERANCE_NAME.fullmatch(words[-1]):
        words = words[:-1]
    joined: list[str] = []
    for word in words:
        word = VARIANT.sub("", word)
        if not word or NOT_A_WORD.fullmatch(word):
            continue
        if joined and word.startswith("'") and word not in ELISIONS:
            joined[-1] += word
        else:
            joined.append(word)
    return " ".join(joined)
