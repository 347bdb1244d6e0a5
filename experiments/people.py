"""
Make utterances from recordings of people who say single words.

The words are joined into longer utterances, so that few recordings go a long way.
"""

import logging
import multiprocessing
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import librosa
import numpy as np
from tqdm import tqdm

from seam.data.augmentation import SAMPLE_RATE
from seam.data.checks import write_audio
from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.experiments.waveform_augmentation import augment

_FADE = int(0.005 * SAMPLE_RATE)
_FRAME = int(0.02 * SAMPLE_RATE)

logger = logging.getLogger(__name__)

Recording = tuple[np.ndarray, str, str]
"""A float32 waveform at 16 kHz within [-1, 1], of shape `(samples,)`; its text; its speaker."""


def make_training_utterances(
    utterances: Sequence[Utterance],
    folder: Path,
    singles: int,
    strings: int,
    max_seconds: float,
    clean_share: float,
    seed: int,
) -> list[Utterance]:
    """
    Make single words, every speaker equally often, and strings joined from them.

    Args:
        utterances: recordings of single words.
        folder: where audio and manifest are written.
        singles, strings: numbers of utterances.
        max_seconds: longest utterance, before and after augmentation.
        clean_share: share of the utterances that are not augmented.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    words = load_recordings(utterances)
    speakers = sorted({speaker for _, _, speaker in words})
    own = {
        name: [word for word in words if word[2] == name and len(word[0]) < max_seconds * SAMPLE_RATE]
        for name in speakers
    }
    recordings = [own[name][rng.integers(len(own[name]))] for name in rng.choice(speakers, size=singles)]
    # Room for slower speech: augmentation stretches by up to a quarter.
    recordings += join_recordings(words, strings, rng, max_seconds=max_seconds / 1.25)
    jobs = [(recording, int(rng.integers(2**31)), rng.random() >= clean_share) for recording in recordings]
    with multiprocessing.get_context("spawn").Pool() as pool:
        work = partial(_augment, max_samples=int(max_seconds * SAMPLE_RATE))
        recordings = list(tqdm(pool.imap(work, jobs, chunksize=32), total=len(jobs), desc="people"))
    return save_utterances(recordings, folder, "train")


def make_strings(
    utterances: Sequence[Utterance], folder: Path, count: int, max_seconds: float, seed: int
) -> list[Utterance]:
    """Make strings of two to six words, each joined from recordings of one speaker, without augmentation."""
    rng = np.random.default_rng(seed)
    return save_utterances(
        join_recordings(load_recordings(utterances), count, rng, max_seconds=max_seconds), folder, "test"
    )


def join_recordings(
    recordings: Sequence[Recording],
    count: int,
    rng: np.random.Generator,
    *,
    max_words: int = 6,
    max_seconds: float,
) -> list[Recording]:
    """
    Join recordings of one speaker at a time into `count` utterances.

    Args:
        recordings: of single words.
        count: number of utterances.
        rng: source of all randomness.
        max_words: utterances have two to `max_words` words, or fewer if more would be too long.
        max_seconds: longest utterance; longer recordings are left out, with a warning.

    Returns:
        `count` utterances.

    Raises:
        ValueError: when no recording is short enough, or `max_words` is not positive.
    """
    if max_words < 1:
        raise ValueError(f"max_words is {max_words}; accepted: 1 or more.")
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


def load_recordings(utterances: Sequence[Utterance]) -> list[Recording]:
    """Load the audio of each utterance."""
    return [(librosa.load(one.audio, sr=SAMPLE_RATE)[0], one.text, one.speaker) for one in utterances]


def save_utterances(recordings: Sequence[Recording], folder: Path, split: str) -> list[Utterance]:
    """Save recordings as 16-bit WAV files with a manifest, and return its utterances."""
    (folder / "audio").mkdir(parents=True)
    utterances = []
    for index, (waveform, text, speaker) in enumerate(recordings):
        path = folder / "audio" / f"{index:06d}.wav"
        write_audio(path, waveform, SAMPLE_RATE)
        utterances.append(Utterance(path, text, len(waveform) / SAMPLE_RATE, speaker, "people", split))
    return read_manifest(write_manifest(folder / "manifest.jsonl", utterances))


def _join(words: list[np.ndarray], gaps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Concatenate words with `gaps` samples of low noise between them; return audio of shape `(samples,)`."""
    words = _even_out(words)
    # Models trained with noise stumble over digital silence, which no room ever has.
    floor = float(np.median([_noise_level(word) for word in words]))
    audio = np.zeros(sum(map(len, words)) + int(gaps.sum()), dtype=np.float32)
    position = 0
    for index, word in enumerate(words):
        last = index == len(words) - 1
        audio[position : position + len(word)] += word * _envelope(len(word), index > 0, not last)
        position += len(word)
        if not last:
            # The noise reaches under the faded edges on both sides, so that the level has no dip there.
            start, end = max(position - _FADE, 0), min(position + int(gaps[index]) + _FADE, audio.size)
            noise = rng.standard_normal(end - start, dtype=np.float32)
            audio[start:end] += floor * noise * _envelope(end - start, True, True)
            position += int(gaps[index])
    return audio / max(1.0, float(np.abs(audio).max()))


def _envelope(length: int, rises: bool, falls: bool) -> np.ndarray:
    """Return ones of shape `(length,)` with 5 ms ramps at the chosen ends."""
    envelope = np.ones(length, dtype=np.float32)
    fade = min(_FADE, length // 2)
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    if rises:
        envelope[:fade] = ramp
    if falls:
        envelope[length - fade :] *= ramp[::-1]
    return envelope


def _even_out(words: list[np.ndarray]) -> list[np.ndarray]:
    """Move each word half the way, in decibels, to the median level, by at most 6 dB: words differ by nature."""
    levels = np.array([max(_rms(word), 1e-5) for word in words])
    gains = np.clip(np.sqrt(np.median(levels) / levels), 0.5, 2.0)
    return [word * np.float32(gain) for word, gain in zip(words, gains, strict=True)]


def _noise_level(word: np.ndarray) -> float:
    """Return the root mean square of the quietest tenth of the 20 ms frames."""
    frames = word[: len(word) // _FRAME * _FRAME].reshape(-1, _FRAME)
    quietest = float(np.quantile(np.sqrt(np.mean(np.square(frames), axis=1)), 0.1)) if len(frames) else 0.0
    # A tightly cut word has no quiet frame, and a gated recording has only zeros there: stay 26 dB below the word in
    # the first case and above 16-bit rounding in the second.
    return float(np.clip(quietest, 1e-4, max(0.05 * _rms(word), 1e-4)))


def _rms(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(audio))))


def _augment(job: tuple[Recording, int, bool], max_samples: int) -> Recording:
    (waveform, text, speaker), seed, wanted = job
    if wanted:
        changed = augment(waveform, np.random.default_rng(seed))
        waveform = changed if len(changed) <= max_samples else waveform
    return waveform, text, speaker
