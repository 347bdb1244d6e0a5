"""What the trainings of `bench.training` start from: sizes, recordings, tokenizer, and SEAM's models at random."""

import random
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    TrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from seam.bench.common import RECIPES
from seam.configuration_seam import SeamConfig
from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.experiments import tiny_backbones
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.processing_seam import DEFAULT_INSTRUCTION
from seam.train.describe import backbone_config
from seam.train.recipe import StageRecipe, load_recipe

SIZES = ("tiny", "base", "small", "paper")
STATES_PER_SECOND = 50  # of the encoder
TOKENIZER_VOCABULARY = 400  # smaller than the models' vocabularies, which are as large as those of published models

SHIPPED = read_manifest((Path(__file__).parents[2] / "checkpoints" / "recordings") / "manifest.jsonl")
TEXTS = [utterance.text for utterance in SHIPPED]


def write_speech(folder: Path, count: int, window: float) -> list[Utterance]:
    """
    Write recordings and their `manifest.jsonl`: shipped recordings, joined at random until no other fits the window.

    Args:
        folder: to be written.
        count: number of recordings.
        window: greatest number of seconds of a recording.
    """
    folder.mkdir(parents=True, exist_ok=True)
    utterances = []
    for number in range(count):
        order, parts, left = random.Random(number), [], window
        while fitting := [one for one in SHIPPED if one.duration <= left]:
            parts.append(order.choice(fitting))
            left -= parts[-1].duration
        sounds = [soundfile.read(part.audio, dtype="float32") for part in parts]
        ((rate,),) = ({one for _, one in sounds},)
        path, waveform = folder / f"{number}.wav", np.concatenate([sound for sound, _ in sounds])
        soundfile.write(path, waveform, rate)
        utterances.append(Utterance(path, " ".join(part.text for part in parts), len(waveform) / rate))
    return read_manifest(write_manifest(folder / "manifest.jsonl", utterances))


@dataclass
class Sizes:
    """
    Hold the sizes of the models, which SEAM and its baselines share.

    Args:
        whisper: config of the encoder and of Stage 1's baseline; its decoder has the sizes of the aligner.
        llm: config of the language model.
        fields: further fields of `SeamConfig`, LoRA's among them.
        dtype: of all computations, by autocast unless it is fp32: weights are kept in fp32.
    """

    whisper: WhisperConfig
    llm: PreTrainedConfig
    fields: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16

    @property
    def window(self) -> int:
        """The seconds of audio that the encoder reads at once."""
        return self.whisper.max_source_positions // STATES_PER_SECOND


def sizes_of(name: str) -> Sizes:
    """
    Return the sizes called `name`.

    `small` and `paper` are those of `recipes`; `base` is Whisper-base and a language model of 0.2 B parameters with
    Qwen3's vocabulary; `tiny` has a window of 2 s and computes in fp32.
    """
    recipe = RECIPES / ("paper" if name == "paper" else "small") / "alignment.yaml"
    recipe = load_recipe(StageRecipe, recipe, ["training.use_cpu=true"])
    fields = dict(recipe.config)
    decoder = fields.pop("aligner_config")
    if name == "tiny":
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 100}
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
        whisper = WhisperConfig(d_model=64, vocab_size=1000, **heads, **layers)
        llm = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
        llm |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024}
        return Sizes(whisper, Qwen3Config(**llm, tie_word_embeddings=True), fields, torch.float32)
    if name == "base":
        heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
        layers = {"encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
        whisper = WhisperConfig(d_model=512, **heads, **layers)
        llm = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 64}
        llm |= {"num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 151936}
        return Sizes(whisper, Qwen3Config(**llm, tie_word_embeddings=True), fields)
    whisper = backbone_config(recipe.encoder).to_dict() | decoder
    return Sizes(WhisperConfig(**whisper), backbone_config(recipe.llm), fields)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer that SEAM and its baselines share."""
    return tiny_backbones.make_tokenizer([*TEXTS, DEFAULT_INSTRUCTION] * 20, TOKENIZER_VOCABULARY)


def make_processor(sizes: Sizes) -> SeamProcessor:
    """Make the processor of a size."""
    return SeamProcessor(make_feature_extractor(sizes), make_tokenizer())


def make_feature_extractor(sizes: Sizes) -> WhisperFeatureExtractor:
    """Make the feature extractor of a size."""
    return WhisperFeatureExtractor(feature_size=sizes.whisper.num_mel_bins, chunk_length=sizes.window)


def make_seam(sizes: Sizes, processor: SeamProcessor, alignment_only: bool) -> SeamForSpeechRecognition:
    """Make SEAM with random weights: with `alignment_only` what Stage 1 trains, otherwise what Stages 2 and 3 train."""
    torch.manual_seed(0)  # equal weights in every process and part: cached states are valid for those weights alone
    config = SeamConfig.from_backbones(
        deepcopy(sizes.whisper),  # `Trainer` modifies the config of its model
        deepcopy(sizes.llm),
        alignment_only=alignment_only,
        boa_token_id=processor.boa_token_id,
        eoa_token_id=processor.eoa_token_id,
        audio_token_id=processor.audio_token_id,
        prompt_token_ids=processor.prompt_ids(),
        **sizes.fields,
    )
    return SeamForSpeechRecognition(config)


@dataclass
class Setting:
    """
    Hold what all trainings of a run share.

    Args:
        size: one of `SIZES`.
        device: `cpu` or `cuda`.
        batch: utterances per step and process.
        steps: per training.
        utterances: training data, as many as the steps consume.
        folder: where caches, checkpoints and recordings are written.
    """

    size: str
    device: str
    batch: int
    steps: int
    utterances: list[Utterance]
    folder: Path

    @cached_property
    def sizes(self) -> Sizes:
        """Return the sizes of the models."""
        return sizes_of(self.size)

    @cached_property
    def processor(self) -> SeamProcessor:
        """Return the processor of all systems."""
        return make_processor(self.sizes)

    @cached_property
    def alignment_model(self) -> SeamForSpeechRecognition:
        """The model of all systems that train Stage 1."""
        return make_seam(self.sizes, self.processor, alignment_only=True).to(self.device)

    @cached_property
    def model(self) -> SeamForSpeechRecognition:
        """The model of all systems that train Stages 2 and 3."""
        return make_seam(self.sizes, self.processor, alignment_only=False).to(self.device)

    def arguments(self, cls: type[TrainingArguments] = TrainingArguments) -> TrainingArguments:
        """Return training arguments with the optimizer of the recipes."""
        return cls(
            output_dir=str(self.folder / "training"),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch,
            learning_rate=5e-4,
            weight_decay=0.01,
            max_grad_norm=1.0,
            warmup_steps=2000,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            bf16=self.sizes.dtype == torch.bfloat16,
            use_cpu=self.device == "cpu",
            # On a CPU the training uses all cores: a process that loads data would slow it down.
            dataloader_num_workers=8 if self.device == "cuda" else 0,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
