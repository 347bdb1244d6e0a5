"""What `bench.training` hears: the shipped recordings, joined until they fill the encoder's window."""

import random
from pathlib import Path

import numpy as np
import soundfile

from seam.__main__ import RECORDINGS
from seam.data.manifest import Utterance, read_manifest, write_manifest

SHIPPED = read_manifest(RECORDINGS / "manifest.jsonl")
TEXTS = [utterance.text for utterance in SHIPPED]


def write_speech(folder: Path, count: int, window: float) -> list[Utterance]:
    """
    Write recordings of which none is longer than the window and each holds as much of others as fits into it, and their
    `manifest.jsonl`.

    Args:
        count: number of recordings.
        window: seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    utterances = []
    for number in range(count):
        order, parts, left = random.Random(number), [], window
        while fitting := [one for one in SHIPPED if one.duration <= left]:
            parts.append(order.choice(fitting))
            left -= parts[-1].duration
        sounds = [soundfile.read(part.audio, dtype="float32") for part in parts]
        ((rate,),) = ({one for _, one in sounds},)
        path, waveform = folder / f"{number}.wav", np.concatenate([sound for sound, _ in sounds])
        soundfile.write(path, waveform, rate)
        utterances.append(Utterance(path, " ".join(part.text for part in parts), len(waveform) / rate))
    return read_manifest(write_manifest(folder / "manifest.jsonl", utterances))
