"""Data that vanishes during a training ends it with an error that names the file and the last checkpoint."""

import json
import tarfile
from pathlib import Path

import pytest
from transformers import Trainer

from seam.tests.helpers.training_sounds import changed, recipe, weights, write_sounds
from seam.train import alignment, state_cache
from seam.train.checkpoints import last_checkpoint
from seam.train.recipe import RecipeError

pytestmark = pytest.mark.medium

TRAINING = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def vanishes(monkeypatch):
    """In step 4, at the end of the first epoch or pass, moves the file away, and leaves these bytes in its place."""
    step = Trainer.training_step

    def vanishes(path: Path, left: bytes | None = None):
        seen = iter(range(10**6))

        def moving(self, *args, **kwargs):
            if next(seen) == 3:
                path.rename(path.with_name("away"))
                if left is not None:
                    path.write_bytes(left)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", moving)

    yield vanishes
    monkeypatch.setattr(Trainer, "training_step", step)


def check_ends(path: Path, out: Path, train) -> None:
    """And resumes exactly, when the file is back."""
    with pytest.raises((OSError, RecipeError)) as caught:
        train()
    said = str(caught.value)
    assert str(path) in said and "The training has ended at step " in said and "\n" not in said
    assert said.endswith(f"the last checkpoint is {last_checkpoint(out)}.")
    path.with_name("away").rename(path)
    train()
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 16


@pytest.fixture
def run(backbones, tmp_path):
    def run(out: str, train: str, validation: str, workers: int = 0, **data):
        training = {**TRAINING, "dataloader_num_workers": workers}
        data = {
            "train": [train],
            "validation": [validation],
            "validation_limit": 1,
            "keep_encoder_states": False,
            **data,
        }
        settings = {"encoder": backbones[0], "llm": backbones[1], "training": training}
        alignment.main(recipe(tmp_path / out, "", 16, data=data, **settings))

    return run


@pytest.mark.parametrize(("workers", "left"), [(0, None), (1, None), (1, b"damaged")])
def test_a_shard_of_encoder_states(workers, left, run, tmp_path, monkeypatch, vanishes):
    monkeypatch.setattr(state_cache, "SHARD_BYTES", 1)
    monkeypatch.setattr(state_cache, "ENCODER_BATCH_SIZE", 2)
    (tmp_path / "sounds").mkdir()
    manifest = write_sounds(tmp_path / "sounds")

    def train():
        run("out", manifest, manifest, workers, encoder_states=str(tmp_path / "states"))

    run("whole", manifest, manifest, encoder_states=str(tmp_path / "states"))
    shard = tmp_path / "states" / "train-00002.safetensors"
    assert shard.is_file()
    vanishes(shard, left)
    if workers:
        check_ends(shard, tmp_path / "out", train)
    else:  # whoever has opened it keeps it
        train()
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def tar(manifest: str, path: Path) -> Path:
    with tarfile.open(path, "w") as shard:
        for line in Path(manifest).read_text().splitlines():
            row = json.loads(line)
            audio = Path(manifest).parent / row["audio"]
            text = audio.with_suffix(".txt")
            text.write_text(row["text"])
            shard.add(audio, audio.name)
            shard.add(text, text.name)
    return path


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["shard", "manifest", "audio"])
def test_a_part_of_a_stream(kind, workers, run, tmp_path, vanishes):
    folder = tmp_path / "sounds"
    folder.mkdir()
    manifest = write_sounds(folder)
    held_out = write_sounds((tmp_path / "held-out").mkdir() or tmp_path / "held-out")
    source = str(tar(manifest, tmp_path / "sounds.tar")) if kind == "shard" else manifest
    vanished = folder / "3.wav" if kind == "audio" else Path(source)
    vanishes(vanished)
    check_ends(vanished, tmp_path / "out", lambda: run("out", source, held_out, workers, streaming=True))
