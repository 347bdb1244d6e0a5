"""Aligned embeddings on disk: equal to those computed in every step, computed once, refused when stale."""

import json

import numpy as np
import pytest
import torch

from seam.data.dataset import SpeechDataset
from seam.data.manifest import read_manifest
from seam.modeling_seam import SeamForSpeechRecognition
from seam.tests.helpers.training_sounds import recipe
from seam.train import instruction
from seam.train.recipe import RecipeError, check_stage
from seam.train.state_cache import cached_aligned_embeds
from seam.train.trainer import StageTrainer

pytestmark = pytest.mark.medium


@pytest.fixture
def ready(manifest, tmp_path):
    """Make recipes with a folder of embeddings."""

    def ready(steps: int = 4, **values):
        data = {"keep_encoder_states": False, **values.pop("data", {})}
        training = {"per_device_train_batch_size": 4, "logging_steps": 1, **values.pop("training", {})}
        values = {"aligned_embeds": str(tmp_path / "aligned"), **values}
        return recipe(values.pop("out", tmp_path / "out"), manifest, steps, data=data, training=training, **values)

    return ready


@pytest.fixture
def read(ready, processor, manifest):
    def read(model, utterances=None, **values):
        utterances = utterances or read_manifest(manifest)
        dataset = SpeechDataset(utterances, processor)
        return cached_aligned_embeds(ready(**values), model, processor, dataset, "train", utterances)

    return read


@pytest.mark.parametrize("llm_inputs", ["continuous", "nearest"])
def test_items_are_what_the_llm_is_given(llm_inputs, read, build_model, processor, manifest):
    model = build_model(llm_inputs=llm_inputs)
    items = read(model)
    for index, utterance in enumerate(read_manifest(manifest)):
        ids = items[index]["token_ids"]
        assert ids.tolist() == processor.transcript_ids(utterance.text.lower())
        with torch.no_grad():
            states, mask = model.encode(**processor(audio=utterance.audio))
            expected = model.teacher_forced(states, mask, ids[None])[0, : len(ids)]
        if llm_inputs == "nearest":
            expected = model.get_input_embeddings()(model.lookup.nearest(expected))
        torch.testing.assert_close(items[index]["aligned_embeds"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 1e-2)])
def test_stage_2_learns_the_same_and_computes_nothing_twice(
    bf16, tolerance, ready, build_model, processor, tmp_path, monkeypatch
):
    monkeypatch.setattr(StageTrainer, "word_error_rates", lambda self: {})
    build_model(lora_dropout=0.0).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")

    def losses(name: str, **values) -> list[float]:
        settings = {"model": str(tmp_path / "model"), "out": tmp_path / name, "training": {"bf16": bf16}}
        instruction.main(ready(**settings, **values))
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return [entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry]

    afresh = losses("afresh", aligned_embeds=None)
    kept = losses("kept", data={"keep_encoder_states": True})
    monkeypatch.setattr(SeamForSpeechRecognition, "encode", lambda *_: pytest.fail("encoded"))
    monkeypatch.setattr(SeamForSpeechRecognition, "aligned", lambda *_: pytest.fail("aligned"))
    monkeypatch.setattr("seam.processing_seam.SeamProcessor.load_audio", lambda *_: pytest.fail("audio was read"))
    assert losses("found") == kept and len(kept) == 5
    np.testing.assert_allclose(kept, afresh, rtol=tolerance)


def test_those_of_anything_else_are_stale(read, build_model, manifest):
    read(build_model(llm_inputs="nearest"))
    utterances = read_manifest(manifest)
    other = build_model(llm_inputs="nearest")
    with torch.no_grad():
        other.bridge.output_projection.weight.mul_(1.01)
    with pytest.raises(ValueError, match="stale: it was made from another Stage 1"):
        read(other)
    with pytest.raises(ValueError, match=r"other llm_inputs \(nearest, now continuous\)"):
        read(build_model(llm_inputs="continuous"))
    same = build_model(llm_inputs="nearest")
    with pytest.raises(ValueError, match="other transcripts"):
        read(same, [*utterances[:-1], utterances[-1].__class__(**{**vars(utterances[-1]), "text": "hay"})])
    with pytest.raises(ValueError, match=r"another precision \(float32, now bfloat16\)"):
        read(same, training={"bf16": True})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"data": {"augmentation": {"speeds": [0.9]}}}, "leave out data.augmentation"),
        ({"data": {"on_bad_audio": "skip"}}, "leave out data.augmentation"),
        ({"data": {"streaming": True}}, "data.streaming does not read at once"),
    ],
)
def test_audio_that_is_not_always_the_same(values, named, ready):
    with pytest.raises(RecipeError, match=named):
        ready(**values)


def test_it_is_a_setting_of_stage_2(ready):
    with pytest.raises(RecipeError, match="aligned_embeds is no setting of seam train alignment"):
        check_stage(ready(), "alignment")


def test_a_bridge_that_learns_is_not_frozen(ready, backbones):
    with pytest.raises(ValueError, match="aligned_embeds: the bridge 'linear' has no Stage 1"):
        instruction.main(ready(encoder=backbones[0], llm=backbones[1], config={"bridge": "linear"}))
