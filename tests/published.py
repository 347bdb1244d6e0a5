"""
Folders laid out as the published checkpoints are: names of weights, shards and tied tables written down here by hand,
values random. The figures of `tests/test_published.py` hold for the real ones: 1259 and 398 tensors.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, WhisperConfig

Named = Iterator[tuple[str, tuple[int, ...]]]


def whisper_tensors(config: WhisperConfig) -> Named:
    """Of `openai/whisper-*`: under `model.`, no bias on keys, no output layer, which is the decoder's table."""
    d = config.d_model
    yield "model.encoder.conv1.weight", (d, config.num_mel_bins, 3)
    yield "model.encoder.conv1.bias", (d,)
    yield "model.encoder.conv2.weight", (d, d, 3)
    yield "model.encoder.conv2.bias", (d,)
    yield "model.encoder.embed_positions.weight", (config.max_source_positions, d)
    yield "model.decoder.embed_tokens.weight", (config.vocab_size, d)
    yield "model.decoder.embed_positions.weight", (config.max_target_positions, d)
    sides = (
        ("encoder", config.encoder_layers, config.encoder_ffn_dim, ("self_attn",)),
        ("decoder", config.decoder_layers, config.decoder_ffn_dim, ("self_attn", "encoder_attn")),
    )
    for side, layers, width, attentions in sides:
        yield f"model.{side}.layer_norm.weight", (d,)
        yield f"model.{side}.layer_norm.bias", (d,)
        for index in range(layers):
            layer = f"model.{side}.layers.{index}"
            for attention in attentions:
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    yield f"{layer}.{attention}.{projection}.weight", (d, d)
                    if projection != "k_proj":
                        yield f"{layer}.{attention}.{projection}.bias", (d,)
            for norm in (*(f"{one}_layer_norm" for one in attentions), "final_layer_norm"):
                yield f"{layer}.{norm}.weight", (d,)
                yield f"{layer}.{norm}.bias", (d,)
            yield f"{layer}.fc1.weight", (width, d)
            yield f"{layer}.fc1.bias", (width,)
            yield f"{layer}.fc2.weight", (d, width)
            yield f"{layer}.fc2.bias", (d,)


def qwen3_tensors(config: PreTrainedConfig, lm_head: bool) -> Named:
    """
    Of `Qwen/Qwen3-*`. `lm_head`: whether the output layer is stored: Qwen3-4B is tied and does not, Qwen3-0.6B is tied
    and does all the same, Qwen3-8B is not tied.
    """
    d, head, width = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    if lm_head:
        yield "lm_head.weight", (config.vocab_size, d)
    yield "model.embed_tokens.weight", (config.vocab_size, d)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (d,)
        yield f"{layer}.mlp.down_proj.weight", (d, width)
        yield f"{layer}.mlp.gate_proj.weight", (width, d)
        yield f"{layer}.mlp.up_proj.weight", (width, d)
        yield f"{layer}.post_attention_layernorm.weight", (d,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield f"{layer}.self_attn.k_proj.weight", (keys, d)
        yield f"{layer}.self_attn.o_proj.weight", (d, queries)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.q_proj.weight", (queries, d)
        yield f"{layer}.self_attn.v_proj.weight", (keys, d)
    yield "model.norm.weight", (d,)


def write_published(folder: Path, config: PreTrainedConfig, named: Named, shards: int, dtype: torch.dtype) -> Path:
    """
    Write config.json and random weights in `shards` files of about equal size, one in memory at a time; with more than
    one, the index too. A tied output layer that is stored holds the table's values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    named = list(named)
    sizes = [torch.Size(shape).numel() for _, shape in named]
    groups, filled = [[] for _ in range(shards)], 0
    for (name, shape), size in zip(named, sizes, strict=True):
        groups[min(filled * shards // sum(sizes), shards - 1)].append((name, shape))
        filled += size
    weight_map, kept = {}, {}
    for number, group in enumerate(tqdm(groups, desc=folder.name, leave=False), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        tensors = {}
        for name, shape in group:
            value = torch.empty(shape, dtype=dtype)
            tensors[name] = value.fill_(1) if "norm.weight" in name else value.normal_(std=0.02)
            if config.tie_word_embeddings and name in ("lm_head.weight", "model.embed_tokens.weight"):
                tensors[name] = kept.setdefault("table", tensors[name]).clone()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if shards > 1:
        index = {"metadata": {"total_size": sum(sizes) * dtype.itemsize}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder
