"""
Longer utterances joined from recordings of people saying single words, so that few recordings go a long way, and the
training and test utterances that are made of them.
"""

import logging
import multiprocessing
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import librosa
import numpy as np
import soundfile
from tqdm import tqdm

from seam.data.augmentation import SAMPLE_RATE
from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.experiments.waveform_augmentation import augment

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


Part = tuple[np.ndarray, str, str]


def read_words(utterances: Sequence[Utterance]) -> list[Part]:
    """`(waveform at 16 kHz of shape (samples,), text, speaker)` of each utterance."""
    return [(librosa.load(one.audio, sr=SAMPLE_RATE)[0], one.text, one.speaker) for one in utterances]


def write_parts(parts: Sequence[Part], folder: Path, split: str) -> list[Utterance]:
    """Write 16-bit WAV files and a manifest."""
    (folder / "audio").mkdir(parents=True)
    written = []
    for index, (waveform, text, speaker) in enumerate(parts):
        path = folder / "audio" / f"{index:06d}.wav"
        soundfile.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")
        written.append(Utterance(path, text, len(waveform) / SAMPLE_RATE, speaker, "people", split))
    return read_manifest(write_manifest(folder / "manifest.jsonl", written))


def write_strings(
    utterances: Sequence[Utterance], folder: Path, count: int, max_seconds: float, seed: int
) -> list[Utterance]:
    """Strings of two to six words, each string joined from recordings of one speaker; not augmented."""
    rng = np.random.default_rng(seed)
    return write_parts(join_recordings(read_words(utterances), count, rng, max_seconds=max_seconds), folder, "test")


def write_training(
    utterances: Sequence[Utterance],
    folder: Path,
    singles: int,
    strings: int,
    max_seconds: float,
    clean_share: float,
    seed: int,
) -> list[Utterance]:
    """
    Single words, every speaker equally often, and strings joined from them; all but `clean_share` are augmented.

    Args:
        singles, strings: numbers of utterances.
        max_seconds: longest utterance, before and after augmentation.
    """
    rng = np.random.default_rng(seed)
    words = read_words(utterances)
    speakers = sorted({speaker for _, _, speaker in words})
    own = {
        name: [part for part in words if part[2] == name and len(part[0]) < max_seconds * SAMPLE_RATE]
        for name in speakers
    }
    parts = [own[name][rng.integers(len(own[name]))] for name in rng.choice(speakers, size=singles)]
    # Room for slower speech: augmentation stretches by up to a quarter.
    parts += join_recordings(words, strings, rng, max_seconds=max_seconds / 1.25)
    jobs = [(part, int(rng.integers(2**31)), rng.random() >= clean_share) for part in parts]
    with multiprocessing.get_context("spawn").Pool() as pool:
        work = partial(_augmented, max_samples=int(max_seconds * SAMPLE_RATE))
        parts = list(tqdm(pool.imap(work, jobs, chunksize=32), total=len(jobs), desc="people"))
    return write_parts(parts, folder, "train")


def _augmented(job: tuple[Part, int, bool], max_samples: int) -> Part:
    (waveform, text, speaker), seed, wanted = job
    if wanted:
        changed = augment(waveform, np.random.default_rng(seed))
        waveform = changed if len(changed) <= max_samples else waveform
    return waveform, text, speaker
