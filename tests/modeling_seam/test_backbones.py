"""Backbones laid out as the published checkpoints are, whole and by their embedding table alone."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, WhisperConfig

from seam.bench.full_size import qwen3_tensors, whisper_tensors, write_published
from seam.modeling_seam import SeamForSpeechRecognition
from seam.modeling_seam.backbones import load_embedding_table
from seam.tests.conftest import QWEN_SIZES, WHISPER_SIZES

pytestmark = pytest.mark.oldest

# Whisper-large-v2's encoder and decoder, Qwen3-4B and Qwen3-0.6B have so many tensors.
WHISPER_LARGE_V2_TENSORS = 1259
QWEN3_4B_TENSORS = 398


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    specials = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = WhisperConfig(vocab_size=300, max_source_positions=100, **specials, **WHISPER_SIZES)
    config.architectures = ["WhisperForConditionalGeneration"]
    folder = tmp_path_factory.mktemp("published") / "whisper"
    return write_published(folder, config, whisper_tensors(config), 1, torch.float32)


@pytest.fixture(scope="module", params=["tied", "tied, head stored", "not tied"])
def llm(request, tmp_path_factory) -> Path:
    config = Qwen3Config(vocab_size=340, tie_word_embeddings=request.param != "not tied", **QWEN_SIZES)
    config.architectures = ["Qwen3ForCausalLM"]
    folder = tmp_path_factory.mktemp("published") / "qwen"
    return write_published(folder, config, qwen3_tensors(config, request.param != "tied"), 3, torch.bfloat16)


def build(encoder: Path, llm: Path, **config) -> SeamForSpeechRecognition:
    torch.manual_seed(3)
    ids = {"boa_token_id": 1, "eoa_token_id": 2, "audio_token_id": 339, "lora_rank": 4}
    return SeamForSpeechRecognition.from_backbones(str(encoder), str(llm), **ids, **config)


def test_the_published_number_of_tensors():
    large = {"encoder_layers": 32, "decoder_layers": 32}
    assert len(dict(whisper_tensors(WhisperConfig(**large)))) == WHISPER_LARGE_V2_TENSORS
    assert len(dict(qwen3_tensors(Qwen3Config(num_hidden_layers=36), lm_head=False))) == QWEN3_4B_TENSORS


def test_every_published_weight_is_found_in_the_model(whisper, llm):
    assert len(list(llm.glob("model-*.safetensors"))) == 3
    model = build(whisper, llm)
    ours = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    theirs = {f"language_model.{name}": value for name, value in stored(llm).items()}
    theirs |= {
        name.removeprefix("model."): value
        for name, value in stored(whisper).items()
        if name.startswith("model.encoder.")
    }
    for name, value in theirs.items():
        assert torch.equal(ours.pop(name), value.float()), name
    left = {name for name in ours if not name.startswith("bridge.") and ".lora_" not in name}
    assert left <= {"language_model.lm_head.weight"}  # tied: the table under a second name


def test_the_table_alone_is_read(whisper, llm):
    table = load_embedding_table(str(llm), torch.float32)
    assert [name for name, _ in table.named_parameters()] == ["embed_tokens.weight"]
    assert torch.equal(table.embed_tokens.weight, stored(llm)["model.embed_tokens.weight"].float())
    alone, whole = build(whisper, llm, alignment_only=True), build(whisper, llm)
    assert [name for name in alone.state_dict() if name.startswith("language_model.")] == [
        "language_model.embed_tokens.weight"
    ]
    for name, value in alone.state_dict().items():
        if not name.startswith("language_model."):
            assert torch.equal(value, whole.state_dict()[name]), name


def test_a_model_saved_without_its_head_has_a_table_too(llm, tmp_path):
    shutil.copytree(llm, tmp_path / "llm")
    for file in (tmp_path / "llm").glob("model*"):
        file.unlink()
    table = torch.randn(340, QWEN_SIZES["hidden_size"])
    save_file({"embed_tokens.weight": table}, tmp_path / "llm" / "model.safetensors")
    assert torch.equal(load_embedding_table(str(tmp_path / "llm"), torch.float32).embed_tokens.weight, table)
    save_file({"embed_tokens.weight": table[:99]}, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(99, 48\), its config says \(340, 48\)"):
        load_embedding_table(str(tmp_path / "llm"), torch.float32)
    save_file({"wte.weight": table}, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(ValueError, match="holds no tensor model.embed_tokens.weight"):
        load_embedding_table(str(tmp_path / "llm"), torch.float32)


# ---- Stage 1 alone, and the LLM put in later ----


@pytest.fixture
def alone(backbones, processor) -> SeamForSpeechRecognition:
    torch.manual_seed(1)
    config = {"lora_rank": 4, "alignment_only": True}
    return SeamForSpeechRecognition.from_backbones(*backbones, processor, **config).eval()


def test_stage_1_alone_hears_what_the_whole_model_hears(alone, model, processor, waveforms):
    inputs = processor(audio=waveforms)
    stage1_ids = alone.generate(**inputs)
    assert torch.equal(stage1_ids, model.generate(**inputs, use_llm=False))
    assert torch.equal(stage1_ids, alone.generate(**inputs, use_llm=False))
    with pytest.raises(ValueError, match="use_llm: this checkpoint holds Stage 1 alone"):
        alone.generate(**inputs, use_llm=True)
    labels = processor(text=["one two three"] * len(waveforms))["labels"]
    assert torch.equal(alone(**inputs, labels=labels).loss, model(**inputs, labels=labels, use_llm=False).loss)


def test_stage_1_alone_is_saved_and_loaded(alone, processor, waveforms, tmp_path):
    alone.save_pretrained(tmp_path)
    assert sum(name.startswith("language_model.") for name in load_file(tmp_path / "model.safetensors")) == 1
    again = SeamForSpeechRecognition.from_pretrained(tmp_path)
    assert again.config.alignment_only
    inputs = processor(audio=waveforms)
    assert torch.equal(again.generate(**inputs), alone.generate(**inputs))
    with pytest.raises(ValueError, match="no LoRA to fold in"):
        again.merge_lora()


def test_the_llm_put_in_later_is_the_llm_put_in_at_once(alone, backbones, processor, tmp_path):
    torch.manual_seed(1)
    whole = SeamForSpeechRecognition.from_backbones(*backbones, processor, lora_rank=4)
    assert alone.add_llm(backbones[1]) is alone
    for name, value in whole.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(alone.state_dict()[name], value), name
    assert not any(parameter.requires_grad for parameter in alone.language_model.parameters())
    assert alone.config.text_config.to_dict() == whole.config.text_config.to_dict()
    alone.save_pretrained(tmp_path)
    again = SeamForSpeechRecognition.from_pretrained(tmp_path)
    assert not again.config.alignment_only
    with pytest.raises(ValueError, match="holds its LLM already"):
        again.add_llm(backbones[1])


def test_another_llm_is_refused(alone, llm):
    with pytest.raises(ValueError, match="does not say which LLM it is for"):
        alone.add_llm()
    with pytest.raises(ValueError, match="its embedding table is another"):
        alone.add_llm(str(llm))
    assert alone.config.alignment_only
