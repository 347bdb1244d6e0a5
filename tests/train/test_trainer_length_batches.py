"""Stages that are trained on batches by length."""

import json
import shutil

import numpy as np
import pytest

from seam.data.dataset import SpeechCollator
from seam.data.manifest import read_manifest
from seam.tests.helpers.training_sounds import recipe
from seam.train import alignment, refinement
from seam.train.inputs import length_batches
from seam.train.recipe import RecipeError

pytestmark = pytest.mark.medium


def history(folder, key):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in entries if key in entry]


def test_every_budget_holds(manifest, processor, tmp_path):
    utterances = read_manifest(manifest)
    seconds = [one.duration for one in utterances]
    tokens = [len(processor.transcript_ids(one.text.lower())) for one in utterances]
    for data, most in (({"batch_seconds": 4}, 8), ({"batch_tokens": 20}, 8), ({"batch_seconds": 100}, 3)):
        read = recipe(tmp_path, manifest, 1, training={"per_device_train_batch_size": most}, data=data)
        batches = list(length_batches(read, utterances, utterances, processor))
        assert sorted(index for batch in batches for index in batch) == list(range(8))
        for batch in batches:
            assert len(batch) <= most
            assert len(batch) * max(seconds[index] for index in batch) <= data.get("batch_seconds", 99)
            assert len(batch) * max(tokens[index] for index in batch) <= data.get("batch_tokens", 99)
    assert length_batches(recipe(tmp_path, manifest, 1), utterances, utterances, processor) is None
    with pytest.raises(RecipeError, match=r"wav: 1\.\d s and its transcript take 1\.\d times the budget"):
        length_batches(recipe(tmp_path, manifest, 1, data={"batch_seconds": 1}), utterances, utterances, processor)


@pytest.mark.parametrize("keep", [True, False])
def test_an_epoch_is_the_data_set_once(backbones, manifest, tmp_path, monkeypatch, keep):
    """And the loss of accumulated batches of different sizes is the mean over the tokens of them all."""
    seen = []
    collate = SpeechCollator.__call__

    def __call__(self, items):
        seen.append([tuple(item["token_ids"].tolist()) for item in items])
        return collate(self, items)

    settings = {"encoder": backbones[0], "llm": backbones[1]}
    training = {"learning_rate": 0.0, "logging_steps": 1}
    alignment.main(
        recipe(tmp_path / "one", manifest, 1, training=training, data={"keep_encoder_states": keep}, **settings)
    )
    monkeypatch.setattr(SpeechCollator, "__call__", __call__)
    training = {**training, "max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 10}
    data = {"batch_seconds": 4, "keep_encoder_states": keep}
    alignment.main(recipe(tmp_path / "by_length", manifest, -1, training=training, data=data, **settings))
    sizes = list(map(len, seen))
    assert sum(sizes[: sizes.index(8)]) == 16 and len(set(sizes)) > 1  # the 8 are the evaluation's
    rows = [row for batch in seen for row in batch]
    assert sorted(rows[:8]) == sorted(rows[8:16]) and len(set(rows[:8])) == 8
    losses = history(tmp_path / "by_length", "loss")
    np.testing.assert_allclose(losses, history(tmp_path / "one", "loss") * 2, rtol=1e-4)


def test_a_resumed_training_continues_with_the_same_batches(backbones, manifest, tmp_path):
    data = {"batch_seconds": 4, "keep_encoder_states": False, "augmentation": {"time_masks": 1}}
    settings = {"data": data, "encoder": backbones[0], "llm": backbones[1]}
    training = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 7}
    alignment.main(recipe(tmp_path, manifest, 12, training=training, **settings))
    through = history(tmp_path, "loss")
    shutil.rmtree(tmp_path / "checkpoint-12")
    alignment.main(recipe(tmp_path, manifest, 12, training={**training, "dataloader_num_workers": 1}, **settings))
    assert history(tmp_path, "loss") == through and len(through) == 12


def test_stage_3(backbones, manifest, tmp_path):
    settings = {"data": {"batch_tokens": 20}, "llm": backbones[1]}
    alignment.main(recipe(tmp_path / "1", manifest, 2, encoder=backbones[0], config={"lora_rank": 4}, **settings))
    metrics = refinement.main(recipe(tmp_path / "3", manifest, 2, model=str(tmp_path / "1"), **settings))
    assert np.isfinite(metrics["eval_loss"])
