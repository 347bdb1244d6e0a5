"""The three stages: what each trains, what each reads, and that each can learn."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM, WhisperModel

from seam.data.manifest import read_manifest, write_manifest
from seam.evaluation.transcription import transcribe
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.tests.helpers.shipped import TINY
from seam.tests.helpers.training_sounds import changed, recipe, weights
from seam.train import alignment, instruction, refinement
from seam.train.recipe import RecipeError
from seam.train.refinement import perturb

pytestmark = pytest.mark.medium


@pytest.mark.oldest
def test_every_stage_learns(stages):
    metrics = json.loads((stages / "metrics.json").read_text())
    assert metrics["alignment"]["eval_stage1_wer"] < 10
    assert metrics["instruction"]["eval_wer"] < 10
    assert metrics["refinement"]["eval_wer"] < 10
    assert "eval_wer" not in metrics["alignment"]


@pytest.mark.oldest
def test_the_wrong_audio_gives_the_wrong_text(stages, manifest):
    model, processor = (cls.from_pretrained(stages / "refinement") for cls in (SeamForSpeechRecognition, SeamProcessor))
    rows = [json.loads(line) for line in open(manifest)]
    sources = [f"{manifest.rsplit('/', 1)[0]}/{row['audio']}" for row in rows]
    heard = [one.text for one in transcribe(model, processor, sources)]
    shifted = [one.text for one in transcribe(model, processor, sources[1:] + sources[:1])]
    right = sum(text == row["text"].lower() for text, row in zip(heard, rows, strict=True))
    wrong = sum(text == row["text"].lower() for text, row in zip(shifted, rows, strict=True))
    assert right >= 7 and wrong == 0


@pytest.mark.oldest
def test_only_the_stages_own_parameters_change(stages, backbones):
    heard, instructed, refined = (weights(stages / name) for name in ("alignment", "instruction", "refinement"))
    table = heard.pop("language_model.embed_tokens.weight")
    assert torch.equal(table, instructed["language_model.model.embed_tokens.weight"])
    assert not changed(heard, instructed)  # what Stage 1 has; the LLM is not among it
    llm = {
        f"language_model.{name}": weight
        for name, weight in Qwen3ForCausalLM.from_pretrained(backbones[1]).state_dict().items()
    }
    assert not changed(llm, {name.replace(".base_layer", ""): weight for name, weight in refined.items()})
    assert changed(instructed, refined) == {name for name in refined if "lora_" in name}


def test_stage_1_changes_the_aligner_alone(backbones, manifest, tmp_path):
    kwargs = {"encoder": backbones[0], "llm": backbones[1], "config": {"lora_rank": 4}}
    alignment.main(recipe(tmp_path / "one", manifest, 1, training={"learning_rate": 0.0}, **kwargs))
    alignment.main(recipe(tmp_path / "two", manifest, 3, model=str(tmp_path / "one")))
    names = changed(weights(tmp_path / "one"), weights(tmp_path / "two"))
    # A handful of positions lies beyond the longest text; everything else of the aligner moves.
    assert names == {name for name in weights(tmp_path / "one") if name.startswith("bridge.")}


def test_stage_1_begins_with_whispers_decoder(backbones, manifest, tmp_path):
    settings = {"encoder": backbones[0], "llm": backbones[1], "aligner_from_decoder": True}
    training = {"learning_rate": 0.0, "logging_steps": 1}
    alignment.main(recipe(tmp_path, manifest, 1, training=training, **settings))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert np.isfinite([entry["loss"] for entry in history if "loss" in entry]).all()
    begun, decoder = weights(tmp_path), WhisperModel.from_pretrained(backbones[0]).decoder.state_dict()
    for name, weight in decoder.items():
        assert name == "embed_tokens.weight" or torch.equal(begun[f"bridge.{name}"], weight), name


@pytest.mark.parametrize("llm_inputs", ["nearest", "continuous"])
def test_refinement_reads_both_kinds_of_inputs(backbones, manifest, tmp_path, llm_inputs):
    config = {"llm_inputs": llm_inputs, "lora_rank": 4}
    alignment.main(recipe(tmp_path / "1", manifest, 1, encoder=backbones[0], llm=backbones[1], config=config))
    metrics = refinement.main(recipe(tmp_path / "3", manifest, 2, model=str(tmp_path / "1"), llm=backbones[1]))
    assert np.isfinite(metrics["eval_loss"])


@pytest.mark.oldest
def test_accumulated_steps_give_the_loss_of_one_big_batch(backbones, manifest, tmp_path):
    """The loss is a mean over tokens, however they are spread over batches."""
    for name, size, steps in (("big", 8, 1), ("small", 2, 4)):
        alignment.main(
            recipe(
                tmp_path / name,
                manifest,
                3,
                training={
                    "per_device_train_batch_size": size,
                    "gradient_accumulation_steps": steps,
                    "logging_steps": 1,
                },
                encoder=backbones[0],
                llm=backbones[1],
            )
        )
    losses = []
    for name in ("big", "small"):
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        (instruction, {"aligner_from_decoder": True}),
        (refinement, {"aligner_from_decoder": True}),
        (alignment, {"first_token_guidance": True}),
        (instruction, {"mask": "learned"}),
    ],
)
def test_a_setting_of_another_stage_is_refused_before_anything_is_read(stage, values, manifest, tmp_path):
    with pytest.raises(RecipeError, match=f"^{next(iter(values))} is no setting of seam train "):
        stage.main(recipe(tmp_path, manifest, 1, encoder="nowhere", llm="nowhere", **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "names neither a model nor both backbones"),
        ({"encoder": "x"}, "names neither a model nor both backbones"),
        ({"model": "nowhere"}, "cannot load the checkpoint 'nowhere'"),
        (
            {"encoder": str(TINY), "llm": "x"},
            "tiny is a SEAM checkpoint, not a backbone: to train it further, give model=",
        ),
    ],
)
def test_an_incomplete_recipe_is_refused(values, message, manifest, tmp_path):
    with pytest.raises((RecipeError, OSError), match=message):
        alignment.main(recipe(tmp_path, manifest, 1, **values))
    with pytest.raises(RecipeError, match="names no model"):
        instruction.main(recipe(tmp_path, manifest, 1))


def test_what_does_not_fit_is_found_before_training(backbones, manifest, tmp_path):
    settings = {"encoder": backbones[0], "llm": backbones[1]}
    utterance = read_manifest(manifest)[0]
    for change, message in (
        ({"duration": 2.5}, "0.wav: 2.5 s of audio, but the encoder's window is 2 s"),
        ({"text": "one two three " * 20}, "0.wav: a transcript of .* but the aligner has positions for 23"),
    ):
        path = str(write_manifest(tmp_path / "manifest.jsonl", [dataclasses.replace(utterance, **change)]))
        with pytest.raises(RecipeError, match=message):
            alignment.main(recipe(tmp_path / "out", path, 1, **settings))


def test_stage_2_without_lora_is_refused(backbones, manifest, tmp_path):
    alignment.main(recipe(tmp_path / "1", manifest, 1, encoder=backbones[0], llm=backbones[1], config={"lora_rank": 0}))
    with pytest.raises(RecipeError, match="no LoRA adapters"):
        instruction.main(recipe(tmp_path / "2", manifest, 1, model=str(tmp_path / "1"), llm=backbones[1]))


def test_stage_2_needs_the_llm_to_be_named_once(stages, backbones, manifest, tmp_path):
    with pytest.raises(RecipeError, match="alignment holds Stage 1 alone, .* name it, llm=FOLDER"):
        instruction.main(recipe(tmp_path, manifest, 1, model=str(stages / "alignment")))
    with pytest.raises(RecipeError, match="instruction holds its LLM already: leave llm out"):
        refinement.main(recipe(tmp_path, manifest, 1, model=str(stages / "instruction"), llm=backbones[1]))


def test_the_first_token_is_given_in_stages_2_and_3(stages, manifest, tmp_path, monkeypatch):
    """In Stage 2 the transcript's; in Stage 3 Stage 1's, which is made wrong here."""
    seen, forward, decode = [], SeamForSpeechRecognition.forward, refinement.decode_all

    @functools.wraps(forward)  # its signature tells the Trainer that there are labels
    def spy(self, *args, **kwargs):
        seen.append((kwargs.get("first_token_ids"), kwargs["labels"]))
        return forward(self, *args, **kwargs)

    def mishear(*args, **kwargs):
        items = decode(*args, **kwargs)
        for _, _, alignment_ids in items:
            alignment_ids[0] = 7
        return items

    monkeypatch.setattr(SeamForSpeechRecognition, "forward", spy)
    monkeypatch.setattr(refinement, "decode_all", mishear)
    settings = {"model": str(stages / "instruction"), "first_token_guidance": True}
    for stage in (instruction, refinement):
        metrics = stage.main(recipe(tmp_path / stage.__name__, manifest, 1, **settings))
        assert np.isfinite(metrics["eval_loss"]) and len(seen) == 2  # one step, one evaluation
        for given, labels in seen:
            assert given.tolist() == (labels[:, 0].tolist() if stage is instruction else [7] * len(labels))
        seen.clear()
    instruction.main(recipe(tmp_path / "off", manifest, 1, model=settings["model"]))
    assert [given for given, _ in seen] == [None, None]


# ---- perturbation ----


def test_perturbation_rates_and_what_it_leaves_alone():
    torch.manual_seed(0)
    mask = torch.ones(400, 50, dtype=torch.long)
    mask[:, 40:] = 0
    kept, masked = perturb(mask, 0.05, 0.1)
    assert kept[:, 40:].sum() == 0
    assert abs(1 - kept[:, :40].float().mean().item() - 0.1) < 0.01
    assert abs(masked.float().mean().item() - 0.05) < 0.01
    both = ((1 - kept) * masked)[:, :40].float().mean().item()
    assert abs(both - 0.005) < 0.003  # independent of each other


def test_perturbation_never_deletes_all_of_a_row():
    kept, _ = perturb(torch.tensor([[1, 0]] * 500), 0.0, 0.9)
    assert kept.tolist() == [[1, 0]] * 500


def test_no_perturbation_at_probability_zero():
    mask = torch.ones(5, 6, dtype=torch.long)
    kept, masked = perturb(mask, 0.0, 0.0)
    assert torch.equal(kept, mask) and not masked.any()


def test_a_learned_mask_is_trained_with_lora_and_resumed(stages, manifest, tmp_path):
    before = str(stages / "instruction")
    settings = {"mask": "learned", "masking_probability": 0.5, "deletion_probability": 0.0}
    saving = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    refinement.main(recipe(tmp_path / "whole", manifest, 4, model=before, training=saving, **settings))
    whole, halfway = weights(tmp_path / "whole"), weights(tmp_path / "whole" / "checkpoint-2")
    assert whole.keys() - weights(before).keys() == {"mask_embedding"}
    assert halfway["mask_embedding"].any() and not torch.equal(halfway["mask_embedding"], whole["mask_embedding"])
    assert changed(weights(before), whole) == {name for name in whole if "lora_" in name}
    resumed = {**saving, "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2")}
    refinement.main(recipe(tmp_path / "resumed", manifest, 4, model=before, training=resumed, **settings))
    assert not changed(whole, weights(tmp_path / "resumed"))
    # Before it has learned anything it is the zero vector: the first loss is the same.
    refinement.main(
        recipe(tmp_path / "zero", manifest, 4, model=before, training=saving, **{**settings, "mask": "zero"})
    )
    assert "mask_embedding" not in weights(tmp_path / "zero")
    losses = [
        [
            entry["loss"]
            for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for name in ("whole", "zero")
    ]
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]
    # A checkpoint that has one goes on with it.
    going_on = {"training": {"learning_rate": 0.0}, "model": str(tmp_path / "whole")}
    refinement.main(recipe(tmp_path / "on", manifest, 1, **going_on, **settings))
    assert torch.equal(weights(tmp_path / "on")["mask_embedding"], whole["mask_embedding"])
    with pytest.raises(RecipeError, match="whole has a learned mask already: continue with it, mask=learned"):
        refinement.main(recipe(tmp_path / "off", manifest, 1, model=str(tmp_path / "whole")))


# ---- the aligner's rivals ----

SMALL = {
    "linear": {"hidden_size": 64},
    "qformer": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "hidden_dropout_prob": 0.0},
}


@pytest.mark.parametrize("bridge", SMALL)
def test_a_bridge_without_a_stage_1_learns_in_stage_2(bridge, backbones, manifest, tmp_path):
    config = {"bridge": bridge, "bridge_config": SMALL[bridge], "lora_rank": 4, "lora_dropout": 0.0}
    settings = {"encoder": backbones[0], "llm": backbones[1], "config": config}
    before = instruction.main(recipe(tmp_path / "0", manifest, 1, training={"learning_rate": 0.0}, **settings))
    metrics = instruction.main(recipe(tmp_path / "1", manifest, 120, **settings))
    assert metrics["eval_loss"] < 0.3 * before["eval_loss"] and "eval_stage1_wer" not in metrics
    moved = changed(weights(tmp_path / "0"), weights(tmp_path / "1"))
    assert moved and all(name.startswith("bridge.") or "lora_" in name for name in moved)
    assert any(name.startswith("bridge.") for name in moved) and any("lora_" in name for name in moved)
    with pytest.raises(ValueError, match=f"alignment: the bridge '{bridge}' has no Stage 1; accepted"):
        alignment.main(recipe(tmp_path, manifest, 1, **settings))
    with pytest.raises(ValueError, match=f"first_token_guidance: the bridge '{bridge}' has no Stage 1; accepted"):
        instruction.main(recipe(tmp_path, manifest, 1, first_token_guidance=True, **settings))
    with pytest.raises(ValueError, match=f"refinement: the bridge '{bridge}' has no Stage 1; accepted"):
        refinement.main(recipe(tmp_path, manifest, 1, model=str(tmp_path / "1")))


def test_slam_asr_trains_its_projector_alone(backbones, manifest, tmp_path):
    config = {"bridge": "linear", "bridge_config": SMALL["linear"], "lora_rank": 0}
    settings = {"encoder": backbones[0], "llm": backbones[1], "config": config}
    instruction.main(recipe(tmp_path / "0", manifest, 1, training={"learning_rate": 0.0}, **settings))
    instruction.main(recipe(tmp_path / "1", manifest, 2, **settings))
    names = changed(weights(tmp_path / "0"), weights(tmp_path / "1"))
    assert names == {name for name in weights(tmp_path / "1") if name.startswith("bridge.")}


def test_a_ctc_head_goes_through_all_stages(backbones, manifest, tmp_path):
    config = {"bridge": "ctc", "lora_rank": 8, "lora_dropout": 0.0}
    settings = {"encoder": backbones[0], "llm": backbones[1], "config": config}
    with pytest.raises(RecipeError, match="the bridge 'ctc' has a Stage 1: train it first"):
        instruction.main(recipe(tmp_path, manifest, 1, **settings))
    first = alignment.main(recipe(tmp_path / "1", manifest, 200, training={"learning_rate": 2e-2}, **settings))
    assert first["eval_stage1_wer"] < 40  # 100 before
    instruction.main(recipe(tmp_path / "2", manifest, 2, model=str(tmp_path / "1"), llm=backbones[1]))
    metrics = refinement.main(recipe(tmp_path / "3", manifest, 2, model=str(tmp_path / "2")))
    assert np.isfinite(metrics["eval_loss"]) and metrics["eval_stage1_wer"] == first["eval_stage1_wer"]
