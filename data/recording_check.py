"""A recording decoded once, whole, and checked; a segment is cut out. Runs in worker processes: light to import."""

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from seam.data import checks
from seam.data.checks import Problem
from seam.data.files import replacing

# Segment times are rounded to 10 ms, and the last one may be a little longer than its recording.
END_TOLERANCE_SECONDS = 0.1
# libsndfile reads a truncated WAV file without an error, and says so in its log only. Programs that write to a pipe
# state the greatest number that there is, and some are a few bytes off: neither is a truncated file.
WAV_LENGTH = re.compile(r"^data : (?P<stated>\d+) \(should be (?P<there>\d+)\)", re.MULTILINE)
WAV_LENGTH_UNKNOWN = 0x7FFFF000
WAV_SHARE_THERE = 0.99


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
        seconds: duration of what was decoded.
        digest: of the samples, mixed down; equal where every sample is.
    """

    problem: Problem | None
    seconds: float = 0.0
    digest: bytes = b""


def check(recording: Recording) -> Checked:
    """
    Decode and check; write the segment, where one is to be cut out and nothing is wrong with it. What is wrong with a
    file is returned, never raised.

    Raises:
        OSError: when the segment cannot be written.
    """
    try:
        decoded = _decode(recording)
    except soundfile.LibsndfileError as error:
        return Checked(Problem("cannot be decoded", f"{recording.path}: {error.error_string}"))
    except TypeError as error:  # of soundfile, for a suffix such as .raw: a format without a header
        return Checked(Problem("cannot be decoded", f"{recording.path}: {error}"))
    except OSError as error:
        return Checked(Problem("cannot be read", f"{recording.path}: {error.strerror or error}"))
    if isinstance(decoded, Problem):
        return Checked(decoded)
    samples, rate = decoded
    waveform = samples.mean(axis=1)  # as `SeamProcessor.load_audio`
    seconds = len(waveform) / rate
    problem = (
        checks.samples_are_finite(waveform)
        or checks.not_silent(waveform, rate)
        or checks.speaking_rate_is_plausible(recording.text, seconds)
    )
    if problem:
        return Checked(problem, seconds)
    if recording.cut_to is not None:
        _write_flac(recording.cut_to, samples, rate)
    return Checked(None, seconds, hashlib.blake2b(waveform, digest_size=16, key=str(rate).encode()).digest())


def _decode(recording: Recording) -> tuple[np.ndarray, int] | Problem:
    """Samples `(samples, channels)` of the file or of its segment, and the rate; or what is wrong with the file."""
    path = recording.path
    if not path.is_file():
        return Problem("no audio file", f"{path} does not exist")
    if path.stat().st_size == 0:
        return Problem("empty file", f"{path} has 0 bytes")
    with soundfile.SoundFile(path) as file:
        rate = file.samplerate
        first, last = 0, file.frames
        if recording.segment is not None:
            start, end = recording.segment
            if end > file.frames / rate + END_TOLERANCE_SECONDS:
                detail = f"{start:.2f} to {end:.2f} s of {path}, which has {file.frames / rate:.2f} s"
                return Problem("segment after the end", detail)
            first, last = round(start * rate), min(round(end * rate), file.frames)
        # Before decoding: a book of ten hours must not fill the memory.
        problem = (
            checks.sampling_rate_is(rate, recording.sampling_rate)
            or _wav_is_whole(file)
            or checks.long_enough((last - first) / rate)
            or checks.short_enough((last - first) / rate, recording.max_seconds)
        )
        if problem:
            return problem
        file.seek(first)
        samples = file.read(last - first, dtype="float32", always_2d=True)
    if len(samples) < last - first:
        detail = f"{len(samples) / rate:.2f} s of the {(last - first) / rate:.2f} s that the header of {path} states"
        return Problem("truncated", detail)
    return samples, rate


def _wav_is_whole(file: soundfile.SoundFile) -> Problem | None:
    length = WAV_LENGTH.search(file.extra_info)
    if length is None:
        return None
    stated, there = int(length["stated"]), int(length["there"])
    if stated >= WAV_LENGTH_UNKNOWN or there >= WAV_SHARE_THERE * stated:
        return None
    return Problem("truncated", f"{there} bytes of the {stated} that the header of {file.name} states")


def _write_flac(path: Path, samples: np.ndarray, rate: int) -> None:
    """16 bits, as the corpora that have segments; to a temporary name and then renamed."""
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, rate, format="FLAC", subtype="PCM_16")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(encoded.getvalue())
