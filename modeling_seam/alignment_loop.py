"""Algorithm 1 without overhead: greedy search by the aligner's weights, one row a token and utterance."""

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import utils as generation_utils
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.modeling_whisper import WhisperDecoderLayer, eager_attention_forward

from .aligner import SeamAligner
from .few_rows import few_rows_linear
from .nearest import NearestToken

# Positions for which the cache of the tokens' keys and values has room at first; it doubles when they are used up.
FIRST_POSITIONS = 64
# Off the CPU, every so many tokens the host asks which rows have ended: asking means waiting for the device.
ASK_EVERY = 8
# Settings that leave the search greedy, whatever they are.
FREE_SETTINGS = {
    "decoder_start_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_new_tokens",
    "max_length",
    "return_dict_in_generate",
    "transformers_version",
    "_from_model_config",
}


def is_plain(generation_config: GenerationConfig) -> bool:
    """Whether a config asks for greedy search and nothing else."""
    default, given = vars(GenerationConfig()), vars(generation_config)
    settings = {name for name in given.keys() | default.keys() if given.get(name) != default.get(name)}
    if given.get("cache_implementation") in ("dynamic", "static"):
        settings.discard("cache_implementation")  # a matter of memory, of which this has its own
    return settings <= FREE_SETTINGS


def can_run(aligner: SeamAligner, generation_config: GenerationConfig, arguments: dict) -> bool:
    """
    Whether `greedy_alignment` does what `aligner.generate` would do with these settings and arguments. It does not for
    any other search, for a streamer or processors, for reports, for an aligner that is in training, compiled or spread
    over devices, and for attention that takes masks of its own kind.
    """
    weights = {parameter.device for parameter in aligner.parameters()}
    return (
        is_plain(generation_config)
        and is_plain(aligner.generation_config)
        and all(value is None for value in arguments.values())
        and not aligner.training
        and aligner.config._attn_implementation in ("eager", "sdpa")
        and aligner._compiled_call_impl is None
        and len(weights) == 1
        and "meta" not in {device.type for device in weights}  # offloaded
        and not generation_utils.is_deepspeed_zero3_enabled()
        and not generation_utils.is_fsdp_managed_module(aligner)
    )


def asks(tokens: torch.Tensor, position: int) -> bool:
    """Whether the host looks after this position which rows have ended."""
    return tokens.device.type == "cpu" or (position + 1) % ASK_EVERY == 0


def greedy_alignment(
    aligner: SeamAligner,
    lookup: NearestToken,
    speech_states: torch.FloatTensor,
    speech_mask: torch.Tensor | None,
    boa_token_id: int,
    eoa_token_id: int,
    max_new_tokens: int,
) -> torch.LongTensor:
    """
    Algorithm 1, greedy, for a batch: each step feeds back the nearest tokens of the last one. The speech states' keys
    and values are computed once; a row that has ended makes room for the last one, so that the batch becomes smaller.

    Args:
        speech_states, speech_mask: `(batch, speech, d_model)` and `(batch, speech)`.
        boa_token_id, eoa_token_id: what the rows begin and end with.
        max_new_tokens: after which a row that has not ended is cut.

    Returns:
        Token ids `(batch, tokens)`, from the end of a row on `<EOA>`; as many as the longest row has, at most
        `max_new_tokens`.
    """
    weight, device = aligner.embed_positions.weight, speech_states.device
    speech_states = speech_states.to(weight.device, aligner.input_projection.weight.dtype)
    batch_size = len(speech_states)
    speech_mask = create_bidirectional_mask(
        config=aligner.config,
        inputs_embeds=speech_states[:, :1],
        attention_mask=speech_mask,
        encoder_hidden_states=speech_states,
    )
    speech_mask = None if speech_mask is None else speech_mask.clone()
    layers = [LayerLoop(layer, aligner.config._attn_implementation, speech_states) for layer in aligner.layers]
    sequences = torch.full((batch_size, max_new_tokens), eoa_token_id, device=lookup.table.device)
    rows = torch.arange(batch_size, device=sequences.device)  # of `sequences`, that are still being written
    tokens = torch.full_like(rows, boa_token_id)
    for position in range(max_new_tokens):
        embeds = lookup.embed(tokens).to(speech_states)
        hidden_states = few_rows_linear(aligner.input_projection, embeds) + weight[position]
        for layer in layers:
            hidden_states = layer.step(hidden_states, position, speech_mask)
        tokens = lookup.nearest(few_rows_linear(aligner.output_projection, aligner.layer_norm(hidden_states)))
        sequences[rows, position] = tokens
        if not asks(tokens, position):
            continue
        ended = ((sequences[rows, : position + 1] == eoa_token_id).any(-1)).nonzero().flatten().tolist()
        for row in reversed(ended):
            last = len(rows) - 1
            rows[row], tokens[row] = rows[last], tokens[last]
            rows, tokens = rows[:last], tokens[:last]
            if speech_mask is not None:
                speech_mask[row] = speech_mask[last]
                speech_mask = speech_mask[:last]
            for layer in layers:
                layer.drop(row)
        if not len(rows):
            break
    is_end = (sequences == eoa_token_id).cumsum(-1) > 0
    written = min(int((~is_end).sum(-1).max()) + 1, max_new_tokens)
    return sequences.masked_fill(is_end, eoa_token_id)[:, :written].to(device)


class LayerLoop:
    """
    One `WhisperDecoderLayer` at inference, one position at a time, with the keys and values of both attentions.

    Args:
        layer: whose weights compute.
        attention: name of the attention's implementation.
        speech_states: `(batch, speech, d_model)`.
    """

    def __init__(self, layer: WhisperDecoderLayer, attention: str, speech_states: torch.FloatTensor):
        self.layer = layer
        self.attention = ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager_attention_forward)
        of_speech = layer.encoder_attn
        self.speech = [
            self._heads(of_speech, project(speech_states)) for project in (of_speech.k_proj, of_speech.v_proj)
        ]
        self.tokens: list[torch.Tensor] | None = None
        self.count = len(speech_states)  # rows in use: the first ones

    def _heads(self, attention: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """`(batch, seq, d_model)` to `(batch, heads, seq, head_dim)`."""
        return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2).contiguous()

    def step(self, hidden_states: torch.Tensor, position: int, speech_mask: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            hidden_states: `(batch, d_model)`, of one position.
            speech_mask: as the attention takes it, `(batch, 1, 1, speech)`, or none.

        Returns:
            The layer's output `(batch, d_model)`.
        """
        layer = self.layer
        states, own = layer.self_attn_layer_norm(hidden_states), layer.self_attn
        new = [self._heads(own, few_rows_linear(project, states)[:, None]) for project in (own.k_proj, own.v_proj)]
        self._remember(new, position)
        past = [cache[: self.count, :, : position + 1] for cache in self.tokens]
        hidden_states = hidden_states + self._attend(own, states, *past, None)
        states = layer.encoder_attn_layer_norm(hidden_states)
        speech = [cache[: self.count] for cache in self.speech]
        hidden_states = hidden_states + self._attend(layer.encoder_attn, states, *speech, speech_mask)
        states = layer.activation_fn(few_rows_linear(layer.fc1, layer.final_layer_norm(hidden_states)))
        return hidden_states + few_rows_linear(layer.fc2, states)

    def _attend(self, attention: nn.Module, states, keys, values, mask) -> torch.Tensor:
        # The query is scaled before the product, as WhisperAttention does.
        query = self._heads(attention, (few_rows_linear(attention.q_proj, states) * attention.scaling)[:, None])
        attended, _ = self.attention(attention, query, keys, values, mask, dropout=0.0, scaling=1.0)
        return few_rows_linear(attention.out_proj, attended.flatten(1))

    def _remember(self, new: list[torch.Tensor], position: int):
        """Keys and values of `position`, `(batch, heads, 1, head_dim)` each, go into the cache."""
        if self.tokens is None:
            batch, heads, _, dim = new[0].shape
            self.tokens = [state.new_empty(batch, heads, FIRST_POSITIONS, dim) for state in new]
        elif position == self.tokens[0].shape[2]:
            self.tokens = [torch.cat([cache, torch.empty_like(cache)], dim=2) for cache in self.tokens]
        for cache, state in zip(self.tokens, new, strict=True):
            cache[: self.count, :, position] = state[:, :, 0]

    def drop(self, row: int):
        """A row is no longer computed: the last one takes its place."""
        self.count -= 1
        for cache in (*self.speech, *self.tokens):
            cache[row] = cache[self.count]
