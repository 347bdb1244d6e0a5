"""Algorithm 1, greedy, without overhead: token by token, or checking a draft in a few parallel passes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.modeling_whisper import WhisperDecoderLayer, eager_attention_forward

from .aligner import SeamAligner
from .fast_matmul import few_rows_linear
from .nearest import NearestToken
from .speculative import DraftedBatch, Row, close_ranks, is_plain_greedy, is_shared, merged_settings

# Off the CPU, every so many tokens the host asks which rows have ended: asking means waiting for the device.
ASK_EVERY = 8

# What a pass costs beside its positions, in positions: on two CPU cores at paper size 0.15 s and 0.004 s (see
# `verification.WEIGHTS_IN_POSITIONS`).
WEIGHTS_IN_POSITIONS = {"cpu": 40, "other": 230}


def can_run(aligner: SeamAligner, generation_config: GenerationConfig, arguments: dict) -> bool:
    """
    Whether `greedy_alignment` does what `aligner.generate` would do with these settings and arguments. It does not for
    any other search, for a streamer or processors, for reports, for an aligner that is in training, compiled or spread
    over devices, and for attention that takes masks of its own kind.
    """
    weights = {parameter.device for parameter in aligner.parameters()}
    return (
        is_plain_greedy(merged_settings(generation_config, aligner), arguments)
        and not aligner.training
        and aligner.config._attn_implementation in ("eager", "sdpa")
        and aligner._compiled_call_impl is None
        and len(weights) == 1
        and "meta" not in {device.type for device in weights}  # offloaded
        and not is_shared(aligner)
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
) -> tuple[torch.LongTensor, torch.FloatTensor]:
    """
    Algorithm 1, greedy, for a batch: each step feeds back the nearest tokens of the last one. A row that has ended
    is no longer computed.

    Args:
        speech_states, speech_mask: `(batch, speech, d_model)` and `(batch, speech)`.
        boa_token_id, eoa_token_id: what the rows begin and end with.
        max_new_tokens: after which a row that has not ended is cut.

    Returns:
        Token ids `(batch, tokens)`, from the end of a row on `<EOA>`, as many as the longest row has, at most
        `max_new_tokens`; and what was predicted for them, `(batch, tokens, d_llm)`.
    """
    steps = AlignerSteps(aligner, lookup, speech_states, speech_mask)
    sequences = torch.full((len(speech_states), max_new_tokens), eoa_token_id, device=lookup.table.device)
    embeds = steps.weight.new_zeros(*sequences.shape, lookup.table.shape[-1])
    rows = torch.arange(len(sequences), device=sequences.device)  # of `sequences`, that are still being written
    tokens = torch.full_like(rows, boa_token_id)
    for position in range(max_new_tokens):
        predicted, tokens = steps.next(tokens, position)
        sequences[rows, position], embeds[rows, position] = tokens, predicted
        if not asks(tokens, position):
            continue
        ended = (sequences[rows, : position + 1] == eoa_token_id).any(-1).nonzero().flatten().tolist()
        if ended:
            kept = close_ranks(len(rows), ended)
            rows, tokens = rows[kept], tokens[kept]
            steps.keep(kept)
        if not len(rows):
            break
    is_end = (sequences == eoa_token_id).cumsum(-1) > 0
    written = min(int((~is_end).sum(-1).max()) + 1, max_new_tokens)
    sequences = sequences.masked_fill(is_end, eoa_token_id)
    return tuple(values[:, :written].to(speech_states.device) for values in (sequences, embeds))


def checked_alignment(
    aligner: SeamAligner,
    lookup: NearestToken,
    speech_states: torch.FloatTensor,
    speech_mask: torch.Tensor | None,
    boa_token_id: int,
    eoa_token_id: int,
    max_new_tokens: int,
    drafts: list[list[int]],
) -> tuple[list[Row], list[torch.FloatTensor]]:
    """
    The same tokens as those of `greedy_alignment`, from drafts that are checked under teacher forcing: as many tokens
    of each row in one pass as it has good reason to believe.

    Args:
        drafts: per row the ids that a draft head wrote, without `<EOA>`.

    Returns:
        The rows, of which `written` holds the tokens and, unless it was cut, `<EOA>`; and for each what was predicted
        for these, `(tokens, d_llm)`.
    """
    steps = AlignerSteps(aligner, lookup, speech_states, speech_mask)
    kind = steps.weight.device.type
    weights = WEIGHTS_IN_POSITIONS.get(kind, WEIGHTS_IN_POSITIONS["other"])
    batch = DraftedBatch(drafts, [[] for _ in drafts], max_new_tokens, weights)
    embeds = [[] for _ in drafts]
    own = list(embeds)  # of the batch's rows, in their order
    while batch.rows:
        proposals = batch.propose()
        last = [row.written[-1] if row.written else boa_token_id for row in batch.rows]
        given = [[token, *proposal] for token, proposal in zip(last, proposals, strict=True)]
        predicted, choices = steps.next_of_each(given, [len(row.written) for row in batch.rows])
        new, kept = batch.read(proposals, choices, {eoa_token_id})
        for pieces, some, tokens in zip(own, predicted, new, strict=True):
            pieces.append(some[: len(tokens)])
        own = [own[row] for row in kept]
        steps.keep(kept)
    return batch.everything, [torch.cat(pieces).to(speech_states.device) for pieces in embeds]


# Positions for which the cache of the tokens' keys and values has room at first; it doubles when they are used up.
FIRST_POSITIONS = 64


@dataclass
class Places:
    """
    Where the positions of a step stand.

    Args:
        positions (`torch.LongTensor` of shape `(rows, n)`, *optional*): in their utterances; none if there is one of
            each row, and the same.
        stop: one more than the last of them.
        mask (`torch.FloatTensor` of shape `(rows, 1, n, stop)`, *optional*): minus infinity for what is later.
    """

    positions: torch.LongTensor | None
    stop: int
    mask: torch.FloatTensor | None = None


class AlignerSteps:
    """
    Eq. 1 and Eq. 8 for a batch, position by position: what each utterance wrote so far stays in a cache, its speech
    states' keys and values are computed once.

    Args:
        aligner: whose weights compute.
        lookup: its tokens.
        speech_states, speech_mask: `(batch, speech, d_model)` and `(batch, speech)`.
    """

    def __init__(
        self,
        aligner: SeamAligner,
        lookup: NearestToken,
        speech_states: torch.FloatTensor,
        speech_mask: torch.Tensor | None,
    ):
        self.aligner, self.lookup = aligner, lookup
        self.weight = aligner.embed_positions.weight
        speech_states = speech_states.to(self.weight.device, aligner.input_projection.weight.dtype)
        mask = create_bidirectional_mask(
            config=aligner.config,
            inputs_embeds=speech_states[:, :1],
            attention_mask=speech_mask,
            encoder_hidden_states=speech_states,
        )
        self.speech_mask = None if mask is None else mask.clone()
        kind = aligner.config._attn_implementation
        self.layers = [LayerSteps(layer, kind, speech_states) for layer in aligner.layers]

    def next(self, tokens: torch.LongTensor, position: int) -> tuple[torch.FloatTensor, torch.LongTensor]:
        """
        Tokens `(rows,)` that all stand at one position, to what is predicted after them `(rows, d_llm)` and the nearest
        tokens `(rows,)`.
        """
        hidden_states = self._embed(tokens) + self.weight[position]
        predicted = self._predict(self._run(hidden_states, Places(None, position + 1)))
        return predicted, self.lookup.nearest(predicted)

    def next_of_each(
        self, tokens: list[list[int]], positions: list[int]
    ) -> tuple[Sequence[torch.FloatTensor], list[list[int]]]:
        """
        Some tokens of each row, the first of which stands at the row's position, to what is predicted after each of
        them, `(tokens, d_llm)`, and the nearest tokens. What the cache holds from there on is forgotten.
        """
        longest, device = max(map(len, tokens)), self.lookup.table.device
        if longest == 1 and len(set(positions)) == 1:
            predicted, nearest = self.next(torch.tensor([row[0] for row in tokens], device=device), positions[0])
            return list(predicted[:, None]), nearest[:, None].tolist()
        # Rows that are shorter are filled up: positions that none of their own sees, and the next step overwrites.
        ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in tokens], device=device)
        own = torch.tensor([[i < len(row) for i in range(longest)] for row in tokens])
        places = torch.tensor(positions)[:, None] + torch.arange(longest)
        places = places.clamp_max(len(self.weight) - 1).to(self.weight.device)
        stop = min(max(positions) + longest, len(self.weight))
        mask = torch.arange(stop, device=places.device) > places[:, None, :, None]
        mask = torch.zeros(mask.shape, dtype=self.weight.dtype, device=places.device).masked_fill_(mask, -torch.inf)
        hidden_states = (self._embed(ids.flatten()).unflatten(0, ids.shape) + self.weight[places]).flatten(0, 1)
        hidden_states = self._run(hidden_states, Places(places, stop, mask))
        predicted = self._predict(hidden_states[own.flatten().to(hidden_states.device)])
        counts = [len(row) for row in tokens]
        return predicted.split(counts), [row.tolist() for row in self.lookup.nearest(predicted).split(counts)]

    def keep(self, rows: list[int]):
        """From now on the i-th row is the `rows[i]`-th, `rows[i] >= i`; others are no longer computed."""
        if self.speech_mask is not None:
            self.speech_mask = self.speech_mask[rows]
        for layer in self.layers:
            layer.keep(rows)

    def _embed(self, tokens: torch.LongTensor) -> torch.Tensor:
        embeds = self.lookup.embed(tokens).to(self.weight.device, self.weight.dtype)
        return few_rows_linear(self.aligner.input_projection, embeds)

    def _run(self, hidden_states: torch.Tensor, places: Places) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer.step(hidden_states, places, self.speech_mask)
        return hidden_states

    def _predict(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return few_rows_linear(self.aligner.output_projection, self.aligner.layer_norm(hidden_states))


class LayerSteps:
    """
    One `WhisperDecoderLayer` with the keys and values of both attentions.

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
        return states.view(*states.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)

    def step(self, hidden_states: torch.Tensor, places: Places, speech_mask: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            hidden_states: `(rows * n, d_model)`, of the positions at `places`.
            speech_mask: as the attention takes it, `(rows, 1, 1, speech)`, or none.

        Returns:
            The layer's output, of the same shape.
        """
        layer = self.layer
        states, own = layer.self_attn_layer_norm(hidden_states), layer.self_attn
        new = [
            self._heads(own, few_rows_linear(project, states).unflatten(0, (self.count, -1)))
            for project in (own.k_proj, own.v_proj)
        ]
        self._remember(new, places)
        past = [cache[: self.count, :, : places.stop] for cache in self.tokens]
        hidden_states = hidden_states + self._attend(own, states, *past, places.mask)
        states = layer.encoder_attn_layer_norm(hidden_states)
        speech = [cache[: self.count] for cache in self.speech]
        hidden_states = hidden_states + self._attend(layer.encoder_attn, states, *speech, speech_mask)
        states = layer.activation_fn(few_rows_linear(layer.fc1, layer.final_layer_norm(hidden_states)))
        return hidden_states + few_rows_linear(layer.fc2, states)

    def _attend(self, attention: nn.Module, states, keys, values, mask) -> torch.Tensor:
        # The query is scaled before the product, as WhisperAttention does.
        query = few_rows_linear(attention.q_proj, states) * attention.scaling
        query = self._heads(attention, query.unflatten(0, (self.count, -1)))
        attended, _ = self.attention(attention, query, keys, values, mask, dropout=0.0, scaling=1.0)
        return few_rows_linear(attention.out_proj, attended.flatten(2).flatten(0, 1))

    def _remember(self, new: list[torch.Tensor], places: Places):
        """Keys and values `(rows, heads, n, head_dim)` of the positions go into the cache."""
        if self.tokens is None:
            batch, heads, _, dim = new[0].shape
            # Zeros, for what a row has not reached is read, with a weight of zero, when another row has.
            self.tokens = [state.new_zeros(batch, heads, FIRST_POSITIONS, dim) for state in new]
        while places.stop > self.tokens[0].shape[2]:
            self.tokens = [torch.cat([cache, torch.zeros_like(cache)], dim=2) for cache in self.tokens]
        for cache, state in zip(self.tokens, new, strict=True):
            if places.positions is None:
                cache[: self.count, :, places.stop - 1] = state[:, :, 0]
            else:
                rows = torch.arange(self.count, device=state.device)[:, None]
                cache[rows, :, places.positions] = state.transpose(1, 2)

    def keep(self, rows: list[int]):
        """As that of [`AlignerSteps`]."""
        self.count = len(rows)
        for cache in (*self.speech, *self.tokens):
            for to, row in enumerate(rows):
                if to != row:
                    cache[to] = cache[row]
