"""Random changes to a waveform that keep its words: tempo, voice, room, channel, noise and level."""

import librosa
import numpy as np
from scipy import signal

from seam.data.augmentation import SAMPLE_RATE, add_noise, change_speed, rms

_REVERB_SHARE = 0.35 / 0.55  # reverberation hurts short words most: apply it less often than the rest


def augment(waveform: np.ndarray, rng: np.random.Generator, probability: float = 0.55) -> np.ndarray:
    """Applies each change with `probability`, independently.

    Args:
        waveform: Mono audio at 16 kHz, shape (samples,), in [-1, 1].
        rng: Source of all randomness.
        probability: Chance of each change.

    Returns:
        New float32 audio at 16 kHz, shape (other samples,), never outside [-1, 1].
    """
    audio = np.array(waveform, dtype=np.float32)

    def chosen(share: float = 1.0) -> bool:
        return bool(rng.random() < probability * share)

    if chosen():
        audio = change_speed(audio, rng.uniform(0.8, 1.25))
    if chosen():
        audio = _warped(audio, rng.uniform(0.88, 1.14))
    if chosen():
        audio = _shifted(audio, rng)
    if chosen(_REVERB_SHARE):
        audio = _reverberated(audio, rng)
    if chosen():
        audio = _filtered(audio, rng)
    if chosen():
        audio = add_noise(audio, rng)
    if chosen():
        # The level is set on the peak: a gain on top of arbitrary earlier changes could clip.
        audio = audio * 10 ** (rng.uniform(-26, 0) / 20) / max(float(np.abs(audio).max(initial=0)), 1e-6)
    return (audio / max(1.0, float(np.abs(audio).max(initial=0)))).astype(np.float32)


def _warped(audio: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies pitch and formants by `factor` and keeps the tempo."""
    # A window of 32 ms and three quarters overlap: longer ones smear short words, shorter gaps cost time.
    return librosa.effects.time_stretch(change_speed(audio, factor), rate=1 / factor, n_fft=512)


def _shifted(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds up to 0.3 s before and after; low noise, because digital silence occurs in no real recording."""
    before, after = (int(seconds * SAMPLE_RATE) for seconds in rng.uniform(0, 0.3, 2))
    level = rms(audio) * 10 ** (-rng.uniform(45, 60) / 20)
    shifted = level * rng.standard_normal(before + audio.size + after, dtype=np.float32)
    shifted[before : before + audio.size] += audio
    return shifted


def _reverberated(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A room with a reverberation time of 0.1-0.4 s: direct sound and an exponentially decaying noise tail."""
    reverberation_time = rng.uniform(0.1, 0.4)
    times = np.arange(int(reverberation_time * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
    response = rng.standard_normal(times.size, dtype=np.float32) * 10 ** (-3 * times / reverberation_time)
    response[: int(0.002 * SAMPLE_RATE)] = 0
    direct_to_reverberant = rng.uniform(0, 12)
    response *= 10 ** (-direct_to_reverberant / 20) / np.sqrt(np.sum(np.square(response)))
    response[0] = 1
    return signal.oaconvolve(audio, response)[: audio.size]


def _filtered(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A telephone-like low-pass at 3-4 kHz, or one equaliser band of up to 6 dB."""
    if rng.random() < 0.5:
        return signal.sosfilt(signal.butter(6, rng.uniform(3000, 4000), fs=SAMPLE_RATE, output="sos"), audio)
    # The peaking filter of the "Audio EQ Cookbook": unity far from the centre, `gain` at the centre.
    angle = 2 * np.pi * np.exp(rng.uniform(np.log(150), np.log(5000))) / SAMPLE_RATE
    amplitude = 10 ** (rng.uniform(-6, 6) / 40)
    width = np.sin(angle) / 2
    numerator = (1 + width * amplitude, -2 * np.cos(angle), 1 - width * amplitude)
    denominator = (1 + width / amplitude, -2 * np.cos(angle), 1 - width / amplitude)
    return signal.lfilter(numerator, denominator, audio)
