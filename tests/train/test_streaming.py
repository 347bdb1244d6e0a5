"""A stage that is trained on a stream."""

import json
import shutil

import pytest

from seam.tests.helpers.training_sounds import changed, recipe, weights
from seam.train import alignment, draft, instruction, refinement
from seam.train.recipe import RecipeError

pytestmark = pytest.mark.medium

STREAM = {"keep_encoder_states": False, "streaming": True, "shuffle_buffer": 5}


def losses(folder):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.oldest
def test_stage_1_learns_from_a_stream_for_any_number_of_workers(backbones, manifest, tmp_path):
    training = {"per_device_train_batch_size": 2, "logging_steps": 1, "gradient_accumulation_steps": 2}
    for workers in (0, 2):
        alignment.main(
            recipe(
                tmp_path / str(workers),
                manifest,
                10,
                training={**training, "dataloader_num_workers": workers},
                data={**STREAM, "augmentation": {"speeds": [0.9, 1, 1.1], "time_masks": 1}},
                encoder=backbones[0],
                llm=backbones[1],
            )
        )
    assert losses(tmp_path / "0") == losses(tmp_path / "2") and len(losses(tmp_path / "0")) == 10
    assert not changed(weights(tmp_path / "0"), weights(tmp_path / "2"))
    assert losses(tmp_path / "0")[-1] < losses(tmp_path / "0")[0]


def test_a_resumed_stream_continues_where_it_was(backbones, manifest, tmp_path):
    settings = {"data": {**STREAM, "batch_seconds": 5}, "encoder": backbones[0], "llm": backbones[1]}
    training = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2}
    alignment.main(recipe(tmp_path, manifest, 8, training=training, **settings))
    through = losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-8")
    alignment.main(recipe(tmp_path, manifest, 8, training={**training, "dataloader_num_workers": 1}, **settings))
    assert losses(tmp_path) == through and len(through) == 8
    shutil.rmtree(tmp_path / "checkpoint-8")
    other = {**settings, "data": {**settings["data"], "train": [f"{manifest[: -len('.jsonl')]}*"]}}
    with pytest.raises(RecipeError, match="data.train"):
        alignment.main(recipe(tmp_path, manifest, 8, training=training, **other))


def test_stage_2_reads_a_stream(backbones, manifest, tmp_path):
    settings = {"data": STREAM, "llm": backbones[1]}
    alignment.main(recipe(tmp_path / "1", manifest, 1, encoder=backbones[0], config={"lora_rank": 4}, **settings))
    metrics = instruction.main(recipe(tmp_path / "2", manifest, 2, model=str(tmp_path / "1"), **settings))
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize(
    ("stage", "steps", "data", "message"),
    [
        (alignment, -1, {}, "has no last utterance: say how long to train by training.max_steps"),
        (
            alignment,
            1,
            {"keep_encoder_states": True},
            "reads the audio during the training, but data.keep_encoder_states before it",
        ),
        (alignment, 1, {"train_limit": 5}, "data.train_limit chooses among all utterances"),
        (alignment, 1, {"shuffle_buffer": 0}, "shuffle_buffer is 0; accepted: 1 and above"),
        (refinement, 1, {}, "seam train refinement reads all training data before it trains"),
        (draft, 1, {}, "seam train draft reads all training data before it trains"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(stage, steps, data, message, manifest, tmp_path):
    with pytest.raises(RecipeError, match=message):
        stage.main(recipe(tmp_path, manifest, steps, data={**STREAM, **data}, model="nowhere"))
