"""Shards as WebDataset has them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile


def tone(index: int, seconds: float = 0.3) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * (200 + 7 * index) * np.arange(int(seconds * 16000)) / 16000)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def flac(waveform: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, 16000, format="FLAC")
    return file.getvalue()


def write_shard(path: Path, texts: dict[int, str], broken: tuple[int, ...] = ()) -> Path:
    """Write a shard of tones: even ones have a .txt before the audio, odd ones a .json after it (some a duration)."""
    with tarfile.open(path, "w") as tar:
        for index, text in texts.items():
            audio = b"nothing" if index in broken else flac(tone(index, 0.3 + 0.01 * index))
            if index % 2 == 0:
                add(tar, f"some/{index:05d}.txt", text.encode())
            add(tar, f"some/{index:05d}.flac", audio)
            if index % 2:
                row = {"text": text, "speaker": f"s{index % 3}", "split": "train" if index % 3 else "dev"}
                row |= {"duration": 0.3 + 0.01 * index} if index % 4 == 1 else {}
                add(tar, f"some/{index:05d}.json", json.dumps(row).encode())
    return path
