"""
The models of `bench.inference`, whose random weights decode to a known text with a clear margin.

With weights that are merely random, the margins between tokens are lost to bf16 rounding: two ways to compute the same
loop would soon choose different tokens, and a draft would agree with neither. Here the embedding of token k + 1 is that
of token k rotated by one dimension, and the last projection of each decoder rotates by one dimension, too: both loops
choose the successor of the last token, since the other layers add little. All products are computed, so that a step
takes as long as with trained weights.

Predictions of the aligner lie near an embedding, at a cosine of about 0.98, as those of a trained aligner do
(`checkpoints/tiny`: 0.997 in the median, below 0.85 in one case of ten). To this end, an embedding is a vector of half
its size, repeated: the aligner, which is half as wide, keeps all of it. `random_projection` yields predictions that are
near no embedding.

LoRA is merged into the LLM, as `seam merge` does. Its output layer is not tied to the embedding table, but as large.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig, Qwen3Config, WhisperConfig, WhisperForConditionalGeneration
from transformers.initialization import no_init_weights

from seam.bench.common import RECIPES
from seam.configuration_seam import SeamConfig
from seam.modeling_seam import SeamForSpeechRecognition
from seam.modeling_seam.nearest import NearestToken
from seam.train.describe import backbone_config
from seam.train.recipe import StageRecipe, load_recipe

SIZES = ("tiny", "small", "paper")
# How many random numbers are repeated to fill all weights; a prime, so that no two rows of a matrix are equal.
BLOCK = 2**20 + 7
# Norm of what all layers together add to the embedding, as a share of its own.
LAYERS_SHARE = 0.1
PREDICTED_NORM = 0.7  # as a share of an embedding's; a mean of embeddings is shorter than these
WHISPER_VOCABULARY = 51865
BOA, AUDIO = 0, 1  # ids; Stage 1's text are the successors of `BOA`
# "<|im_start|>user\nTranscribe the following audio:" and "<|im_end|>\n<|im_start|>assistant\n", in Qwen3's tokens.
INSTRUCTION_TOKENS, REPLY_TOKENS = 9, 5
TEXT_TOKENS = 151643  # number of ids of Qwen3's vocabulary that stand for text; the others are special or unused
DRAFT_TOKENS = 19029  # number of ids in the transcripts of LibriSpeech-100h
LAYER_ENDS = ("out_proj", "o_proj", "fc2", "down_proj")  # the last modules of attention and feed-forward blocks


def seam_config(size: str) -> SeamConfig:
    """Return a config with the sizes of `recipes/paper` or `recipes/small`, or tiny ones with a window of 2 s."""
    if size == "tiny":
        audio = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
        aligner = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128}
        whisper = WhisperConfig(**audio, **aligner, max_source_positions=100)
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
        llm = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024)
        fields = {"eoa_token_id": 1023, "draft_vocabulary": list(range(500))}
    else:
        recipe = load_recipe(StageRecipe, RECIPES / size / "alignment.yaml", ["training.use_cpu=true"])
        whisper, llm = backbone_config(recipe.encoder), backbone_config(recipe.llm)
        never = list(range(TEXT_TOKENS, llm.vocab_size))
        fields = {**recipe.config, "eoa_token_id": TEXT_TOKENS + 2, "lookup_excluded_ids": never}
        fields["draft_vocabulary"] = list(range(DRAFT_TOKENS))
    llm.tie_word_embeddings = False
    prompt = [*range(2, 2 + INSTRUCTION_TOKENS), AUDIO, *range(2, 2 + REPLY_TOKENS)]
    fields |= {"lora_rank": 0, "boa_token_id": BOA, "audio_token_id": AUDIO, "prompt_token_ids": prompt}
    return SeamConfig.from_backbones(whisper, llm, **fields)


def build(size: str, device: str) -> SeamForSpeechRecognition:
    """Build the model in bf16, at size tiny in fp32."""
    config = seam_config(size)
    with _uninitialized_weights(torch.float32 if size == "tiny" else torch.bfloat16, device):
        model = SeamForSpeechRecognition(config).eval()
    _fill(model)
    _make_successors_nearest(model)
    # Without end tokens: every loop decodes as many tokens as it is asked for.
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.language_model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def stock_whisper(model: SeamForSpeechRecognition) -> WhisperForConditionalGeneration:
    """Build stock Whisper around the encoder and the decoder layers of a model, with Whisper's own vocabulary size."""
    sizes = model.config.aligner_config.to_dict() | {"encoder_layers": 1, "decoder_layers": 1}
    config = WhisperConfig(**sizes | {"vocab_size": WHISPER_VOCABULARY})
    config._attn_implementation = model.config._attn_implementation
    with _uninitialized_weights(model.dtype, model.device):
        whisper = WhisperForConditionalGeneration(config).eval()
    _fill(whisper)
    whisper.tie_weights()
    layers = model.config.aligner_config.decoder_layers
    config.encoder_layers = config.decoder_layers = config.num_hidden_layers = layers
    whisper.model.encoder = model.encoder
    whisper.model.decoder.layers = model.bridge.layers
    whisper.generation_config = GenerationConfig(pad_token_id=0)
    return whisper


def successors(token: int, count: int, period: int) -> list[int]:
    """
    Return the tokens that both loops decode after `token`.

    Args:
        token: id of the token before them.
        count: number of tokens.
        period: number of tokens after which they repeat (see `period_of`).
    """
    start = token - token % period
    return [start + (token + step) % period for step in range(1, count + 1)]


def period_of(model: SeamForSpeechRecognition) -> int:
    """Return the number of rotations by one dimension after which an embedding is the first one again."""
    return model.config.get_text_config().hidden_size // 2


def lookup(model: SeamForSpeechRecognition, active: int | None = None) -> NearestToken:
    """Make a lookup that never finds EOA; with `active`, among that many of the first ids alone."""
    config = model.config
    never = [*(config.lookup_excluded_ids or []), config.eoa_token_id]
    return NearestToken(
        model.get_input_embeddings().weight,
        config.alignment_lambda,
        config.alignment_reduction,
        never,
        None if active is None else list(range(active)),
    )


def random_projection(aligner: nn.Module) -> nn.Linear:
    """Make an output projection whose predictions are near no embedding."""
    like = aligner.output_projection.weight
    projection = nn.Linear(like.shape[1], like.shape[0], bias=False, device=like.device, dtype=like.dtype)
    numbers = torch.randn(like.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        projection.weight.copy_(numbers * PREDICTED_NORM / math.sqrt(like.numel()))
    return projection


@contextmanager
def _uninitialized_weights(dtype: torch.dtype, device) -> Iterator[None]:
    """Build models with a data type on a device, without initializing their weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _fill(model: nn.Module):
    """Fill matrices so that they preserve norms; those at the end of a layer are scaled down to add little."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(BLOCK, generator=generator)
    blocks = {}
    for part in model.children():
        layers = sum(name.endswith(LAYER_ENDS) for name, _ in part.named_modules())
        for name, parameter in part.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(float(name.endswith("weight")))  # norms, and biases
                continue
            scale = parameter[0].numel() ** -0.5
            if name.removesuffix(".weight").endswith(LAYER_ENDS):
                scale *= LAYERS_SHARE / math.sqrt(len(parameter) * layers)
            if scale not in blocks:
                blocks[scale] = (block * scale).to(parameter)
            flat = parameter.view(-1)
            for start in range(0, len(flat), BLOCK):
                piece = flat[start : start + BLOCK]
                piece.copy_(blocks[scale][: len(piece)])


@torch.no_grad()
def _make_successors_nearest(model: SeamForSpeechRecognition):
    aligner, table, period = model.bridge, model.get_input_embeddings().weight, period_of(model)
    dim, width = table.shape[1], aligner.config.d_model
    generator = torch.Generator().manual_seed(1)
    for rows in table.split(period):
        first = torch.randn(period, generator=generator).div(math.sqrt(dim)).to(table)
        # Row k is the first one rotated by k dimensions to the left.
        rows.copy_(first.repeat(3).unfold(0, dim, 1)[: len(rows)])
    for start in range(0, len(table), period):
        model.get_output_embeddings().weight[start : start + period] = table[start : start + period].roll(1, dims=1)
    rotation = torch.linalg.qr(torch.randn(period, period, generator=generator)).Q
    kept = torch.zeros(width, dim)
    kept[:period] = torch.cat([rotation, rotation], dim=1) / math.sqrt(2)
    aligner.input_projection.weight.copy_(kept)
    aligner.output_projection.weight.copy_(kept.T.roll(-1, dims=0) * PREDICTED_NORM / math.sqrt(width))
    aligner.embed_positions.weight.mul_(LAYERS_SHARE)
