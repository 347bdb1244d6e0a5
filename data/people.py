"""Longer utterances joined from recordings of single words, so that few recordings of people go a long way."""

import logging
from collections.abc import Sequence

import numpy as np

from .augmentation import SAMPLE_RATE

_FADE = int(0.005 * SAMPLE_RATE)
_FRAME = int(0.02 * SAMPLE_RATE)

logger = logging.getLogger(__name__)


def join_recordings(
    recordings: Sequence[tuple[np.ndarray, str, str]],
    count: int,
    rng: np.random.Generator,
    *,
    max_words: int = 6,
    max_seconds: float,
) -> list[tuple[np.ndarray, str, str]]:
    """Joins recordings of one speaker at a time into `count` utterances.

    Args:
        recordings: (waveform at 16 kHz, shape (samples,), word, speaker) for each recording.
        count: Number of utterances.
        rng: Source of all randomness.
        max_words: Utterances have two to `max_words` words, fewer where the time does not suffice.
        max_seconds: Longest utterance in seconds; longer recordings are left out, with a warning.

    Returns:
        `count` tuples (float32 waveform at 16 kHz within [-1, 1], text, speaker).

    Raises:
        ValueError: When no recording is short enough, or `max_words` is not positive.
    """
    if max_words < 1:
        raise ValueError(f"max_words must be positive, got {max_words}")
    limit = int(max_seconds * SAMPLE_RATE)
    speakers: dict[str, list[tuple[np.ndarray, str]]] = {}
    for waveform, word, speaker in recordings:
        if 0 < len(waveform) <= limit:
            speakers.setdefault(speaker, []).append((np.asarray(waveform, dtype=np.float32), word))
    usable = sum(map(len, speakers.values()))
    if usable < len(recordings):
        logger.warning("%d recordings are empty or longer than %g s: left out", len(recordings) - usable, max_seconds)
    if not usable:
        raise ValueError(f"no recording is at most {max_seconds:g} s long")

    names = sorted(speakers)
    joined = []
    for _ in range(count):
        speaker = names[rng.integers(len(names))]
        own = speakers[speaker]
        picked = [own[i] for i in rng.integers(len(own), size=rng.integers(min(2, max_words), max_words + 1))]
        gaps = (rng.uniform(0.02, 0.25, len(picked) - 1) * SAMPLE_RATE).astype(int)
        while sum(len(waveform) for waveform, _ in picked) + gaps.sum() > limit:
            picked, gaps = picked[:-1], gaps[:-1]
        text = " ".join(word for _, word in picked)
        joined.append((_join([waveform for waveform, _ in picked], gaps, rng), text, speaker))
    return joined


def _join(parts: list[np.ndarray], gaps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The parts one after the other with `gaps` samples of low noise between them, shape (samples,)."""
    parts = _evened(parts)
    # Models trained with noise stumble over digital silence, which no room ever has.
    floor = float(np.median([_noise_level(part) for part in parts]))
    audio = np.zeros(sum(map(len, parts)) + int(gaps.sum()), dtype=np.float32)
    position = 0
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        audio[position : position + len(part)] += part * _envelope(len(part), index > 0, not last)
        position += len(part)
        if not last:
            # The noise reaches under the faded edges on both sides, so that the level has no dip there.
            start, end = max(position - _FADE, 0), min(position + int(gaps[index]) + _FADE, audio.size)
            noise = rng.standard_normal(end - start, dtype=np.float32)
            audio[start:end] += floor * noise * _envelope(end - start, True, True)
            position += int(gaps[index])
    return audio / max(1.0, float(np.abs(audio).max()))


def _envelope(length: int, rises: bool, falls: bool) -> np.ndarray:
    """Ones with 5 ms ramps at the chosen ends, shape (length,)."""
    envelope = np.ones(length, dtype=np.float32)
    fade = min(_FADE, length // 2)
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    if rises:
        envelope[:fade] = ramp
    if falls:
        envelope[length - fade :] *= ramp[::-1]
    return envelope


def _evened(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Brings each part half of the way, in decibels, to the median level; at most 6 dB, for words differ by nature."""
    levels = np.array([max(_rms(part), 1e-5) for part in parts])
    gains = np.clip(np.sqrt(np.median(levels) / levels), 0.5, 2.0)
    return [part * np.float32(gain) for part, gain in zip(parts, gains, strict=True)]


def _noise_level(part: np.ndarray) -> float:
    """Root mean square of the quietest tenth of the 20 ms frames."""
    frames = part[: len(part) // _FRAME * _FRAME].reshape(-1, _FRAME)
    quietest = float(np.quantile(np.sqrt(np.mean(np.square(frames), axis=1)), 0.1)) if len(frames) else 0.0
    # A tightly cut word has no quiet part, and a gated recording none but zeros: stay 26 dB below the word in the
    # first case and above 16-bit rounding in the second.
    return float(np.clip(quietest, 1e-4, max(0.05 * _rms(part), 1e-4)))


def _rms(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(audio))))
