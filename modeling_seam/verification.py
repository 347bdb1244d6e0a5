"""
The second loop as a check of the first one's draft: greedy search over the language model, token for token, in a few
parallel forwards (speculative decoding, Leviathan et al. 2023, whose draft here is what Stage 1 heard).
"""

import inspect
from dataclasses import dataclass

import torch
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
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from .prompt import left_pad

# What a forward costs beside its positions, which is reading the weights, in positions: on two CPU cores at paper size
# 0.5 s and 0.008 s. On an accelerator, its arithmetic in the time of reading a weight (989 TFLOP/s at 4.3 TB/s).
WEIGHTS_IN_POSITIONS = {"cpu": 60, "other": 230}

# What is believed of the agreement before anything was measured: 96 %, on the evidence of two tokens, so that a bad
# draft is soon recognised.
PRIOR_AGREEING, PRIOR_PROPOSED = 1.92, 2.0

# Proposals are made where they promise to cut the rest of the work to this share. Less is not to be relied on: one
# position alone is cheaper than counted here, by how much depends on the machine.
WORTHWHILE = 0.8

# Extra work that may be lost on bad drafts, as a share of the plain loop's.
STAKE = 0.08

# Tokens back, and draft tokens either way, that are looked at to find where the draft goes on.
WINDOW = 8

# Fields of a generation config that change nothing in greedy search but its ends, and values that mean "off" (so do
# `None` and, but for the cache, `False`).
FREE_FIELDS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_new_tokens", "max_length"),
    *("temperature", "top_k", "top_p", "return_dict_in_generate"),
    *("transformers_version", "_from_model_config", "_commit_hash"),
}
OFF = {
    **{"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
    **{"use_cache": True, "cache_implementation": "dynamic"},
}
ARGUMENTS = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def verifies(language_model: nn.Module, generation_config: GenerationConfig, kwargs: dict) -> bool:
    """
    Whether `language_model.generate` with these arguments would be plain greedy search over a cache that can be cut:
    then, and only then, [`write`] does the same. Whatever is unknown here is left to `generate`.

    Args:
        kwargs: arguments of `generate` that are no fields of the config.
    """
    if any(value is not None and value is not False for name, value in kwargs.items() if name != "streamer"):
        return False
    settings = generation_config.to_dict()
    for name, value in language_model.generation_config.to_dict().items():  # stands where the other says nothing
        settings[name] = value if settings.get(name) is None else settings[name]
    if settings["max_new_tokens"] is None:
        return False
    kind, config = type(language_model), language_model.config.get_text_config(decoder=True)
    if settings["cache_implementation"] == "static":
        # Elsewhere the stock loop compiles its step. Sliding layers forget what a cut would bring back.
        if language_model.device.type != "cpu" or is_sliding(config) or not kind._can_compile_fullgraph:
            return False
        settings["cache_implementation"] = None
    for name, value in settings.items():
        is_off = value is None or (name in OFF and value == OFF[name]) or (value is False and name != "use_cache")
        if not is_off and name not in FREE_FIELDS:
            return False
    return (
        issubclass(kind, GenerationMixin)
        and kind.generate is GenerationMixin.generate
        and kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and kind._supports_default_dynamic_cache()
        and ARGUMENTS <= set(inspect.signature(language_model.forward).parameters)
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        # Weights that several processes share, which must then make the same number of forwards.
        and not is_deepspeed_zero3_enabled()
        and not is_fsdp_managed_module(language_model)
        # Layers without keys of their own, and embeddings that only ids have (Gemma 3n).
        and not getattr(config, "num_kv_shared_layers", None)
        and not getattr(config, "hidden_size_per_layer_input", None)
    )


def is_sliding(config: PreTrainedConfig) -> bool:
    """Whether some layers of a language model see a window only."""
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None


@dataclass
class Row:
    """
    One utterance.

    Args:
        draft: what Stage 1 heard, ids.
        written: the transcript so far, ids; at first what stands at the prompt's end (the guiding token, or nothing).
        limit: number of tokens to write.
        place: where in the draft the next token is expected.
        forwards, accepted, rejected: forwards of the language model; draft tokens that agreed and that did not.
        mismatches: proposals that did not agree to their end.
    """

    draft: list[int]
    written: list[int]
    limit: int
    place: int = 0
    forwards: int = 0
    accepted: int = 0
    rejected: int = 0
    mismatches: int = 0
    ended: bool = False

    @property
    def rest(self) -> int:
        """Draft tokens that can still be proposed; after the last one there must be room for the LLM's own."""
        return max(min(len(self.draft) - self.place, self.limit - 1), 0)

    @property
    def agreement(self) -> float:
        """Probability that the next draft token agrees."""
        return (self.accepted + PRIOR_AGREEING) / (self.accepted + self.mismatches + PRIOR_PROPOSED)

    def propose(self, length: int) -> list[int]:
        return self.draft[self.place : self.place + min(length, self.rest)]

    def read(self, proposal: list[int], choices: list[int], ends: set[int]) -> list[int]:
        """
        Take what the language model chose before the proposal's first token and after each of its tokens: the longest
        agreeing prefix and then the model's own token. Returns the new tokens, up to the first end token.
        """
        agreeing = 0
        while agreeing < len(proposal) and proposal[agreeing] == choices[agreeing]:
            agreeing += 1
        new = choices[: agreeing + 1]
        length = next((place for place, token in enumerate(new, start=1) if token in ends), len(new))
        self.ended = length < len(new) or new[-1] in ends or len(new) == self.limit
        agreeing, new = min(agreeing, length), new[:length]
        self.forwards += 1
        self.accepted += agreeing
        self.rejected += len(proposal) - agreeing
        self.mismatches += agreeing < len(proposal)
        self.limit -= len(new)
        self.written += new
        # The model's own token stands for the draft's (substitution), unless the alignment says otherwise.
        self.place = min(self.place + agreeing + 1, len(self.draft))
        if proposal:
            self.place = resume(self.draft, self.written, self.place)
        return new


def resume(draft: list[int], written: list[int], place: int) -> int:
    """
    Where the draft goes on after what was written: the end of its part that is nearest by edit distance to the last
    tokens of `written`, which are believed to have begun where they would have if none was inserted or left out since.
    Among equally near ends, one whose token is the last written, then the nearest to `place`.
    """
    recent = written[-WINDOW:]
    begin = place - len(recent)
    low, high = max(begin - WINDOW, 0), min(place + WINDOW, len(draft))
    costs = [abs(end - begin) for end in range(low, high + 1)]
    for token in recent:
        before, costs = costs, [costs[0] + 1]
        for i, other in enumerate(draft[low:high]):
            costs.append(min(before[i] + (token != other), before[i + 1] + 1, costs[i] + 1))

    def order(end: int) -> tuple[int, bool, int]:
        return costs[end - low], end == 0 or draft[end - 1] != written[-1], abs(end - place)

    return min(range(low, high + 1), key=order)


def proposal_length(rows: list[Row], weights: float, allowed: float) -> int:
    """
    The number of draft tokens to propose that makes the rest of the work cheapest, 0 being the plain loop: of `n`
    tokens that agree with probability `p` each, a forward yields 1 + p + ... + p^n. Of an utterance alone that has
    agreed so far, everything: a good draft is one forward.

    Args:
        weights: cost of a forward beside its positions, in positions.
        allowed: positions that may be lost.
    """
    left = torch.tensor([row.rest for row in rows])
    longest = min(int(left.max()), int(allowed // len(rows)))
    if longest <= 0:
        return 0
    if len(rows) == 1 and not rows[0].mismatches:
        return longest
    length = torch.arange(longest + 1)
    agreement = torch.tensor([row.agreement for row in rows])
    tokens = (agreement[:, None] ** length).masked_fill(length > left[:, None], 0).cumsum(-1)
    forwards = ((left[:, None] + 1) / tokens).clamp_min(1)
    # A batch goes on until its last row has ended; rows that have ended cost nothing.
    cost = weights * forwards.amax(0) + (1 + length) * forwards.sum(0)
    best = int(cost.argmin())
    return best if cost[best] < WORTHWHILE * cost[0] else 0


@torch.no_grad()
def write(
    language_model: PreTrainedModel,
    inputs_embeds: torch.FloatTensor,
    attention_mask: torch.LongTensor,
    drafts: list[list[int]],
    guides: list[list[int]],
    max_new_tokens: int,
    end_token_ids: set[int],
    prefix: list[tuple[torch.FloatTensor, torch.FloatTensor]] | None = None,
    static_cache: bool = False,
    streamer: BaseStreamer | None = None,
) -> list[Row]:
    """
    Greedy search, the same tokens as those of `language_model.generate`.

    Rows that accept different numbers of tokens are brought back to one length, with the padding on the left and no
    holes, after each forward: what the model sees is what it would see in the plain loop.

    Args:
        inputs_embeds (`torch.FloatTensor` of shape `(batch, prompt, d_llm)`): left-padded prompts, guides included.
        attention_mask (`torch.LongTensor` of shape `(batch, prompt)`): 1 for the prompts' own embeddings.
        drafts: per row the ids that Stage 1 wrote, guides included.
        guides: per row the ids of the transcript that are part of the prompt.
        max_new_tokens: number of tokens to write, guides not counted; at least 1.
        end_token_ids: any of them ends a row and is written.
        prefix: keys and values `(1, heads, tokens, d_head)` of each layer, of what all prompts begin with and
            `inputs_embeds` therefore leaves out.
        static_cache: allocate the cache once, at its greatest length.
        streamer: is given each token of a batch of one as soon as it is certain.

    Returns:
        The rows; `written` is the transcript, guides and end token included.
    """
    rows = [Row(draft, list(guide), max_new_tokens, len(guide)) for draft, guide in zip(drafts, guides, strict=True)]
    everything, device, embed = rows, inputs_embeds.device, language_model.get_input_embeddings()
    weights = WEIGHTS_IN_POSITIONS.get(device.type, WEIGHTS_IN_POSITIONS["other"])
    allowed = STAKE * sum(min(len(row.draft) + 1, row.limit) for row in rows) * (weights / len(rows) + 1)
    mask, slowest = attention_mask.cpu(), 0
    if prefix:
        mask = nn.functional.pad(mask, (prefix[0][0].shape[2], 0), value=1)
    if static_cache:
        greatest = mask.shape[1] + max_new_tokens + max(map(len, drafts))
        cache = StaticCache(config=language_model.config, max_cache_len=greatest)
    else:
        # Made without the config, so that sliding layers, too, keep what a cut may bring back. Their mask follows from
        # the places in the cache, which are right without holes.
        cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix or []):
        cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
    while rows:
        length = proposal_length(rows, weights, allowed)
        proposals = [row.propose(length) for row in rows]
        proposed = pad_sequence([torch.tensor(one, dtype=torch.long) for one in proposals], batch_first=True)
        length = proposed.shape[1]
        seen = torch.tensor([[place < len(one) for place in range(length)] for one in proposals], dtype=torch.long)
        mask = torch.cat([mask, seen.view(len(rows), length)], dim=1)
        embeds = torch.cat([inputs_embeds, embed(proposed.to(device)).to(inputs_embeds)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -embeds.shape[1] :]
        logits = language_model(
            inputs_embeds=embeds,
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=length + 1,
        ).logits
        for i, (row, choices) in enumerate(zip(rows, logits.argmax(-1).tolist(), strict=True)):
            new = row.read(proposals[i], choices, end_token_ids)
            allowed += len(new) - (1 + length)
            mask[i, mask.shape[1] - length + len(new) - 1 :] = 0  # the model's own token was not an input yet
            if streamer is not None:
                for token in new:
                    streamer.put(torch.tensor([token]))
        kept = [i for i, row in enumerate(rows) if not row.ended]
        rows = [rows[i] for i in kept]
        if rows:
            # Forwards that were saved: the plain loop waits for its slowest row, too.
            before, slowest = slowest, min(max_new_tokens - row.limit for row in rows)
            allowed += weights * (slowest - before - 1)
            if len(kept) < len(mask) or not mask[:, mask.shape[1] - length :].all():
                mask = keep(cache, kept, mask)
            mask = nn.functional.pad(mask, (0, 1), value=1)
            inputs_embeds = embed(torch.tensor([row.written[-1:] for row in rows], device=device)).to(inputs_embeds)
    if streamer is not None:
        streamer.end()
    return everything


def keep(cache: Cache, rows: list[int], mask: torch.LongTensor) -> torch.LongTensor:
    """
    Keep some rows of a cache, and of each the positions that the mask `(batch, positions)` names, moved to the right
    end. Returns the mask of what is kept.
    """
    index, kept = left_pad([mask[row].nonzero().flatten() for row in rows])
    length, stop = index.shape[1], int(index[0, -1]) + 1
    # An utterance alone, mostly: something is cut off, and nothing has to be moved.
    is_cut = len(rows) == len(mask) and bool(((index == torch.arange(stop - length, stop)) | (kept == 0)).all())

    def take(states: torch.Tensor) -> torch.Tensor:
        if is_cut:
            return states[:, :, stop - length : stop]
        places = index.to(states.device)
        return torch.stack([states[row].index_select(1, place) for row, place in zip(rows, places, strict=True)])

    for layer in cache.layers:
        keys, values = take(layer.keys), take(layer.values)
        if isinstance(layer, StaticLayer):
            layer.keys, layer.values = layer.keys[: len(rows)], layer.values[: len(rows)]
            layer.keys[:, :, :length], layer.values[:, :, :length] = keys.clone(), values.clone()
            layer.cumulative_length.fill_(length)
        else:
            layer.keys, layer.values = keys, values
    return kept
