"""The frozen LLM in bf16 or 4 bits while LoRA is trained on it: what is trained, and what is saved."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from seam.modeling_seam import SeamForSpeechRecognition
from seam.tests.helpers.training_sounds import changed, recipe
from seam.train import alignment, instruction, refinement, stage1_decoding
from seam.train.recipe import RecipeError

pytestmark = pytest.mark.medium

KINDS = ["bfloat16", "4bit"]
SAVING = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4}


@pytest.fixture(autouse=True)
def bitsandbytes(request):
    if "4bit" in request.node.name:
        pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory, backbones, manifest) -> str:
    folder = str(tmp_path_factory.mktemp("alignment"))
    config = {"lora_rank": 4, "lora_dropout": 0.1}
    alignment.main(recipe(folder, manifest, 150, encoder=backbones[0], llm=backbones[1], config=config))
    return folder


@pytest.fixture(scope="module")
def stage_2(tmp_path_factory, stage_1, backbones, manifest) -> dict[str, str]:
    """Stage 2 on the LLM's own folder, four steps with each precision."""
    folders = {}
    for kind in ["float32", *KINDS]:
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        instruction.main(
            recipe(folders[kind], manifest, 4, model=stage_1, llm=backbones[1], llm_dtype=kind, training=SAVING)
        )
    return folders


def losses(folder, key="loss") -> list[float]:
    with open(f"{folder}/trainer_state.json") as file:
        return [entry[key] for entry in json.load(file)["log_history"] if key in entry]


def stored(folder) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


def is_lora(name: str) -> bool:
    return "lora_" in name


@pytest.mark.oldest
@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_has_the_llm_as_it_was_and_the_trained_lora(kind, stage_2, stage_1, backbones):
    full, ours = stored(stage_2["float32"]), stored(stage_2[kind])
    assert set(ours) == set(full)
    assert {name: (value.dtype, value.shape) for name, value in ours.items()} == {
        name: (value.dtype, value.shape) for name, value in full.items()
    }
    assert changed(full, ours) == {name for name in full if is_lora(name)}
    llm = stored(backbones[1])
    for name, value in ours.items():
        plain = name.removeprefix("language_model.").replace(".base_layer", "")
        assert plain not in llm or torch.equal(value, llm[plain]), name
    one, other = (json.load(open(f"{stage_2[name]}/config.json")) for name in ("float32", kind))
    one.pop("weights_fingerprint"), other.pop("weights_fingerprint")
    assert one == other
    # On the way as at the end.
    assert not changed(
        {name: value for name, value in ours.items() if not is_lora(name)}, stored(f"{stage_2[kind]}/checkpoint-2")
    )
    assert changed(ours, stored(f"{stage_2[kind]}/checkpoint-2"))


@pytest.mark.parametrize(("kind", "tolerance"), [("bfloat16", 0.01), ("4bit", 0.15)])
def test_the_losses_are_nearly_those_of_full_precision(kind, tolerance, stage_2):
    np.testing.assert_allclose(losses(stage_2[kind]), losses(stage_2["float32"]), rtol=tolerance)
    assert losses(stage_2[kind]) != losses(stage_2["float32"])
    assert losses(stage_2[kind], "eval_stage1_wer") == losses(stage_2["float32"], "eval_stage1_wer")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_its_llm_trains_further_and_resumes_exactly(kind, stage_2, manifest, tmp_path):
    before = stage_2["float32"]
    settings = {"mask": "learned", "masking_probability": 0.5, "llm_dtype": kind, "model": before}
    refinement.main(recipe(tmp_path / "uninterrupted", manifest, 4, training=SAVING, **settings))
    resumed = {**SAVING, "resume_from_checkpoint": str(tmp_path / "uninterrupted" / "checkpoint-2")}
    refinement.main(recipe(tmp_path / "resumed", manifest, 4, training=resumed, **settings))
    uninterrupted = stored(tmp_path / "uninterrupted")
    assert not changed(uninterrupted, stored(tmp_path / "resumed"))
    assert losses(tmp_path / "uninterrupted") == losses(tmp_path / "resumed")
    assert changed(stored(before), uninterrupted) == {name for name in uninterrupted if is_lora(name)}
    assert uninterrupted["mask_embedding"].any() and uninterrupted["mask_embedding"].dtype == torch.float32
    assert json.loads((tmp_path / "uninterrupted/checkpoint-2/resume.json").read_text())["origin"]["llm_dtype"] == kind
    with pytest.raises(RecipeError, match=f"another recipe \\(llm_dtype was '{kind}' and is 'float32'[;)]"):
        refinement.main(
            recipe(tmp_path / "uninterrupted", manifest, 4, training=SAVING, **{**settings, "llm_dtype": "float32"})
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_is_read_back(kind, stage_2, manifest, tmp_path):
    training = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    training |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the worst: not the last
    instruction.main(recipe(tmp_path, manifest, 4, model=stage_2["float32"], llm_dtype=kind, training=training))
    rates = losses(tmp_path, "eval_loss")
    assert rates[0] > rates[1]
    assert not changed(stored(tmp_path), stored(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_trained_in_fp32(kind, stage_2, manifest, tmp_path, monkeypatch):
    seen = {}

    class Watched(instruction.InstructionTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            seen.update({name: (one.dtype, one.grad, one.requires_grad) for name, one in model.named_parameters()})
            return loss

    monkeypatch.setattr(instruction, "InstructionTrainer", Watched)
    instruction.main(recipe(tmp_path, manifest, 1, model=stage_2["float32"], llm_dtype=kind))
    for name, (dtype, gradient, is_trained) in seen.items():
        assert is_trained == is_lora(name)
        if is_trained:
            assert dtype == gradient.dtype == torch.float32 and gradient.any()
        else:
            assert gradient is None
            held = name.startswith("language_model.")
            assert dtype in ((torch.bfloat16, torch.uint8) if held else (torch.float32,)), name
    quantized = {name for name, (dtype, _, _) in seen.items() if dtype == torch.uint8}
    assert bool(quantized) == (kind == "4bit") and all(name.endswith("_proj.base_layer.weight") for name in quantized)
    assert seen["language_model.model.embed_tokens.weight"][0] == torch.bfloat16


def test_stage_1_is_the_same_beside_an_llm_in_bf16(stage_2, manifest, tmp_path):
    """Stage 1 is kept in fp32, so tokens that were decoded with the LLM in fp32 are not stale."""
    settings = {"model": stage_2["float32"], "alignment_cache": str(tmp_path / "cache"), "llm_dtype": "bfloat16"}
    stage1_decoding.main(recipe(tmp_path / "3", manifest, 2, **settings))
    metrics = refinement.main(recipe(tmp_path / "3", manifest, 2, **settings))
    assert np.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_around_an_llm_in_less_precision(kind, backbones, manifest, tmp_path):
    config = {"bridge": "linear", "bridge_config": {"hidden_size": 64}, "lora_rank": 4, "lora_dropout": 0.0}
    settings = {"encoder": backbones[0], "llm": backbones[1], "config": config}
    for name in ("float32", kind):
        instruction.main(recipe(tmp_path / name, manifest, 2, training=SAVING, llm_dtype=name, **settings))
    full, ours = stored(tmp_path / "float32"), stored(tmp_path / kind)
    moved = changed(full, ours)
    assert moved and all(is_lora(name) or name.startswith("bridge.") for name in moved)
    tolerance = 0.01 if kind == "bfloat16" else 0.15
    np.testing.assert_allclose(losses(tmp_path / kind), losses(tmp_path / "float32"), rtol=tolerance)


def test_an_llm_that_is_gone_or_changed_is_not_saved(stage_2, tmp_path):
    model = SeamForSpeechRecognition.from_pretrained(stage_2["float32"], llm_dtype="bfloat16")
    model.save_pretrained(tmp_path)
    assert not changed(stored(stage_2["float32"]), stored(tmp_path))
    held = SeamForSpeechRecognition.from_pretrained(tmp_path, llm_dtype="bfloat16")
    with pytest.raises(ValueError, match="in less precision than it is saved in"):
        held.merge_lora()
    with torch.no_grad():
        held.bridge.layer_norm.bias.fill_(7)
    for _ in range(2):  # over what it was read from
        held.save_pretrained(tmp_path)
    assert changed(stored(stage_2["float32"]), stored(tmp_path)) == {"bridge.layer_norm.bias"}
    other = SeamForSpeechRecognition.from_pretrained(tmp_path)
    with torch.no_grad():
        other.language_model.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="the weights of the LLM have changed since it was loaded"):
        held.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="cannot be read there"):
        held.save_pretrained(tmp_path)


def test_4bit_has_the_same_gradients_after_an_evaluation(stage_2, processor, waveforms):
    """On some CPUs bitsandbytes turns its weights over at inference, to go on without gradients."""
    model = SeamForSpeechRecognition.from_pretrained(stage_2["float32"], llm_dtype="4bit")
    batch = processor(audio=waveforms[:2], text=["one two three", "two"])
    adapters = [parameter.requires_grad_(True) for name, parameter in model.named_parameters() if is_lora(name)]
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        model.train()(**batch).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in adapters])
        model.zero_grad(set_to_none=False)
        with torch.no_grad():
            model.eval()(**batch)
    assert any(gradient.any() for gradient in gradients[0])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_spread_the_weights_are_refused(engine, kind, manifest, tmp_path, monkeypatch):
    settings = recipe(tmp_path, manifest, 1, model="nowhere", llm_dtype=kind)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")  # as `accelerate launch` does
    with pytest.raises(RecipeError, match=f"^llm_dtype is '{kind}', but FSDP2 and DeepSpeed take weights of one"):
        instruction.main(settings)


def test_what_is_not_accepted_is_refused(stage_1, manifest, tmp_path):
    with pytest.raises(RecipeError, match="llm_dtype is 'float16'; accepted: float32, bfloat16, 4bit"):
        recipe(tmp_path, manifest, 1, llm_dtype="float16")
    with pytest.raises(RecipeError, match="^llm_dtype is no setting of seam train alignment"):
        alignment.main(recipe(tmp_path, manifest, 1, model=stage_1, llm_dtype="bfloat16"))
