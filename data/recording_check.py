"""A recording decoded once, whole, and checked; a segment is cut out. Runs in worker processes: light to import."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from seam.data import checks
from seam.data.checks import Problem

# Segment times are rounded to 10 ms, and the last one may be a little longer than its recording.
END_TOLERANCE_SECONDS = 0.1


@dataclass(frozen=True)
class Recording:
    """
    What to check.

    Args:
        path: of the audio file.
        text: its transcript.
        segment: start and end in seconds, where only a part of the file is meant.
        cut_to: FLAC file to write the segment to.
        sampling_rate: that the header must state, in Hz.
        max_seconds: longest utterance.
    """

    path: Path
    text: str
    segment: tuple[float, float] | None
    cut_to: Path | None
    sampling_rate: int | None
    max_seconds: float


@dataclass(frozen=True)
class Checked:
    """
    Args:
        problem: what is wrong, or `None`.
        seconds: duration, where it could be read.
        digest: of the decoded samples; equal for recordings that sound the same in every sample.
    """

    problem: Problem | None
    seconds: float = 0.0
    digest: bytes = b""


def check(recording: Recording) -> Checked:
    """Never raises for a bad file: what is wrong with it is returned."""
    try:
        return _check(recording)
    except soundfile.LibsndfileError as error:
        return Checked(Problem("cannot be decoded", f"{recording.path}: {error.error_string}"))
    except OSError as error:
        return Checked(Problem("cannot be read", f"{recording.path}: {error.strerror or error}"))


def _check(recording: Recording) -> Checked:
    if not recording.path.is_file():
        return Checked(Problem("no audio file", f"{recording.path} does not exist"))
    if recording.path.stat().st_size == 0:
        return Checked(Problem("empty file", f"{recording.path} has 0 bytes"))
    with soundfile.SoundFile(recording.path) as file:
        rate = file.samplerate
        first, last = 0, file.frames
        if recording.segment is not None:
            start, end = recording.segment
            if end > file.frames / rate + END_TOLERANCE_SECONDS:
                detail = f"{start:.2f} to {end:.2f} s of {recording.path}, which has {file.frames / rate:.2f} s"
                return Checked(Problem("segment after the end", detail))
            first, last = round(start * rate), min(round(end * rate), file.frames)
        stated = (last - first) / rate
        # Before decoding: a book of ten hours must not fill the memory.
        problem = (
            checks.sampling_rate_is(rate, recording.sampling_rate)
            or checks.long_enough(stated)
            or checks.short_enough(stated, recording.max_seconds)
        )
        if problem:
            return Checked(problem, stated)
        file.seek(first)
        samples = file.read(last - first, dtype="float32", always_2d=True)
    seconds = len(samples) / rate
    if seconds < stated:
        return Checked(Problem("truncated", f"{seconds:.2f} s of the {stated:.2f} s that the header states"), seconds)
    waveform = samples.mean(axis=1)
    problem = (
        checks.samples_are_finite(waveform)
        or checks.not_silent(waveform, rate)
        or checks.speaking_rate_is_plausible(recording.text, seconds)
    )
    if problem:
        return Checked(problem, seconds)
    if recording.cut_to is not None:
        _write_flac(recording.cut_to, samples, rate)
    digest = hashlib.blake2b(np.ascontiguousarray(waveform), digest_size=16, key=str(rate).encode()).digest()
    return Checked(None, seconds, digest)


def _write_flac(path: Path, samples: np.ndarray, rate: int) -> None:
    """16 bits, as the corpora that have segments; to a temporary name and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    soundfile.write(temporary, samples, rate, format="FLAC", subtype="PCM_16")
    os.replace(temporary, path)
