"""The checks that an utterance must pass to be trained on or scored: each says what is wrong, or `None`."""

from typing import NamedTuple

import numpy as np

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
