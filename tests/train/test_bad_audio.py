"""Training on data with a damaged recording: it stops there, or skips it."""

import json
from pathlib import Path

import pytest

from seam.tests.helpers.training_sounds import recipe, write_sounds
from seam.train import alignment

pytestmark = pytest.mark.medium


@pytest.fixture
def damaged(tmp_path) -> str:
    """Return a manifest whose third recording cannot be read."""
    (tmp_path / "sounds").mkdir()
    manifest = write_sounds(tmp_path / "sounds")
    Path(tmp_path / "sounds" / "3.wav").write_bytes(b"nothing")
    return manifest


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_skipped_counted_and_named(backbones, manifest, damaged, tmp_path, workers):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "skipped_audio.jsonl").write_text('{"audio": "old", "reason": "of an earlier training"}\n')
    metrics = alignment.main(
        recipe(
            tmp_path / "out",
            damaged,
            6,  # three epochs, of batches of 4 and 4, or 4 and 3
            training={"per_device_train_batch_size": 4, "dataloader_num_workers": workers},
            data={"validation": [manifest], "keep_encoder_states": False, "on_bad_audio": "skip"},
            encoder=backbones[0],
            llm=backbones[1],
        )
    )
    assert metrics["skipped_audio"] == 1
    (line,) = (tmp_path / "out" / "skipped_audio.jsonl").read_text().splitlines()
    assert json.loads(line)["audio"].endswith("sounds/3.wav")
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["skipped_audio"] == 1
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 6


def test_it_stops_by_default(backbones, manifest, damaged, tmp_path):
    data = {"validation": [manifest], "keep_encoder_states": False}
    with pytest.raises(ValueError, match="3.wav cannot be read as audio"):
        alignment.main(recipe(tmp_path / "out", damaged, 2, data=data, encoder=backbones[0], llm=backbones[1]))
