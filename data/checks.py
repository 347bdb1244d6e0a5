"""
Check that an utterance can be trained on or scored.

Each check returns the problem that it finds, or `None`. `check_recording` decodes a recording once and runs all checks
of audio on it. It runs in worker processes: this module is light to import.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from seam.audio_files import cut_reason, opened
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
# Segment times are rounded to 10 ms, and the last one may be a little longer than its recording.
END_TOLERANCE_SECONDS = 0.1
REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Problem(NamedTuple):
    """
    What is wrong with an utterance.

    Args:
        reason: the kind of problem, in the same words for all utterances that have it.
        detail: the particulars of this utterance.
    """

    reason: str
    detail: str


def check_unicode(value: str) -> Problem | None:
    """Find bytes that are not UTF-8 (lone surrogates, PEP 383), and U+FFFD, which replaced such bytes earlier."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return Problem("not UTF-8", f"character {error.start + 1} of {value!r}")
    if REPLACEMENT_CHARACTER in value:
        return Problem("replaced characters", f"U+FFFD in {value!r}")
    return None


def check_not_empty(text: str) -> Problem | None:
    """Find a transcript without characters other than white space."""
    return None if text.strip() else Problem("empty text", "")


def check_tokenizer(text: str, decoded: str) -> Problem | None:
    """
    Find a transcript that the tokenizer changes.

    Args:
        decoded: `text` after encoding and decoding.
    """
    if decoded == text:
        return None
    changed = sorted(set(text) - set(decoded))
    detail = f"{text!r} comes back as {decoded!r}" + (f", without {' '.join(map(repr, changed))}" if changed else "")
    return Problem("tokenizer changes the text", detail)


def check_sampling_rate(rate: int, expected: int | None) -> Problem | None:
    """
    Find a recording with another sampling rate than its corpus.

    Args:
        rate: of the recording, in Hz.
        expected: of the corpus, in Hz; `None` accepts any.
    """
    if expected in (None, rate):
        return None
    return Problem("wrong sampling rate", f"the header says {rate} Hz; the corpus has {expected} Hz")


def check_min_duration(seconds: float) -> Problem | None:
    """Find audio that is too short to hold a word."""
    return None if seconds >= MIN_SECONDS else Problem("too short", f"{seconds:.3f} s, below {MIN_SECONDS:g} s")


def check_max_duration(seconds: float, max_seconds: float) -> Problem | None:
    """Find audio that is longer than `max_seconds`."""
    return None if seconds <= max_seconds else Problem("too long", f"{seconds:.1f} s, above {max_seconds:g} s")


def check_finite(waveform: np.ndarray) -> Problem | None:
    """
    Find NaN and infinite samples.

    Args:
        waveform: shape `(samples,)`.
    """
    bad = waveform.size - int(np.isfinite(waveform).sum())
    return Problem("samples not finite", f"{bad} of {waveform.size} are NaN or infinite") if bad else None


def check_not_silent(waveform: np.ndarray, rate: int) -> Problem | None:
    """
    Find a recording that is silent but for clicks.

    Args:
        waveform: shape `(samples,)`, full scale 1; a constant offset is inaudible and is ignored.
        rate: in Hz.
    """
    frame = max(1, int(FRAME_SECONDS * rate))
    frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame) - waveform.mean()
    loud = FRAME_SECONDS * int((np.sqrt(np.mean(np.square(frames), axis=1)) >= SILENCE_RMS).sum())
    if loud >= MIN_LOUD_SECONDS:
        return None
    level = 20 * np.log10(SILENCE_RMS)
    return Problem("silent", f"{loud:.2f} s of {len(waveform) / rate:.2f} s are above {level:.0f} dBFS")


def check_speaking_rate(text: str, seconds: float) -> Problem | None:
    """Find a transcript that is too short or too long to belong to its audio."""
    rate = len(text) / seconds
    if MIN_CHARACTERS_PER_SECOND <= rate <= MAX_CHARACTERS_PER_SECOND:
        return None
    return Problem(
        "characters per second",
        f"{len(text)} characters in {seconds:.2f} s are {rate:.1f}/s, outside {MIN_CHARACTERS_PER_SECOND:g} to "
        f"{MAX_CHARACTERS_PER_SECOND:g}",
    )


@dataclass(frozen=True)
class Recording:
    """
    A recording to check.

    Args:
        path: of the audio file.
        text: its transcript.
        segment: start and end in seconds, where the utterance is a part of the file.
        cut_to: FLAC file to write the segment to.
        sampling_rate: that the header must state, in Hz; `None` accepts any.
        max_seconds: longest utterance.
    """

    path: Path
    text: str
    segment: tuple[float, float] | None
    cut_to: Path | None
    sampling_rate: int | None
    max_seconds: float


@dataclass(frozen=True)
class CheckResult:
    """
    What `check_recording` found out about a recording.

    Args:
        problem: what is wrong, or `None`.
        seconds: duration of the decoded audio.
        digest: of the samples, mixed down to mono: equal samples have equal digests.
    """

    problem: Problem | None
    seconds: float = 0.0
    digest: bytes = b""


def check_recording(recording: Recording) -> CheckResult:
    """
    Decode a recording, check it, and write its segment to a file of its own where it has one and nothing is wrong.

    Problems of a file are returned, never raised.

    Raises:
        OSError: the segment cannot be written.
    """
    try:
        decoded = _decode(recording)
    except soundfile.LibsndfileError as error:
        return CheckResult(Problem("cannot be decoded", f"{recording.path}: {error.error_string}"))
    except OSError as error:
        return CheckResult(Problem("cannot be read", f"{recording.path}: {error.strerror or error}"))
    if isinstance(decoded, Problem):
        return CheckResult(decoded)
    samples, rate = decoded
    waveform = samples.mean(axis=1)  # as `SeamProcessor.load_audio`
    seconds = len(waveform) / rate
    problem = check_finite(waveform) or check_not_silent(waveform, rate) or check_speaking_rate(recording.text, seconds)
    if problem:
        return CheckResult(problem, seconds)
    if recording.cut_to is not None:
        write_audio(recording.cut_to, samples, rate)
    return CheckResult(None, seconds, hashlib.blake2b(waveform, digest_size=16, key=str(rate).encode()).digest())


def _decode(recording: Recording) -> tuple[np.ndarray, int] | Problem:
    """Return the samples `(samples, channels)` of the file or its segment and the sampling rate, or a problem."""
    path = recording.path
    if not path.is_file():
        return Problem("no audio file", f"{path} does not exist")
    if path.stat().st_size == 0:
        return Problem("empty file", f"{path} has 0 bytes")
    with opened(path) as file:
        rate = file.samplerate
        first, last = 0, file.frames
        if recording.segment is not None:
            start, end = recording.segment
            if end > file.frames / rate + END_TOLERANCE_SECONDS:
                detail = f"{start:.2f} to {end:.2f} s of {path}, which has {file.frames / rate:.2f} s"
                return Problem("segment after the end", detail)
            first, last = round(start * rate), min(round(end * rate), file.frames)
        # Before decoding: an audiobook of ten hours would fill the memory.
        problem = (
            check_sampling_rate(rate, recording.sampling_rate)
            or _check_whole(file, path)
            or check_min_duration((last - first) / rate)
            or check_max_duration((last - first) / rate, recording.max_seconds)
        )
        if problem:
            return problem
        file.seek(first)
        samples = file.read(last - first, dtype="float32", always_2d=True)
    if len(samples) < last - first:
        detail = f"{len(samples) / rate:.2f} s of the {(last - first) / rate:.2f} s that the header of {path} states"
        return Problem("truncated", detail)
    return samples, rate


def _check_whole(file: soundfile.SoundFile, path: Path) -> Problem | None:
    reason = cut_reason(file)
    return Problem("truncated", f"{path}: {reason}") if reason else None


def write_audio(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write an audio file atomically, in the format of its name, with 16 bits, as the corpora that have segments."""
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, rate, format=path.suffix[1:].upper(), subtype="PCM_16")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(encoded.getvalue())
