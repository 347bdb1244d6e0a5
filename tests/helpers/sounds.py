"""Synthetic recordings for tests that need no speech, and the layouts that several tests write."""

from pathlib import Path

import numpy as np
import soundfile


def tone(seconds: float, frequency: float = 220.0, rate: int = 16000) -> np.ndarray:
    """Return a sine of amplitude 0.3, shape (samples,)."""
    return 0.3 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def write(path: Path, waveform: np.ndarray, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, rate)
    return path


def write_sph(path: Path, waveform: np.ndarray, rate: int = 16000) -> Path:
    """NIST SPHERE as TED-LIUM has it: a header of 1024 bytes, then 16-bit little-endian samples."""
    header = (
        f"NIST_1A\n   1024\nsample_count -i {len(waveform)}\nsample_n_bytes -i 2\nchannel_count -i 1\n"
        f"sample_byte_format -s2 01\nsample_rate -i {rate}\nsample_coding -s3 pcm\nend_head\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.clip(np.round(waveform * 32768), -32768, 32767).astype("<i2")
    path.write_bytes(header.encode().ljust(1024) + samples.tobytes())
    return path
