"""TED-LIUM 2 and 3: SPLIT/stm/TALK.stm says which words are in which segment of SPLIT/sph/TALK.sph."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from seam.data.corpora.found import BAD_LINE, NO_TRANSCRIPT, NOT_SCORED, Found, LeftOut, chosen, lines, require_folder

SAMPLING_RATE = 16000
SPLITS = ("train", "dev", "test")
IGNORED = "ignore_time_segment_in_scoring"
GAP = "inter_segment_gap"
# Segments follow each other without a gap, with times rounded to 10 ms: more than this is one that is in two places.
OVERLAP_SECONDS = 0.1

# `<o,f0,male>`, or `<F0_M>` in the first releases; not a word such as `<unk>`.
LABEL = re.compile(r"<([^<>]*,[^<>]*|F\d_[MF])>")
# `<unk>`, `<sil>`, `{NOISE}`, `[NOISE]`: not words. The number of a pronunciation: `read(2)`.
NOT_A_WORD = re.compile(r"<[^<>]*>|\{[^{}]*\}|\[[^\[\]]*\]")
VARIANT = re.compile(r"\(\d+\)$")
UTTERANCE_NAME = re.compile(r"\(\S+\)")
# Words that begin with an apostrophe; all other apostrophes were cut off the word before them: `it 's`, `students '`.
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
        """Talk, start and end in hundredths of a second, as Kaldi's recipes name it."""
        return f"{self.talk}-{round(self.start * 100):07d}-{round(self.end * 100):07d}"


def read(source: str | Path, splits: Sequence[str] = ()) -> Iterator[Found | LeftOut]:
    """
    Args:
        source: release 2, or release 3, of which the `legacy` splits are read, or one split of either.
        splits: of `train`, `dev` and `test`; all by default.

    Yields:
        The segments of each talk in the order of time. A segment that is not scored, or that begins before the one
        before it ends, is left out; so is a recording without an STM file.

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
    for split in chosen(folders, splits, source):
        yield from _split(folders[split], split)


def _splits(folder: Path) -> dict[str, Path]:
    if any(folder.glob("stm/*.stm")):
        return {folder.name: folder}
    parent = folder / "legacy" if (folder / "legacy").is_dir() else folder
    return {name: parent / name for name in SPLITS if any((parent / name).glob("stm/*.stm"))}


def _split(folder: Path, split: str) -> Iterator[Found | LeftOut]:
    talks = set()
    for path in sorted(folder.glob("stm/*.stm")):
        talks.add(path.stem)
        yield from _talk(path, folder / "sph", split)
    for recording in sorted(folder.glob("sph/*.sph")):
        if recording.stem not in talks:
            yield LeftOut(recording.stem, NO_TRANSCRIPT, f"no {recording.stem}.stm in {folder / 'stm'}")


def _talk(path: Path, recordings: Path, split: str) -> Iterator[Found | LeftOut]:
    segments = []
    for number, line in lines(path):
        if line.startswith(";;"):
            continue
        try:
            segments.append(parse(line))
        except ValueError as error:
            yield LeftOut(f"{path.name}, line {number}", BAD_LINE, f"{error}: {line!r}")
    heard_until = 0.0
    for one in sorted(segments, key=lambda segment: segment.start):
        if one.speaker == GAP or [word.lower() for word in one.words[:1]] == [IGNORED]:
            yield LeftOut(one.id, NOT_SCORED)
            continue
        if one.start < heard_until - OVERLAP_SECONDS:
            detail = f"begins at {one.start:.2f} s, where a segment goes on to {heard_until:.2f} s"
            yield LeftOut(one.id, "overlapping segment", detail)
            continue
        heard_until = max(heard_until, one.end)
        yield Found(
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
    `talk channel speaker start end [<label>] words …`, the segment time mark format of NIST's scoring toolkit.

    Raises:
        ValueError: too few fields, or times that are not a stretch of time.
    """
    fields = line.split()
    if len(fields) < 5:
        raise ValueError("fewer fields than talk, channel, speaker, start and end")
    talk, _, speaker, *times = fields[:5]
    try:
        start, end = map(float, times)
    except ValueError:
        raise ValueError("start or end is not a number") from None
    if not 0 <= start < end < math.inf:
        raise ValueError("start and end are not a stretch of time")
    words = fields[5:]
    return Segment(talk, speaker, start, end, words[1:] if words and LABEL.fullmatch(words[0]) else words)


def transcript(words: Sequence[str]) -> str:
    """
    The words as they are written elsewhere: apostrophes joined to the word that they were cut off (`it 's`), without
    marks of noise, of words that nobody understood and of pronunciations, and without the name of the utterance that
    stands at the end in some releases. Kaldi's recipes for TED-LIUM and the Whisper normaliser join in the same way.
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
