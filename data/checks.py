"""
The checks that an utterance must pass to be trained on or scored: each says what is wrong, or `None`; and a recording,
decoded once, whole, and put through them. Runs in worker processes: light to import.
"""

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from seam.data.files import replacing

# 20 ms frames below -66 dBFS (16 steps of 16-bit audio) are silence: a room is louder, and a muted channel is not.
FRAME_SECONDS = 0.02
SILENCE_RMS = 5e-4
# The shortest spoken digits of the Free Spoken Digit Dataset last 0.14 s and are loud for most of it.
MIN_LOUD_SECONDS = 0.05
MIN_SECONDS = 0.1
# Read and spontaneous speech has 5 to 22 characters per second; tightly cut digits reach 28, and a short answer in a
# long recording, or a script of syllables, falls below 3. Outside these bounds, text and audio do not belong together.
MIN_CHARACTERS_PER_SECOND = 0.5
MAX_CHARACTERS_PER_SECOND = 35.0

REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Problem(NamedTuple):
    """`reason`: in words that are the same for all that have it; `detail`: what is particular to this one."""

    reason: str
    detail: str


def is_unicode(value: str) -> Problem | None:
    """Not UTF-8 (lone surrogates, PEP 383), or damaged before: U+FFFD stands for what was lost."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return Problem("not UTF-8", f"character {error.start + 1} of {value!r}")
    if REPLACEMENT_CHARACTER in value:
        return Problem("replaced characters", f"U+FFFD in {value!r}")
    return None


def text_is_there(text: str) -> Problem | None:
    return None if text.strip() else Problem("empty text", "")


def text_comes_back(text: str, decoded: str) -> Problem | None:
    """
    Args:
        decoded: what the tokenizer makes of the ids of `text`.
    """
    if decoded == text:
        return None
    changed = sorted(set(text) - set(decoded))
    detail = f"{text!r} comes back as {decoded!r}" + (f", without {' '.join(map(repr, changed))}" if changed else "")
    return Problem("tokenizer changes the text", detail)


def sampling_rate_is(rate: int, promised: int | None) -> Problem | None:
    """`promised`: that of the corpus in Hz, or `None` where it promises none."""
    if promised in (None, rate):
        return None
    return Problem("wrong sampling rate", f"the header says {rate} Hz; the corpus has {promised} Hz")


def long_enough(seconds: float) -> Problem | None:
    return None if seconds >= MIN_SECONDS else Problem("too short", f"{seconds:.3f} s, below {MIN_SECONDS:g} s")


def short_enough(seconds: float, max_seconds: float) -> Problem | None:
    return None if seconds <= max_seconds else Problem("too long", f"{seconds:.1f} s, above {max_seconds:g} s")


def samples_are_finite(waveform: np.ndarray) -> Problem | None:
    """`waveform`: shape `(samples,)`."""
    bad = waveform.size - int(np.isfinite(waveform).sum())
    return Problem("samples not finite", f"{bad} of {waveform.size} are NaN or infinite") if bad else None


def not_silent(waveform: np.ndarray, rate: int) -> Problem | None:
    """
    Args:
        waveform: shape `(samples,)`, full scale 1; a constant offset is not heard and does not count.
        rate: in Hz.
    """
    frame = max(1, int(FRAME_SECONDS * rate))
    frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame) - waveform.mean()
    loud = FRAME_SECONDS * int((np.sqrt(np.mean(np.square(frames), axis=1)) >= SILENCE_RMS).sum())
    if loud >= MIN_LOUD_SECONDS:
        return None
    level = 20 * np.log10(SILENCE_RMS)
    return Problem("silent", f"{loud:.2f} s of {len(waveform) / rate:.2f} s are above {level:.0f} dBFS")


def speaking_rate_is_plausible(text: str, seconds: float) -> Problem | None:
    rate = len(text) / seconds
    if MIN_CHARACTERS_PER_SECOND <= rate <= MAX_CHARACTERS_PER_SECOND:
        return None
    return Problem(
        "characters per second",
        f"{len(text)} characters in {seconds:.2f} s are {rate:.1f}/s, outside {MIN_CHARACTERS_PER_SECOND:g} to "
        f"{MAX_CHARACTERS_PER_SECOND:g}",
    )


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
        samples_are_finite(waveform)
        or not_silent(waveform, rate)
        or speaking_rate_is_plausible(recording.text, seconds)
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
            sampling_rate_is(rate, recording.sampling_rate)
            or _wav_is_whole(file)
            or long_enough((last - first) / rate)
            or short_enough((last - first) / rate, recording.max_seconds)
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
