"""Tiny random models of the real classes. Small, but initialised wide: audio and words must make a difference."""

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

# Before anything imports numpy, torch, or huggingface_hub; what tests start inherits it. Models so small gain nothing
# from more threads, and two processes that share two cores lose by them.
os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import numpy as np  # noqa: E402  reads the environment
import pytest  # noqa: E402  reads the environment
import torch  # noqa: E402  reads the environment

from seam.experiments import tiny_backbones  # noqa: E402  reads the environment
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor  # noqa: E402  reads the environment
from seam.tests.helpers import forked, whispers  # noqa: E402  reads the environment

SENTENCES = ["turn on the light in the kitchen", "one two three", "the old goat eats the hay", "stop the music please"]
WHISPER_SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_target_positions": 24,
    "init_std": 0.3,
}
QWEN_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.125,
    "max_position_embeddings": 256,
}


def pytest_collection_finish():
    """Take what was imported out of garbage collection, which every training asks for: going through it took 0.7 s."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Keep what takes seconds out of `make check`: only tests marked medium or slow may train or start Python."""
    if item.get_closest_marker("medium") or item.get_closest_marker("slow"):
        return (yield)
    popen, trainer = subprocess.Popen.__init__, sys.modules.get("transformers.trainer")

    def start(self, args, *more, **options):
        if args[0] == sys.executable:
            pytest.fail("starts a process: mark it medium")
        popen(self, args, *more, **options)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(subprocess.Popen, "__init__", start))
        for owner, name in [(forked, "run")] + [(trainer.Trainer, "train")] * bool(trainer):
            refuse = mock.Mock(side_effect=lambda *_, **__: pytest.fail("trains or starts a process: mark it medium"))
            patches.enter_context(mock.patch.object(owner, name, refuse))
        return (yield)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real recordings and texts beside the checkout, or skip the test."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "speech" / "metadata.jsonl").is_file():
        pytest.skip("no ../shared/speech beside the checkout")
    return folder


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny Whisper with a window of 2 s and of a tiny Qwen3."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    tokenizer = tiny_backbones.make_tokenizer(SENTENCES * 20, 340)
    whisper, feature_extractor = tiny_backbones.make_whisper(tokenizer, 2, **WHISPER_SIZES)
    language_model = tiny_backbones.make_qwen3(tokenizer, **QWEN_SIZES)
    return (
        tiny_backbones.save_backbone(folder / "whisper", whisper, tokenizer, feature_extractor),
        tiny_backbones.save_backbone(folder / "llm", language_model, tokenizer),
    )


@pytest.fixture(scope="session")
def processor(backbones) -> SeamProcessor:
    return SeamProcessor.from_backbones(*backbones)


@pytest.fixture(scope="session")
def build_model(backbones, processor) -> Callable[..., SeamForSpeechRecognition]:
    """Return a function that makes a model which the test may change."""
    return partial(_built, backbones, processor)


def _built(folders: tuple[str, str], processor: SeamProcessor, **config) -> SeamForSpeechRecognition:
    torch.manual_seed(1)
    model = SeamForSpeechRecognition.from_backbones(*folders, processor, **{"lora_rank": 4, **config}).eval()
    with torch.no_grad():  # LoRA starts as a no-op; a test must see it
        for name, parameter in model.language_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


@pytest.fixture(scope="session")
def model(build_model) -> SeamForSpeechRecognition:
    """Shared by all tests: read only."""
    return build_model()


@pytest.fixture(scope="session")
def multilingual(backbones, tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny multilingual Whisper, whose vocabulary is its own, and of the tiny Qwen3."""
    folder = tmp_path_factory.mktemp("multilingual")
    return whispers.save_whisper(folder, whispers.make_tokenizer(), 2, **WHISPER_SIZES), backbones[1]


@pytest.fixture(scope="session")
def build_table_model(multilingual, processor) -> Callable[..., SeamForSpeechRecognition]:
    """Return a function that makes a model whose aligner is the multilingual Whisper's decoder."""
    return partial(_built, multilingual, processor, token_projection="table")


@pytest.fixture(scope="session")
def table_model(build_table_model) -> SeamForSpeechRecognition:
    """Shared by all tests: read only."""
    return build_table_model()


@pytest.fixture(scope="session")
def waveforms() -> list[np.ndarray]:
    """Sounds of different lengths, all shorter than the window of 2 s: tones that move, in noise."""
    rng = np.random.default_rng(0)
    sounds = []
    for samples in (6400, 12345, 20000, 31000):
        time = np.arange(samples) / 16000
        tone = np.sin(2 * np.pi * rng.uniform(150, 900) * time * (1 + 0.5 * np.sin(3 * time)))
        sounds.append((0.3 * tone + 0.05 * rng.standard_normal(samples)).astype(np.float32))
    return sounds


@pytest.fixture(scope="session")
def predict_end():
    """Return a function that silences a model: its aligner predicts nothing but `<EOA>`."""

    def predict_end(model):
        with torch.no_grad():
            model.bridge.layer_norm.weight.zero_()
            model.bridge.layer_norm.bias.fill_(1.0)
            if model.config.token_projection == "table":
                model.bridge.token_table.weight.zero_()[model.config.eoa_token_id] = 1.0
                return
            eoa = model.get_input_embeddings().weight[model.config.eoa_token_id]
            width = model.bridge.output_projection.weight.shape[1]
            model.bridge.output_projection.weight.copy_(eoa[:, None].expand(-1, width) / width)

    return predict_end
