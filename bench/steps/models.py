"""The models of `bench.training`, with random weights: SEAM's stages, and peers of equal sizes."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from seam.bench.steps.speech import TEXTS
from seam.configuration_seam import SeamConfig
from seam.experiments import tiny_backbones
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.processing_seam import DEFAULT_INSTRUCTION
from seam.train.describe import backbone_config
from seam.train.recipe import StageRecipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = ("tiny", "base", "small", "paper")
STATES_PER_SECOND = 50  # of the encoder
IDS = 400  # that the tokenizer uses; the models' vocabularies are as large as real ones


@dataclass
class Sizes:
    """
    Args:
        whisper: of the encoder, of Stage 1's peer, and by its decoder of the aligner.
        llm: of the language model.
        fields: of `SeamConfig`, LoRA's among them.
        dtype: in which both sides compute, by autocast where it is not fp32: weights are fp32.
    """

    whisper: WhisperConfig
    llm: PreTrainedConfig
    fields: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16

    @property
    def window(self) -> int:
        """Seconds that the encoder hears."""
        return self.whisper.max_source_positions // STATES_PER_SECOND


def sizes_of(name: str) -> Sizes:
    """
    `small` and `paper` are those of `recipes`; `base` is Whisper-base and a language model of 0.2 B parameters with
    Qwen3's vocabulary; `tiny` hears 2 s and computes in fp32.
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


def tokenizer() -> PreTrainedTokenizerFast:
    """Of both sides."""
    return tiny_backbones.make_tokenizer([*TEXTS, DEFAULT_INSTRUCTION] * 20, IDS)


def processor(sizes: Sizes) -> SeamProcessor:
    return SeamProcessor(feature_extractor(sizes), tokenizer())


def feature_extractor(sizes: Sizes) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=sizes.whisper.num_mel_bins, chunk_length=sizes.window)


def seam(sizes: Sizes, processor: SeamProcessor, alignment_only: bool) -> SeamForSpeechRecognition:
    """What Stage 1 trains, or Stage 2."""
    torch.manual_seed(0)  # every process and part has the same, and reads the same states on disk
    config = SeamConfig.from_backbones(
        deepcopy(sizes.whisper),  # a `Trainer` changes the config of its model
        deepcopy(sizes.llm),
        alignment_only=alignment_only,
        boa_token_id=processor.boa_token_id,
        eoa_token_id=processor.eoa_token_id,
        audio_token_id=processor.audio_token_id,
        prompt_token_ids=processor.prompt_ids(),
        **sizes.fields,
    )
    return SeamForSpeechRecognition(config)


def whisper_peer(
    sizes: Sizes, tokenizer: PreTrainedTokenizerFast, trains_table: bool
) -> WhisperForConditionalGeneration:
    """
    Stage 1's peer: a Whisper whose encoder is frozen.

    Args:
        trains_table: whether its vocabulary table, which the aligner has no counterpart of, is trained with its layers,
            as fine-tuning does; without it both sides train as much.
    """
    config = WhisperConfig(**sizes.whisper.to_dict())
    start, end = tokenizer.convert_tokens_to_ids([tiny_backbones.START, tiny_backbones.END])
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = start, end, tokenizer.pad_token_id
    model = WhisperForConditionalGeneration(config)
    model.freeze_encoder()
    model.get_input_embeddings().requires_grad_(trains_table)
    return model


def peft_peer(sizes: Sizes) -> PeftModel:
    """Stage 2's peer: the language model with the same LoRA."""
    fields = sizes.fields
    lora = LoraConfig(
        r=fields["lora_rank"],
        lora_alpha=fields["lora_alpha"],
        lora_dropout=fields["lora_dropout"],
        target_modules=fields["lora_target_modules"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(AutoModelForCausalLM.from_config(sizes.llm), lora)
