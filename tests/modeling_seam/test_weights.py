"""Damaged, swapped and missing files of a checkpoint: each is refused by its name."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seam.experiments import tiny_backbones
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.modeling_seam.pipeline import SeamPipeline
from seam.modeling_seam.weights import fingerprint, read_fingerprint, sampled_fingerprint, weight_files

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def saved(model, processor, tmp_path_factory) -> dict[str, Path]:
    """One checkpoint as one file and in shards."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="300KB")
    for name in ("single", "sharded"):
        processor.save_pretrained(folder / name)
    return {"single": folder / "single", "sharded": folder / "sharded"}


@pytest.fixture
def copy(saved, tmp_path):
    def copy(kind: str = "single") -> Path:
        return Path(shutil.copytree(saved[kind], tmp_path / kind))

    return copy


def refused(folder: Path, message: str, error=ValueError, what=SeamForSpeechRecognition):
    with pytest.raises(error, match=message):
        what.from_pretrained(folder)


def cut(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# ---- weights ----


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_weight_file_that_is_cut_off(copy, keep):
    folder = copy()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else keep])
    refused(folder, "model.safetensors is damaged")


def test_a_shard_that_is_cut_off_or_missing(copy):
    folder = copy("sharded")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    cut(shard)
    refused(folder, f"{shard.name} is damaged")
    shard.unlink()
    refused(folder, f"lacks {shard.name}, which model.safetensors.index.json names", OSError)


@pytest.mark.parametrize("index", ["", "{", "[1]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_damaged_index(copy, index):
    folder = copy("sharded")
    (folder / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    refused(folder, "model.safetensors.index.json is damaged")


def test_an_index_that_names_files_elsewhere(copy, saved):
    folder = copy("sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../single/model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(saved["single"], folder.parent / "single")
    refused(folder, "lacks ../single/model.safetensors", OSError)


def test_weights_of_another_model_of_the_same_shape(copy, build_model, tmp_path):
    folder, other = copy(), build_model()
    torch.nn.init.normal_(other.bridge.layers[0].fc1.weight)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    refused(folder, "model.safetensors is not the weight file that config.json was saved with")


def test_a_shard_of_another_model(copy, build_model, tmp_path):
    folder, other = copy("sharded"), build_model()
    torch.nn.init.normal_(other.bridge.layers[0].fc1.weight)
    other.save_pretrained(tmp_path / "other", max_shard_size="300KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shutil.copy(tmp_path / "other" / index["weight_map"]["bridge.layers.0.fc1.weight"], folder)
    refused(folder, "is not the weight file that config.json was saved with")


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(copy, kind, value):
    folder = copy(kind)
    name = "bridge.layers.0.fc1.weight"
    for file in folder.glob("model*.safetensors"):
        weights = load_file(file)
        if name in weights:
            weights[name][3, 5] = value
            save_file(weights, file, metadata={"format": "pt"})
            damaged = file
    refused(folder, f"{damaged.name} is damaged: {name} holds NaN")


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_pickles_are_never_opened(copy, tmp_path, kind):
    folder, marker = copy(kind), tmp_path / "unpickled"
    payload = pickle.dumps(Marker(marker))
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin"):
        (folder / name).write_bytes(payload)
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    SeamForSpeechRecognition.from_pretrained(folder)  # beside safetensors they are not looked at
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    refused(folder, "holds neither model.safetensors nor model.safetensors.index.json", OSError)
    assert not marker.exists()
    pickle.loads(payload)  # nosec: the test's own
    assert marker.exists()


def test_fingerprints_see_values_names_and_types(saved, tmp_path):
    weights = load_file(saved["single"] / "model.safetensors")
    name = "bridge.layers.0.fc1.weight"

    def saved_as(weights) -> str:
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return read_fingerprint(weight_files(tmp_path))

    same = saved_as(weights)
    assert same == read_fingerprint(weight_files(saved["single"]))
    assert same == read_fingerprint(weight_files(saved["sharded"]))  # the same weights, however they lie
    others = {
        saved_as({**weights, name: weights[name] * 1.001}),
        saved_as({**weights, name: weights[name].half()}),
        saved_as({**weights, name: weights[name].reshape(-1)}),
        saved_as({**weights, "more": torch.zeros(1)}),
        saved_as({key.replace("fc1", "fc3"): value for key, value in weights.items()}),
        saved_as({**weights, "empty": torch.zeros(0), "scalar": torch.tensor(1.0)}),
    }
    assert len(others | {same}) == 7


def flip_a_bit(file: Path, position: float) -> None:
    """Change the lowest bit of a byte, at a share of the weights: the number stays finite and nearly the same."""
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + int(position * (len(data) - begin)) // 4 * 4] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("position", [0, 0.123, 0.5, 0.777, 0.9999])
def test_a_single_bit_that_flipped_anywhere_is_found(copy, kind, position):
    folder = copy(kind)
    file = sorted(folder.glob("model*.safetensors"))[-1]
    flip_a_bit(file, position)
    refused(folder, f"{file.name} is not the weight file that config.json was saved with")


def test_a_tied_head_that_some_files_hold_does_not_count(saved, tmp_path):
    weights = load_file(saved["single"] / "model.safetensors")
    table = next(weight for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
    same = fingerprint(weights)
    assert fingerprint({**weights, "language_model.lm_head.weight": table.clone()}) == same
    assert fingerprint({**weights, "language_model.lm_head.weight": table + 1}) != same


def test_a_checkpoint_from_before_is_known_by_samples(copy):
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    config["weights_fingerprint"] = sampled_fingerprint(load_file(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    SeamForSpeechRecognition.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "is not the weight file that config.json was saved with")


# ---- texts ----


@pytest.mark.parametrize("damage", ["cut", "empty", "binary", "list"])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("config.json", SeamForSpeechRecognition),
        ("generation_config.json", SeamForSpeechRecognition),
        ("processor_config.json", SeamProcessor),
        ("tokenizer.json", SeamProcessor),
        ("tokenizer_config.json", SeamProcessor),
    ],
)
def test_a_damaged_text_is_named(copy, name, what, damage):
    folder = copy()
    file = folder / name
    if damage == "cut":
        cut(file)
    else:
        file.write_bytes({"empty": b"", "binary": b"\xff\xfe\x00" + file.read_bytes(), "list": b"[1]"}[damage])
    refused(folder, rf"{name}\b.*(damaged|not a valid JSON)", (OSError, ValueError), what)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("config.json", SeamForSpeechRecognition),
        ("processor_config.json", SeamProcessor),
        ("tokenizer.json", SeamProcessor),
    ],
)
def test_a_missing_text_is_named(copy, name, what):
    folder = copy()
    (folder / name).unlink()
    refused(folder, rf"(holds no|lacks) {name}", OSError, what)


def test_a_tokenizer_of_another_model(copy, model):
    folder = copy()
    tiny_backbones.make_tokenizer(["other words for another model altogether"] * 20, 300).save_pretrained(folder)
    other = SeamProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="belongs to another checkpoint"):
        other.check_fits(model.config)
    with pytest.raises(ValueError, match="belongs to another checkpoint"):
        SeamPipeline(model=model, processor=other, task="automatic-speech-recognition")


def swapped(vocabulary: dict[str, int], unlike: str) -> dict[str, int]:
    """Swap the ids of two words, neither of them in a text."""
    first, second = [token for token in vocabulary if token.isalpha() and token not in unlike][-2:]
    return {**vocabulary, first: vocabulary[second], second: vocabulary[first]}


def renamed(vocabulary: dict[str, int], unlike: str) -> dict[str, int]:
    last = [token for token in vocabulary if token.isalpha() and token not in unlike][-1]
    return {f"{token}x" if token == last else token: i for token, i in vocabulary.items()}


@pytest.mark.parametrize("change", [swapped, renamed])
def test_a_tokenizer_with_words_that_changed(copy, model, change):
    """Of which no special token and no word of the prompt is one."""
    folder = copy()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    prompt = SeamProcessor.from_pretrained(folder).prompt_ids()
    tokenizer["model"]["vocab"] = change(vocabulary, [token for token, i in vocabulary.items() if i in prompt])
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ValueError, match="vocabulary is not the model's .config.vocabulary_fingerprint.: tokenizer.json"
    ):
        SeamProcessor.from_pretrained(folder).check_fits(model.config)


def test_another_prompt_than_the_models(copy, model):
    folder = copy()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template + "more")
    with pytest.raises(ValueError, match="chat_template.jinja or processor_config.json belongs"):
        SeamProcessor.from_pretrained(folder).check_fits(model.config)
