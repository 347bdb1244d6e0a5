"""Change a waveform at random without changing its words: tempo, voice, room, channel, noise and level."""

import librosa
import numpy as np
from scipy import signal

from seam.data.augmentation import SAMPLE_RATE, add_noise, change_speed, rms

_REVERB_SHARE = 0.35 / 0.55  # reverberation hurts short words most: apply it less often than the rest


def augment(waveform: np.ndarray, rng: np.random.Generator, probability: float = 0.55) -> np.ndarray:
    """
    Apply each change with `probability`, independently of the others.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): mono audio at 16 kHz in [-1, 1].
        rng: source of all randomness.
        probability: of each change.

    Returns:
        New float32 audio of shape `(new_samples,)` at 16 kHz, within [-1, 1].
    """
    audio = np.array(waveform, dtype=np.float32)

    def chosen(share: float = 1.0) -> bool:
        return bool(rng.random() < probability * share)

    if chosen():
        audio = change_speed(audio, rng.uniform(0.8, 1.25))
    if chosen():
        audio = _change_voice(audio, rng.uniform(0.88, 1.14))
    if chosen():
        audio = _pad(audio, rng)
    if chosen(_REVERB_SHARE):
        audio = _reverberate(audio, rng)
    if chosen():
        audio = _filter(audio, rng)
    if chosen():
        audio = add_noise(audio, rng)
    if chosen():
        # The level is set on the peak: a gain on top of arbitrary earlier changes could clip.
        audio = audio * 10 ** (rng.uniform(-26, 0) / 20) / max(float(np.abs(audio).max(initial=0)), 1e-6)
    return (audio / max(1.0, float(np.abs(audio).max(initial=0)))).astype(np.float32)


def _change_voice(audio: np.ndarray, factor: float) -> np.ndarray:
    """Multiply pitch and formants by `factor` and keep the tempo."""
    # A window of 32 ms and three quarters overlap: longer ones smear short words, shorter gaps cost time.
    return librosa.effects.time_stretch(change_speed(audio, factor), rate=1 / factor, n_fft=512)


def _pad(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add up to 0.3 s of low noise at both ends, because real recordings have no digital silence."""
    before, after = (int(seconds * SAMPLE_RATE) for seconds in rng.uniform(0, 0.3, 2))
    level = rms(audio) * 10 ** (-rng.uniform(45, 60) / 20)
    padded = level * rng.standard_normal(before + audio.size + after, dtype=np.float32)
    padded[before : before + audio.size] += audio
    return padded


def _reverberate(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add a room with a reverberation time of 0.1-0.4 s: direct sound and an exponentially decaying noise tail."""
    reverberation_time = rng.uniform(0.1, 0.4)
    times = np.arange(int(reverberation_time * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
    response = rng.standard_normal(times.size, dtype=np.float32) * 10 ** (-3 * times / reverberation_time)
    response[: int(0.002 * SAMPLE_RATE)] = 0
    direct_to_reverberant = rng.uniform(0, 12)
    response *= 10 ** (-direct_to_reverberant / 20) / np.sqrt(np.sum(np.square(response)))
    response[0] = 1
    return signal.oaconvolve(audio, response)[: audio.size]


def _filter(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply a telephone-like low-pass at 3-4 kHz, or one equaliser band of up to 6 dB."""
    if rng.random() < 0.5:
        return signal.sosfilt(signal.butter(6, rng.uniform(3000, 4000), fs=SAMPLE_RATE, output="sos"), audio)
    # The peaking filter of the "Audio EQ Cookbook": unity far from the centre, `gain` at the centre.
    angle = 2 * np.pi * np.exp(rng.uniform(np.log(150), np.log(5000))) / SAMPLE_RATE
    amplitude = 10 ** (rng.uniform(-6, 6) / 40)
    width = np.sin(angle) / 2
    numerator = (1 + width * amplitude, -2 * np.cos(angle), 1 - width * amplitude)
    denominator = (1 + width / amplitude, -2 * np.cos(angle), 1 - width / amplitude)
    return signal.lfilter(numerator, denominator, audio)
