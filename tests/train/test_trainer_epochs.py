"""Data sets and samplers that draw anew in every epoch are told its number."""

import json
import shutil

import pytest

from seam.data.dataset import SpeechDataset
from seam.tests.helpers.training_sounds import changed, recipe, weights
from seam.train import alignment

pytestmark = pytest.mark.medium


def test_every_epoch_is_announced_also_after_a_resume(backbones, manifest, tmp_path, monkeypatch):
    said = []
    original = SpeechDataset.set_epoch

    def set_epoch(self, epoch):
        original(self, epoch)
        if self.reader.augmentation:  # the evaluation's is announced by accelerate as well
            said.append(epoch)

    monkeypatch.setattr(SpeechDataset, "set_epoch", set_epoch)
    training = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    data = {"keep_encoder_states": False, "augmentation": {"time_masks": 1}}
    settings = {"encoder": backbones[0], "llm": backbones[1], "data": data}
    alignment.main(recipe(tmp_path, manifest, 6, training=training, **settings))
    assert sorted(set(said)) == [0, 1, 2]
    said.clear()
    shutil.rmtree(tmp_path / "checkpoint-6")
    alignment.main(recipe(tmp_path, manifest, 6, training=training, **settings))
    assert sorted(set(said)) == [1, 2]


def test_training_is_augmented_evaluation_is_not(backbones, manifest, tmp_path):
    training = {"learning_rate": 0.0, "logging_steps": 1, "num_train_epochs": 2, "seed": 1}
    losses = {}
    for name, augmentation in (("plain", {}), ("augmented", {"speeds": [0.9], "frequency_masks": 2})):
        alignment.main(
            recipe(
                tmp_path / name,
                manifest,
                2,
                training=training,
                data={"keep_encoder_states": False, "augmentation": augmentation},
                encoder=backbones[0],
                llm=backbones[1],
            )
        )
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = {key: [e[key] for e in history if key in e] for key in ("loss", "eval_loss")}
    assert not changed(weights(tmp_path / "plain"), weights(tmp_path / "augmented"))
    assert losses["plain"]["eval_loss"] == losses["augmented"]["eval_loss"]
    # The plain ones differ in the order of a sum, the augmented ones are anew in the second epoch.
    plain, (first, second) = losses["plain"]["loss"], losses["augmented"]["loss"]
    assert plain[0] == pytest.approx(plain[1], rel=1e-5)
    assert all(abs(one - other) > 0.1 for one, other in ((plain[0], first), (plain[0], second), (first, second)))
