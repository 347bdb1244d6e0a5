import librosa
import numpy as np
import pytest

from seam.data.augmentation import SAMPLE_RATE, add_noise
from seam.experiments.waveform_augmentation import augment


@pytest.fixture
def tone() -> np.ndarray:
    """One second of a loud vowel-like sound."""
    times = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    return (0.9 * np.sin(2 * np.pi * 220 * times) * np.hanning(SAMPLE_RATE)).astype(np.float32)


def test_the_generator_decides_everything(tone):
    first, again, other = (augment(tone, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_probability_zero_changes_nothing_and_nothing_changes_its_input(tone):
    before = tone.copy()
    assert np.array_equal(augment(tone, np.random.default_rng(0), probability=0), tone)
    augment(tone, np.random.default_rng(0), probability=1)
    assert np.array_equal(tone, before)


@pytest.mark.parametrize("probability", [0.55, 1.0])
def test_output_is_float32_in_range_and_of_bounded_length(tone, probability):
    rng = np.random.default_rng(3)
    loud = np.clip(20 * tone, -1, 1)
    lengths = []
    for _ in range(60):
        audio = augment(loud, rng, probability)
        assert audio.dtype == np.float32 and audio.ndim == 1
        assert np.isfinite(audio).all() and np.abs(audio).max() <= 1
        lengths.append(audio.size / SAMPLE_RATE)
    assert 0.79 < min(lengths) and max(lengths) < 1.25 + 0.6 + 0.01
    assert max(lengths) - min(lengths) > 0.3


def test_noise_stays_below_the_speech(tone):
    """A tone remains the strongest frequency, within the speed and the warp, whatever happens around it."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        audio = augment(tone, rng, 1.0)
        spectrum = np.abs(np.fft.rfft(audio))
        strongest = np.fft.rfftfreq(audio.size, 1 / SAMPLE_RATE)[spectrum.argmax()]
        assert 220 * 0.8 * 0.88 * 0.97 < strongest < 220 * 1.25 * 1.14 * 1.03


def test_the_voice_warp_keeps_the_tempo(tone):
    from seam.experiments.waveform_augmentation import _change_voice

    for factor in (0.88, 1.14):
        warped = _change_voice(tone, factor)
        assert warped.size == pytest.approx(tone.size, rel=0.02)
        pitch = librosa.yin(warped[4000:12000], fmin=100, fmax=500, sr=SAMPLE_RATE)
        assert np.median(pitch) == pytest.approx(220 * factor, rel=0.03)


def test_silence_stays_finite():
    silence = np.zeros(SAMPLE_RATE, dtype=np.float32)
    for seed in range(20):
        assert np.isfinite(augment(silence, np.random.default_rng(seed), 1.0)).all()


def test_noise_of_a_given_ratio(tone):
    noisy = add_noise(tone, np.random.default_rng(0), (10, 10))
    ratio = 10 * np.log10(np.mean(tone**2) / np.mean((noisy - tone) ** 2))
    assert ratio == pytest.approx(10, abs=0.1)
