"""Stages that are trained in seconds, on eight sounds that anyone could tell apart."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from seam.data.manifest import Utterance, write_manifest
from seam.modeling_seam import SeamForSpeechRecognition
from seam.train.recipe import StageRecipe, build

TEXTS = [
    "one two three",
    "stop the music",
    "turn on the light",
    "the old goat",
    "two",
    "the kitchen light on",
    "hay",
    "eats",
]


class Killed(BaseException):
    """What no code is prepared for."""


def write_sounds(folder: Path) -> str:
    """Write a manifest of the eight sounds, with transcripts in upper case."""
    rng = np.random.default_rng(5)
    utterances = []
    for index, text in enumerate(TEXTS):
        time = np.arange(rng.integers(9000, 30000)) / 16000
        tone = sum(np.sin(2 * np.pi * frequency * time) for frequency in rng.uniform(100, 3500, 3)) / 6
        path = folder / f"{index}.wav"
        soundfile.write(path, tone + 0.02 * rng.standard_normal(len(time)), 16000)
        utterances.append(Utterance(path, text.upper(), len(time) / 16000, "none", "sounds", "train"))
    return str(write_manifest(folder / "manifest.jsonl", utterances))


def recipe(output_dir, manifest, steps, **values) -> StageRecipe:
    training = {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "warmup_steps": 10,
        "logging_steps": 20,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **values.pop("training", {}),
    }
    data = {"train": [manifest], "validation": [manifest], "keep_encoder_states": True, **values.pop("data", {})}
    return build(StageRecipe, {"training": training, "data": data, **values})


def weights(folder):
    return SeamForSpeechRecognition.from_pretrained(folder).state_dict()


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}
