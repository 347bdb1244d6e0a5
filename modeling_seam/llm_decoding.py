"""
Greedy search over the language model that verifies Stage 1's tokens: the same output in a few forward passes.

The keys and values of the prompt's prefix are computed once.
"""

import inspect
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import StaticLayer
from transformers.generation.streamers import BaseStreamer

from .aligner import CACHE
from .prompt import last_positions, left_pad
from .speculative import DraftedBatch, Row, is_plain_greedy, is_shared, merged_settings

# What a forward costs beside its positions, which is reading the weights, in positions: on two CPU cores at paper size
# 0.5 s and 0.008 s. On an accelerator, its arithmetic in the time of reading a weight (989 TFLOP/s at 4.3 TB/s).
WEIGHTS_IN_POSITIONS = {"cpu": 60, "other": 230}

ARGUMENTS = {"inputs_embeds", "attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}


def can_verify(language_model: PreTrainedModel, generation_config: GenerationConfig, kwargs: dict) -> bool:
    """
    Return whether `language_model.generate` would be plain greedy search over a cache that can be cropped.

    Then, and only then, `verified_greedy` does the same. Whatever is unknown here is left to `generate`.

    Args:
        kwargs: arguments of `generate` that are no fields of the config.
    """
    given = {name: value for name, value in kwargs.items() if name != "streamer"}
    settings = merged_settings(generation_config, language_model)
    if settings["max_new_tokens"] is None or not is_plain_greedy(settings, given):
        return False
    kind: Any = type(language_model)
    config = language_model.config.get_text_config(decoder=True)
    if settings["cache_implementation"] == "static":
        # Elsewhere the stock loop compiles its step. Sliding layers forget what cropping would bring back.
        if language_model.device.type != "cpu" or is_sliding(config) or not kind._can_compile_fullgraph:
            return False
    return (
        issubclass(kind, GenerationMixin)
        and kind.generate is GenerationMixin.generate
        and kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and kind._supports_default_dynamic_cache()
        and ARGUMENTS <= set(inspect.signature(language_model.forward).parameters)
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        and not is_shared(language_model)
        # Layers without keys of their own, and embeddings that only ids have (Gemma 3n).
        and not getattr(config, "num_kv_shared_layers", None)
        and not getattr(config, "hidden_size_per_layer_input", None)
    )


def is_sliding(config: PreTrainedConfig) -> bool:
    """Return whether some layers of a language model see a window only."""
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None


@torch.no_grad()
def verified_greedy(
    language_model: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    drafts: list[list[int]],
    guides: list[list[int]],
    max_new_tokens: int,
    end_token_ids: set[int],
    prefix: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    static_cache: bool = False,
    streamer: BaseStreamer | None = None,
) -> list[Row]:
    """
    Decode greedily, with the same tokens as `language_model.generate`.

    After each forward, rows that accepted different numbers of tokens are brought back to one length, with the padding
    on the left and no holes: the model sees what it would see in the plain loop.

    Args:
        inputs_embeds (`torch.FloatTensor` of shape `(batch, prompt, d_llm)`): left-padded prompts, guides included.
        attention_mask (`torch.LongTensor` of shape `(batch, prompt)`): 1 for the prompts' own embeddings.
        drafts: per row Stage 1's ids, guides included.
        guides: per row the ids of the transcript that are part of the prompt.
        max_new_tokens: number of tokens to decode, guides not counted; at least 1.
        end_token_ids: any of them ends a row, as its last token.
        prefix: keys and values `(1, heads, tokens, d_head)` of each layer, of what all prompts begin with and
            `inputs_embeds` therefore leaves out.
        static_cache: allocate the cache once, at its greatest length.
        streamer: receives each token of a batch of one as soon as it is certain.

    Returns:
        The rows; `output` is the transcript, guides and end token included.
    """
    device, embed = inputs_embeds.device, language_model.get_input_embeddings()
    weights = WEIGHTS_IN_POSITIONS.get(device.type, WEIGHTS_IN_POSITIONS["other"])
    batch = DraftedBatch(drafts, guides, max_new_tokens, weights)
    mask = attention_mask.cpu()
    if prefix:
        mask = nn.functional.pad(mask, (prefix[0][0].shape[2], 0), value=1)
    if static_cache:
        greatest = mask.shape[1] + max_new_tokens + max(map(len, drafts))
        cache: Cache = StaticCache(config=language_model.config, max_cache_len=greatest)
    else:
        # Made without the config, so that sliding layers, too, keep what cropping may bring back. Their mask follows
        # from the positions in the cache, which are right without holes.
        cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix or []):
        cache.update(keys.expand(len(mask), -1, -1, -1), values.expand(len(mask), -1, -1, -1), layer)
    while batch.rows:
        proposals = batch.propose()
        proposed = pad_sequence([torch.tensor(one, dtype=torch.long) for one in proposals], batch_first=True)
        length = proposed.shape[1]
        seen = torch.tensor([[i < len(one) for i in range(length)] for one in proposals], dtype=torch.long)
        mask = torch.cat([mask, seen.view(len(mask), length)], dim=1)
        embeds = torch.cat([inputs_embeds, embed(proposed.to(device)).to(inputs_embeds)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -embeds.shape[1] :]
        logits = language_model(
            inputs_embeds=embeds,
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            use_cache=True,
            logits_to_keep=last_positions(length + 1, device),
            **{CACHE: cache},
        ).logits
        new, kept = batch.accept(proposals, logits.argmax(-1).tolist(), end_token_ids)
        for i, tokens in enumerate(new):
            mask[i, mask.shape[1] - length + len(tokens) - 1 :] = 0  # the model's own token was not an input yet
            if streamer is not None:
                for token in tokens:
                    streamer.put(torch.tensor([token]))
        if kept:
            if len(kept) < len(mask) or not mask[:, mask.shape[1] - length :].all():
                mask = keep_rows(cache, kept, mask)
            mask = nn.functional.pad(mask, (0, 1), value=1)
            last = torch.tensor([row.output[-1:] for row in batch.rows], device=device)
            inputs_embeds = embed(last).to(inputs_embeds)
    if streamer is not None:
        streamer.end()
    return batch.all_rows


def keep_rows(cache: Cache, rows: list[int], mask: torch.Tensor) -> torch.Tensor:
    """
    Keep some rows of a cache, and of each the positions in the mask `(batch, positions)`, moved to the right end.

    Returns:
        The mask of what is kept.
    """
    index, kept = left_pad([mask[row].nonzero().flatten() for row in rows])
    length, stop = index.shape[1], int(index[0, -1]) + 1
    # Mostly of a single utterance: something is cropped, and nothing has to be moved.
    is_cropped = len(rows) == len(mask) and bool(((index == torch.arange(stop - length, stop)) | (kept == 0)).all())

    def take(states: torch.Tensor) -> torch.Tensor:
        if is_cropped:
            return states[:, :, stop - length : stop]
        positions = index.to(states.device)
        return torch.stack([states[row].index_select(1, some) for row, some in zip(rows, positions, strict=True)])

    layer: Any  # with keys and values: `can_verify` accepts no other
    for layer in cache.layers:
        keys, values = take(layer.keys), take(layer.values)
        is_static = isinstance(layer, StaticLayer)
        if is_static:
            layer.keys, layer.values = layer.keys[: len(rows)], layer.values[: len(rows)]
            layer.keys[:, :, :length], layer.values[:, :, :length] = keys.clone(), values.clone()
            layer.cumulative_length.fill_(length)
        else:
            layer.keys, layer.values = keys, values
    return kept


class PromptPrefix:
    """
    Keep the keys and values of the last prefix that was asked for.

    They are computed anew when the ids, the weights, or LoRA have changed. Changes to a weight that torch does not
    count, as by some optimizers, are not seen: the model forgets the prefix when its training mode is set.
    """

    def __init__(self):
        self._state: tuple | None = None
        self._states: list[tuple[torch.Tensor, torch.Tensor]] = []

    def states(self, language_model: PreTrainedModel, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return per layer the keys and values `(1, heads, tokens, d_head)` of `ids`; nothing for no ids."""
        state = (ids, *_state(language_model))
        if state != self._state:
            self._states = []
            if ids:
                cache = DynamicCache()
                embeds = language_model.get_input_embeddings()(torch.tensor([ids], device=language_model.device))
                last = last_positions(1, embeds.device)
                language_model(inputs_embeds=embeds, use_cache=True, logits_to_keep=last, **{CACHE: cache})
                layers: Any = cache.layers
                self._states = [(layer.keys, layer.values) for layer in layers]
            self._state = state
        return self._states


def _state(language_model: PreTrainedModel) -> tuple:
    """Return what the keys and values depend on beside the ids: where each weight lies and how often it changed."""
    weights = tuple((weight.data_ptr(), weight._version, weight.dtype) for weight in language_model.parameters())
    # LoRA is switched, scaled and merged in all layers together.
    adapter: Any = next((module for module in language_model.modules() if isinstance(module, BaseTunerLayer)), None)
    lora: tuple = ()
    if adapter is not None:
        lora = (list(adapter.active_adapters), adapter.disable_adapters, list(adapter.merged_adapters))
        lora = (*lora, dict(adapter.scaling))
    kind = language_model.device.type
    return (
        weights,
        language_model.device,
        lora,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
    )
