"""Augmentation of training utterances: concatenation, speed, noise and SpecAugment, drawn anew in every epoch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import librosa
import numpy as np
import soxr
import torch
from huggingface_hub.dataclasses import strict

from seam.data.manifest import Utterance, read_manifest

SAMPLE_RATE = 16000


@strict
@dataclass
class Augmentation:
    """
    Augment utterances by the settings of a recipe (`data.augmentation`), which are all off by default.

    Args:
        concatenation_probability: of appending a random utterance, and then of appending one more, as long as the audio
            fits the encoder's window and the transcript the aligner's positions.
        speeds: drawn uniformly for each utterance; 0.9, 1.0 and 1.1 in Ko et al. (2015). The pitch changes with the
            speed. Speeds at which the audio would not fit the window are not drawn.
        noise_probability: of adding noise.
        noise: manifests of noise recordings, whose texts are ignored; by default noise is white, pink or brown.
        min_snr, max_snr: bounds of the signal-to-noise ratio in dB, which is drawn uniformly.
        time_masks, frequency_masks: number of masks of SpecAugment (Park et al. 2019), within the frames of the audio.
        time_mask_frames, frequency_mask_bins: T (in frames of 10 ms) and F, the maximum widths of a mask; the defaults
            are those of the policies for LibriSpeech, which have up to 2 masks of each kind.
    """

    concatenation_probability: float = 0.0
    speeds: list[float | int] = field(default_factory=list)
    noise_probability: float = 0.0
    noise: list[str] = field(default_factory=list)
    min_snr: float = 10.0
    max_snr: float = 40.0
    time_masks: int = 0
    time_mask_frames: int = 100
    frequency_masks: int = 0
    frequency_mask_bins: int = 27

    def __post_init__(self) -> None:
        for name in ("concatenation_probability", "noise_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.augmentation.{name} is {getattr(self, name)}; accepted: 0 to 1.")
        for speed in self.speeds:
            if not 0.5 <= speed <= 2:
                raise ValueError(f"data.augmentation.speeds contains {speed}; accepted: 0.5 to 2.")
        if self.min_snr > self.max_snr:
            raise ValueError(f"data.augmentation.min_snr is {self.min_snr}, above max_snr, {self.max_snr}.")
        for name in ("time_masks", "time_mask_frames", "frequency_masks", "frequency_mask_bins"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.augmentation.{name} is {getattr(self, name)}; accepted: 0 and above.")
        if self.noise and not self.noise_probability:
            raise ValueError("data.augmentation.noise is given, but noise_probability is 0.")

    def __bool__(self) -> bool:
        """Return whether anything is switched on."""
        chances = self.concatenation_probability, self.noise_probability, self.time_masks, self.frequency_masks
        return any(chances) or any(speed != 1 for speed in self.speeds)

    @cached_property
    def noises(self) -> list[Utterance]:
        """Return the recordings of the manifests in `noise`."""
        return [one for path in self.noise for one in read_manifest(path, needs_text=False)]

    def concatenate(
        self,
        utterance: Utterance,
        draw: Callable[[], Utterance],
        rng: np.random.Generator,
        fits: Callable[[list[Utterance]], bool],
    ) -> list[Utterance]:
        """
        Return the utterances to concatenate, of which `utterance` is the first.

        Args:
            draw: returns a random utterance.
            fits: whether a list of utterances fits the model as one.
        """
        parts = [utterance]
        while rng.random() < self.concatenation_probability:
            more = [*parts, draw()]
            if not fits(more):
                break
            parts = more
        return parts

    def change_waveform(
        self, waveform: np.ndarray, rng: np.random.Generator, rate: int, max_samples: int
    ) -> np.ndarray:
        """
        Change the speed and add noise.

        Args:
            waveform: shape `(samples,)`.
            rate: in Hz.
            max_samples: that the result may have.

        Returns:
            `np.ndarray` of shape `(samples,)`, float32; another number of samples than before.
        """
        speeds = [speed for speed in self.speeds if np.ceil(len(waveform) / speed) <= max_samples]
        speed = speeds[rng.integers(len(speeds))] if speeds else 1
        if speed != 1:
            waveform = change_speed(waveform, speed)[:max_samples]
        if rng.random() < self.noise_probability:
            waveform = self._add_noise(waveform, rng, rate)
        return waveform.astype(np.float32, copy=False)

    def _add_noise(self, waveform: np.ndarray, rng: np.random.Generator, rate: int) -> np.ndarray:
        if not self.noises:
            return add_noise(waveform, rng, (self.min_snr, self.max_snr))
        source = self.noises[rng.integers(len(self.noises))]
        seconds = len(waveform) / rate
        offset = rng.uniform(0, max(0.0, source.duration - seconds))
        noise, _ = librosa.load(str(source.audio), sr=rate, offset=offset, duration=seconds)
        return mix(waveform, np.resize(noise, len(waveform)), rng.uniform(self.min_snr, self.max_snr))

    def mask_features(self, features: torch.Tensor, frames: int, rng: np.random.Generator) -> torch.Tensor:
        """
        Mask features as SpecAugment does (Park et al. 2019, Section 2).

        The time warp is left out, which they found to matter least. transformers masks in `WhisperModel` only, not in
        the encoder, and draws from numpy's global generator.

        Args:
            features: shape `(mels, frames of the window)`.
            frames: number of frames of the audio; the rest is padding.

        Returns:
            A tensor of the same shape. Masked values are 0, as in transformers' Whisper.
        """
        features = features.clone()
        for count, max_width, size, axis in (
            (self.frequency_masks, self.frequency_mask_bins, features.shape[0], 0),
            (self.time_masks, self.time_mask_frames, frames, 1),
        ):
            for _ in range(count):
                width = int(rng.integers(min(max_width, size) + 1))
                start = int(rng.integers(size - width + 1))
                features.narrow(axis, start, width).zero_()
        return features


def change_speed(audio: np.ndarray, factor: float) -> np.ndarray:
    """Speed audio `(samples,)` at 16 kHz up by `factor`, which raises pitch and formants as well."""
    return soxr.resample(audio, SAMPLE_RATE * factor, SAMPLE_RATE, quality="MQ")


def rms(audio: np.ndarray) -> float:
    """Return the root mean square, at least 1e-4 so that silence is a valid input."""
    return max(float(np.sqrt(np.mean(np.square(audio)))) if audio.size else 0.0, 1e-4)


def add_noise(audio: np.ndarray, rng: np.random.Generator, ratios: tuple[float, float] = (12, 45)) -> np.ndarray:
    """
    Add white, pink or brown noise.

    Args:
        audio: Mono audio at 16 kHz, shape (samples,).
        rng: Source of all randomness.
        ratios: Bounds of the signal-to-noise ratio, in dB.

    Returns:
        Audio of the same shape; its samples may be outside [-1, 1].
    """
    noise: np.ndarray = rng.standard_normal(audio.size, dtype=np.float32)
    slope = rng.choice((0.0, 0.5, 1.0))  # amplitude ~ 1 / frequency ** slope
    if slope and noise.size:
        # A power of two makes the FFT fast. Below 60 Hz the spectrum is flat: louder noise there would be inaudible.
        length = 1 << (noise.size - 1).bit_length()
        spectrum = np.fft.rfft(noise, length)
        spectrum *= np.maximum(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), 60) ** -slope
        noise = np.fft.irfft(spectrum, length)[: noise.size]
    return mix(audio, noise, rng.uniform(*ratios))


def mix(audio: np.ndarray, noise: np.ndarray, ratio: float) -> np.ndarray:
    """
    Add noise at a signal-to-noise ratio.

    Args:
        audio, noise: Mono audio, both of shape (samples,).
        ratio: In dB.

    Returns:
        Audio of the same shape; its samples may be outside [-1, 1]. Noise that is digital silence changes nothing.
    """
    return audio + noise * (rms(audio) * 10 ** (-ratio / 20) / _rms_of_noise(noise))


def _rms_of_noise(noise: np.ndarray) -> float:
    """Return the root mean square without the floor of `rms`: coloured noise is very small before it is scaled."""
    return (float(np.sqrt(np.mean(np.square(noise)))) if noise.size else 0.0) or 1.0
