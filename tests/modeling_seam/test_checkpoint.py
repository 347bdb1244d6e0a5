"""Saving and loading: whole, in shards, light, interrupted and merged."""

import json
import os
import shutil
import signal
import sys
import textwrap
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSpeechSeq2Seq

from seam.modeling_seam import SeamForSpeechRecognition
from seam.modeling_seam.saving import STAGING, save_lora
from seam.modeling_seam.weights import read_fingerprint, weight_files
from seam.tests.helpers import forked
from seam.tests.helpers.hub_cache import add_to_cache

pytestmark = pytest.mark.oldest

TEXTS = ["one two three", "turn on the light in the kitchen", "stop", "the old goat"]
COMMITS = {"encoder": "a" * 40, "llm": "b" * 40}


@pytest.fixture(scope="module")
def inputs(processor, waveforms):
    return processor(audio=waveforms, text=TEXTS)


@pytest.fixture(scope="module")
def logits(inputs):
    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**inputs).logits

    return logits


def load(folder, **options) -> SeamForSpeechRecognition:
    return SeamForSpeechRecognition.from_pretrained(folder, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- whole ----


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_weights_are_as_readable_as_the_config(build_model, tmp_path, mask):
    model = build_model()
    before = os.umask(mask)
    try:
        model.save_pretrained(tmp_path / "whole", max_shard_size="100KB")
        save_lora(model.language_model, tmp_path / "adapter")
    finally:
        os.umask(before)
    files = [*tmp_path.rglob("*.safetensors")]
    assert len(files) > 2 and {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


def test_saved_twice_it_is_the_same_in_every_byte(model, logits, tmp_path):
    model.save_pretrained(tmp_path / "once")
    once = load(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    twice = load(tmp_path / "twice")
    assert content(tmp_path / "once") == content(tmp_path / "twice")
    assert torch.equal(logits(once), logits(model)) and torch.equal(logits(twice), logits(model))
    once.save_pretrained(tmp_path / "twice")  # over itself
    assert content(tmp_path / "once") == content(tmp_path / "twice")


def test_a_checkpoint_carries_its_code(build_model, tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    source = Path(__file__).parents[2] / "modeling_seam"
    saved = {path.name for path in (tmp_path / "modeling_seam").iterdir()}
    assert saved == {path.name for path in source.glob("*.py")} - {"__init__.py"}
    assert (tmp_path / "configuration_seam.py").is_file() and not (tmp_path / STAGING).exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_seam.SeamConfig",
        "AutoModel": "modeling_seam/modeling_seam.SeamForSpeechRecognition",
        "AutoModelForMultimodalLM": "modeling_seam/modeling_seam.SeamForSpeechRecognition",
        "AutoModelForSpeechSeq2Seq": "modeling_seam/modeling_seam.SeamForSpeechRecognition",
    }
    assert config["custom_pipelines"]["automatic-speech-recognition"]["impl"] == "modeling_seam/pipeline.SeamPipeline"
    assert config["light_checkpoint"] is False and len(config["weights_fingerprint"]) == len("sha256:") + 64


def test_shards_and_one_file_replace_each_other(model, logits, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    sharded = load(tmp_path)
    assert torch.equal(logits(sharded), logits(model))
    sharded.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*.safetensors*")] == ["model.safetensors"]
    sharded.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards and not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_loaded_in_another_precision_and_to_a_device(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    half = load(tmp_path, dtype=dtype, device_map="cpu")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in load(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_a_learned_mask_is_saved_whole(build_model, logits, tmp_path):
    model = build_model()
    assert "mask_embedding" not in model.state_dict() and not model.config.learned_mask
    before = logits(model)
    model.add_mask_embedding()
    assert torch.equal(model.mask_embedding, torch.zeros(48)) and torch.equal(logits(model), before)
    with torch.no_grad():
        model.mask_embedding.copy_(torch.arange(48.0))
    model.save_pretrained(tmp_path / "once")
    once = load(tmp_path / "once")
    assert torch.equal(once.mask_embedding, torch.arange(48.0)) and once.config.learned_mask
    once.save_pretrained(tmp_path / "twice")
    assert content(tmp_path / "once") == content(tmp_path / "twice")
    assert load(tmp_path / "once", dtype=torch.bfloat16).mask_embedding.dtype == torch.bfloat16
    weights = load_file(tmp_path / "once" / "model.safetensors")
    del weights["mask_embedding"]
    save_file(weights, tmp_path / "once" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing keys .mask_embedding"):
        load(tmp_path / "once")


def test_a_new_model_can_have_a_learned_mask(build_model):
    model = build_model(learned_mask=True)
    assert torch.equal(model.mask_embedding, torch.zeros(48)) and not model.mask_embedding.requires_grad


@pytest.fixture
def drafts(inputs):
    """Return the tokens of a model's draft head for the inputs."""

    def drafts(model) -> list[list[int]]:
        with torch.no_grad():
            ids, mask = model.draft_head.decode(*model.encode(inputs["input_features"], inputs["attention_mask"]))
        return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]

    return drafts


def test_a_draft_head_is_saved_whole(build_model, logits, drafts, tmp_path):
    model = build_model()
    before = logits(model)
    assert model.add_draft_head(range(300, 9, -1)) is model
    torch.nn.init.normal_(model.draft_head.head.weight, std=0.5)
    assert model.draft_head.head.weight.shape == (292, 32) and model.config.draft_vocabulary == list(range(10, 301))
    assert torch.equal(logits(model), before)
    decoded = drafts(model)
    assert len({tuple(row) for row in decoded}) > 1 and all(10 <= token <= 300 for row in decoded for token in row)
    model.save_pretrained(tmp_path / "once")
    once = load(tmp_path / "once")
    assert torch.equal(once.draft_head.head.weight, model.draft_head.head.weight) and drafts(once) == decoded
    once.save_pretrained(tmp_path / "twice")
    assert content(tmp_path / "once") == content(tmp_path / "twice")
    half = load(tmp_path / "once", dtype=torch.bfloat16)
    assert half.draft_head.head.weight.dtype == torch.bfloat16 and drafts(half)
    assert drafts(load(tmp_path / "once", device_map="cpu")) == decoded
    assert drafts(once.merge_lora()) == decoded
    weights = load_file(tmp_path / "once" / "model.safetensors")
    del weights["draft_head.head.bias"]
    save_file(weights, tmp_path / "once" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing keys .draft_head.head.bias"):
        load(tmp_path / "once")


# ---- interrupted ----


def fail_in_weights(monkeypatch):
    def fail(tensors, filename, **_):
        Path(filename).write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)


def fail_in_config(monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("seam.configuration_seam.SeamConfig.save_pretrained", fail)


def fail_in_code(monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("seam.modeling_seam.saving.shutil.copytree", fail)


def changed(model) -> SeamForSpeechRecognition:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3)
    return model


@pytest.mark.parametrize("fail", [fail_in_weights, fail_in_config, fail_in_code])
def test_a_save_that_fails_leaves_the_old_checkpoint(build_model, logits, tmp_path, monkeypatch, fail):
    model = build_model()
    model.save_pretrained(tmp_path)
    before, old = content(tmp_path), logits(model)
    changed(model)
    with monkeypatch.context() as patched:
        fail(patched)
        with pytest.raises(OSError, match="disk full"):
            model.save_pretrained(tmp_path)
    after = content(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if not name.startswith(STAGING)} == set(before)
    assert torch.equal(logits(load(tmp_path)), old)
    model.save_pretrained(tmp_path)
    assert set(content(tmp_path)) == set(before)
    assert torch.equal(logits(load(tmp_path)), logits(model)) and not torch.equal(logits(model), old)


@pytest.mark.medium
def test_a_killed_save_leaves_the_old_checkpoint(model, logits, tmp_path):
    model.save_pretrained(tmp_path)
    before = content(tmp_path)
    script = f"""
    import os, signal, torch, transformers.modeling_utils as base
    from seam.modeling_seam import SeamForSpeechRecognition
    model = SeamForSpeechRecognition.from_pretrained({str(tmp_path)!r})
    torch.nn.init.zeros_(model.bridge.output_projection.weight)
    save = base.safe_save_file
    def save_and_die(tensors, filename, **options):
        save(tensors, filename, **options)
        os.truncate(filename, os.path.getsize(filename) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    base.safe_save_file = save_and_die
    model.save_pretrained({str(tmp_path)!r})
    """
    done = forked.run([sys.executable, "-c", textwrap.dedent(script)])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / STAGING / "model.safetensors").is_file()
    assert {name: data for name, data in content(tmp_path).items() if not name.startswith(STAGING)} == before
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path)
    assert content(tmp_path) == before


# ---- LoRA folded in ----


def test_merged_lora_says_the_same_without_adapters(build_model, logits, tmp_path):
    model = build_model()
    before = logits(model)
    assert model.merge_lora() is model and model.config.lora_rank == 0
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model.merge_lora()), logits(model))  # nothing left to do
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.lora_rank == 0 and torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="needs LoRA"):
        again.save_pretrained(tmp_path / "light", light=True)


# ---- saved before the bridge was called so ----


def with_old_names(folder: Path) -> Path:
    """Turn a checkpoint into one of that time: `aligner.…` in the weight files, their index and the fingerprint."""
    for file in weight_files(folder):
        weights = {name.replace("bridge.", "aligner.", 1): tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(index.read_text().replace('"bridge.', '"aligner.'))
    config = json.loads((folder / "config.json").read_text())
    config["weights_fingerprint"] = read_fingerprint(weight_files(folder))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def names(folder: Path) -> set[str]:
    return {name.split(".")[0] for file in weight_files(folder) for name in load_file(file)}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "300KB"}])
@pytest.mark.parametrize("llm_dtype", [None, "bfloat16"])
def test_old_names_load_and_are_saved_as_new_ones(model, logits, tmp_path, options, llm_dtype):
    model.save_pretrained(tmp_path / "saved")
    load(tmp_path / "saved").save_pretrained(tmp_path / "new", **options)
    expected = logits(load(tmp_path / "new", llm_dtype=llm_dtype))
    old = with_old_names(Path(shutil.copytree(tmp_path / "new", tmp_path / "old")))
    assert names(old) == {"encoder", "aligner", "language_model"}
    again = load(old, llm_dtype=llm_dtype)
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again", **options)
    assert content(tmp_path / "again") == content(tmp_path / "new")


def test_the_shipped_checkpoint_has_old_names(tmp_path):
    shipped = Path(__file__).parents[2] / "checkpoints" / "tiny"
    assert names(shipped) == {"encoder", "aligner", "language_model"}
    load(shipped).save_pretrained(tmp_path)
    assert names(tmp_path) == {"encoder", "bridge", "language_model"}
    again = load(tmp_path)
    for name, weight in load_file(shipped / "model.safetensors").items():
        assert torch.equal(again.state_dict()[name.replace("aligner.", "bridge.", 1)], weight), name


def test_a_light_checkpoint_with_old_names(from_hub, light, logits, tmp_path):
    new = content(light)
    again = load(with_old_names(light))
    assert "aligner" in names(light) and torch.equal(logits(again), logits(from_hub))
    again.save_pretrained(tmp_path / "again", light=True)
    assert content(tmp_path / "again") == new


# ---- light ----


@pytest.fixture
def cache(backbones, tmp_path, monkeypatch) -> Path:
    """Make a Hub cache that holds the backbones as `owner/whisper` and `owner/llm`."""
    cache = tmp_path / "cache"
    for name, folder, commit in zip(("whisper", "llm"), backbones, COMMITS.values(), strict=True):
        add_to_cache(cache, f"owner/{name}", Path(folder), commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def from_hub(cache, processor) -> SeamForSpeechRecognition:
    torch.manual_seed(1)
    model = SeamForSpeechRecognition.from_backbones("owner/whisper", "owner/llm", processor, lora_rank=4).eval()
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture
def light(from_hub, tmp_path) -> Path:
    from_hub.save_pretrained(tmp_path / "light", light=True)
    return tmp_path / "light"


def test_a_light_checkpoint_holds_what_was_trained_and_loads_the_rest(from_hub, light, logits, tmp_path):
    backbones = from_hub.config.backbones
    assert {role: (one["id"], one["revision"]) for role, one in backbones.items()} == {
        "encoder": ("owner/whisper", COMMITS["encoder"]),
        "llm": ("owner/llm", COMMITS["llm"]),
    }
    names = load_file(light / "model.safetensors").keys()
    assert all(name.startswith("bridge.") or ".lora_" in name for name in names)
    assert any(".lora_" in name for name in names)
    from_hub.save_pretrained(tmp_path / "full")
    full, again = load(tmp_path / "full"), load(light)
    assert torch.equal(logits(again), logits(full)) and torch.equal(logits(full), logits(from_hub))
    assert not again.training and again.config.backbones == backbones and not again.config.light_checkpoint
    assert again.generation_config.to_dict() == full.generation_config.to_dict()
    trainable = {name for name, parameter in full.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} <= trainable
    assert torch.equal(logits(AutoModelForSpeechSeq2Seq.from_pretrained(light)), logits(full))
    # Whole from light, and light from light.
    again.save_pretrained(tmp_path / "full again")
    again.save_pretrained(tmp_path / "light again", light=True)
    assert content(tmp_path / "full again") == content(tmp_path / "full")
    assert content(tmp_path / "light again") == content(light)


def test_a_learned_mask_is_part_of_a_light_checkpoint(from_hub, logits, tmp_path):
    with torch.no_grad():
        from_hub.add_mask_embedding().mask_embedding.copy_(torch.arange(48.0))
    from_hub.save_pretrained(tmp_path / "light", light=True)
    assert "mask_embedding" in load_file(tmp_path / "light" / "model.safetensors")
    again = load(tmp_path / "light")
    assert torch.equal(again.mask_embedding, torch.arange(48.0)) and torch.equal(logits(again), logits(from_hub))
    assert load(tmp_path / "light", dtype=torch.bfloat16).mask_embedding.dtype == torch.bfloat16


def test_a_draft_head_is_part_of_a_light_checkpoint(from_hub, drafts, tmp_path):
    torch.nn.init.normal_(from_hub.add_draft_head(range(10, 300)).draft_head.head.weight, std=0.5)
    from_hub.save_pretrained(tmp_path / "light", light=True)
    names = load_file(tmp_path / "light" / "model.safetensors").keys()
    assert {name for name in names if name.startswith("draft_head.")} == {
        "draft_head.head.weight",
        "draft_head.head.bias",
    }
    again = load(tmp_path / "light")
    assert drafts(again) == drafts(from_hub) and any(drafts(again))
    assert not any(parameter.requires_grad for parameter in again.draft_head.parameters())
    assert load(tmp_path / "light", dtype=torch.bfloat16).draft_head.head.weight.dtype == torch.bfloat16


def test_stage_1_alone_is_light_and_knows_its_llm(cache, processor, waveforms, tmp_path):
    alone = SeamForSpeechRecognition.from_backbones("owner/whisper", "owner/llm", processor, alignment_only=True)
    alone.save_pretrained(tmp_path / "light", light=True)
    assert all(name.startswith("bridge.") for name in load_file(tmp_path / "light" / "model.safetensors"))
    again = load(tmp_path / "light")
    inputs = processor(audio=waveforms)
    assert torch.equal(again.generate(**inputs), alone.eval().generate(**inputs))
    assert again.add_llm().generate(**inputs, use_llm=True).shape[0] == len(waveforms)


@pytest.mark.parametrize("llm_dtype", ["bfloat16", "4bit"])
def test_light_with_its_llm_in_less_precision(from_hub, light, logits, tmp_path, llm_dtype):
    pytest.importorskip("bitsandbytes")
    again = load(light, llm_dtype=llm_dtype)
    held = again.language_model.model.layers[0].mlp.up_proj
    assert held.base_layer.weight.dtype == (torch.bfloat16 if llm_dtype == "bfloat16" else torch.uint8)
    assert held.lora_A.default.weight.dtype == torch.float32
    assert not torch.equal(logits(again), logits(from_hub))
    torch.testing.assert_close(logits(again), logits(from_hub), rtol=0.2, atol=0.2 if llm_dtype == "bfloat16" else 4)
    for name, lightly in (("light again", True), ("full again", False)):
        again.save_pretrained(tmp_path / name, light=lightly)
    from_hub.save_pretrained(tmp_path / "full")
    assert content(tmp_path / "light again") == content(light)
    assert content(tmp_path / "full again") == content(tmp_path / "full")


def test_the_backbones_can_be_named(from_hub, light, logits, backbones, cache):
    shutil.rmtree(cache)
    with pytest.raises(OSError, match=f"encoder owner/whisper at {COMMITS['encoder']} is not to be had"):
        load(light)
    with pytest.raises(OSError, match=f"llm owner/llm at {COMMITS['llm']} is not to be had"):
        load(light, encoder=backbones[0])
    for loader in (SeamForSpeechRecognition, AutoModelForSpeechSeq2Seq):
        named = loader.from_pretrained(light, encoder=backbones[0], llm=backbones[1])
        assert torch.equal(logits(named), logits(from_hub))


def test_a_cache_can_be_named(from_hub, light, logits, cache, tmp_path):
    cache.rename(tmp_path / "elsewhere")
    assert torch.equal(logits(load(light, cache_dir=tmp_path / "elsewhere")), logits(from_hub))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_light_in_another_precision_and_to_a_device(from_hub, light, logits, tmp_path, dtype):
    from_hub.save_pretrained(tmp_path / "full")
    half, full = (load(folder, dtype=dtype, device_map="cpu") for folder in (light, tmp_path / "full"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(half), logits(full))
    assert half.config.dtype == full.config.dtype
    with pytest.raises(ValueError, match="to one device"):
        load(light, device_map={"": "cpu"})


@pytest.mark.parametrize("role", ["encoder", "llm"])
def test_other_weights_than_it_was_trained_with_are_refused(light, cache, role):
    name = {"encoder": "whisper", "llm": "llm"}[role]
    file = cache / f"models--owner--{name}" / "snapshots" / COMMITS[role] / "model.safetensors"
    weights = load_file(file)
    save_file({key: value + 0.01 for key, value in weights.items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"not those of the {role} .*owner/{name}"):
        load(light)
    with pytest.raises(ValueError, match=f"not those of the {role}"):
        load(light, **{role: str(file.parent)})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"id": "../cache"}, ValueError),
        ({"id": "/whisper"}, ValueError),
        ({"id": "whisper"}, ValueError),
        ({"id": ".."}, ValueError),
        ({"id": None}, ValueError),
        ({"id": "folder/whisper"}, OSError),  # there is such a folder here, but an id is never a folder
        ({"revision": "main"}, ValueError),
        ({"revision": "../.."}, ValueError),
        ({"revision": "A" * 40}, ValueError),
        ({"revision": None}, ValueError),
        ({"fingerprint": None}, ValueError),
    ],
)
def test_a_config_cannot_name_a_path_or_a_branch(light, backbones, tmp_path, monkeypatch, change, error):
    os.makedirs(tmp_path / "cwd" / "folder")
    monkeypatch.chdir(tmp_path / "cwd")
    for copy in ("folder/whisper", "whisper"):
        shutil.copytree(backbones[0], copy)
    config = json.loads((light / "config.json").read_text())
    config["backbones"]["encoder"].update(change)
    (light / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match="light checkpoint"):
        load(light)


@pytest.mark.parametrize("record", [None, {}, {"encoder": None, "llm": None}, {"encoder": "owner/whisper"}])
def test_a_light_config_without_backbones_is_refused(light, record):
    config = json.loads((light / "config.json").read_text())
    (light / "config.json").write_text(json.dumps({**config, "backbones": record}))
    with pytest.raises(ValueError, match="a light checkpoint names a Hub id"):
        load(light)


def test_light_needs_backbones_of_the_hub(model, backbones, tmp_path):
    assert model.config.backbones is None  # they came from folders
    with pytest.raises(ValueError, match="backbones of the Hub"):
        model.save_pretrained(tmp_path / "light", light=True)
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="no light checkpoint"):
        load(tmp_path / "full", encoder=backbones[0])


def test_a_light_checkpoint_that_lacks_a_weight_is_refused(light):
    weights = load_file(light / "model.safetensors")
    del weights["bridge.output_projection.weight"]
    save_file(weights, light / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing or unexpected keys .bridge.output_projection.weight"):
        load(light)


def test_a_variant_beside_the_weights_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="one set of weights"):
        model.save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.iterdir())
