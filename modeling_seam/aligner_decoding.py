"""Greedy search of Algorithm 1 without overhead: token by token, or verifying a draft in a few parallel passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperDecoderLayer, eager_attention_forward

from .aligner import SeamAligner
from .fast_matmul import skinny_linear
from .nearest import NearestToken
from .speculative import DraftedBatch, Row, compact_rows, is_plain_greedy, is_shared, merged_settings

# On an accelerator, the host looks only every so many tokens which rows have ended, for it has to wait for the device.
LOOK_EVERY = 8

# What a pass costs beside its positions, in positions: on two CPU cores at paper size 0.15 s and 0.004 s (see
# `llm_decoding.WEIGHTS_IN_POSITIONS`).
WEIGHTS_IN_POSITIONS = {"cpu": 40, "other": 230}


def can_run(aligner: SeamAligner, generation_config: GenerationConfig, arguments: dict) -> bool:
    """
    Return whether `greedy_alignment` does what `aligner.generate` would do with these settings and arguments.

    It does not for any other search, for a streamer or processors, for reports, for an aligner that is in training,
    compiled or spread over devices, and for attention that takes masks of its own kind.
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


def looks_for_ends(tokens: torch.Tensor, position: int) -> bool:
    """Return whether the host looks after this position which rows have ended."""
    return tokens.device.type == "cpu" or (position + 1) % LOOK_EVERY == 0


def greedy_alignment(
    aligner: SeamAligner,
    lookup: NearestToken,
    speech_states: torch.Tensor,
    speech_mask: torch.Tensor | None,
    start_ids: list[int],
    eoa_token_id: int,
    max_new_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Decode a batch greedily (Algorithm 1): each step feeds back the nearest tokens of the last one.

    A row that has ended is no longer computed.

    Args:
        speech_states, speech_mask: `(batch, speech, d_model)` and `(batch, speech)`.
        start_ids: with which the rows begin, the last one `<BOA>` (`token_table.start_ids`).
        eoa_token_id: of `<EOA>`.
        max_new_tokens: length at which a row without `<EOA>` is cut.

    Returns:
        Token ids `(batch, tokens)` of the length of the longest row, at most `max_new_tokens`, filled up with `<EOA>`;
        and the predicted embeddings, `(batch, tokens, d_llm)`.
    """
    steps = AlignerSteps(aligner, lookup, speech_states, speech_mask, start_ids[:-1])
    sequences = torch.full((len(speech_states), max_new_tokens), eoa_token_id, device=lookup.table.device)
    embeds = steps.weight.new_zeros(*sequences.shape, lookup.table.shape[-1])
    rows = torch.arange(len(sequences), device=sequences.device)  # of `sequences`, that have not ended
    tokens = torch.full_like(rows, start_ids[-1])
    for position in range(max_new_tokens):
        predicted, tokens = steps.next(tokens, position)
        sequences[rows, position], embeds[rows, position] = tokens, predicted
        if not looks_for_ends(tokens, position):
            continue
        ended = (sequences[rows, : position + 1] == eoa_token_id).any(-1).nonzero().flatten().tolist()
        if ended:
            kept = compact_rows(len(rows), ended)
            rows, tokens = rows[kept], tokens[kept]
            steps.keep(kept)
        if not len(rows):
            break
    is_end = (sequences == eoa_token_id).cumsum(-1) > 0
    longest = min(int((~is_end).sum(-1).max()) + 1, max_new_tokens)
    sequences = sequences.masked_fill(is_end, eoa_token_id)
    return sequences[:, :longest].to(speech_states.device), embeds[:, :longest].to(speech_states.device)


def verified_alignment(
    aligner: SeamAligner,
    lookup: NearestToken,
    speech_states: torch.Tensor,
    speech_mask: torch.Tensor | None,
    start_ids: list[int],
    eoa_token_id: int,
    max_new_tokens: int,
    drafts: list[list[int]],
) -> tuple[list[Row], list[torch.Tensor]]:
    """
    Decode the same tokens as `greedy_alignment`, by verifying drafts under teacher forcing.

    One pass verifies as many tokens of each row as are likely to agree.

    Args:
        drafts: per row the draft head's ids, without `<EOA>`.

    Returns:
        The rows, whose `output` is the tokens and, unless it was cut, `<EOA>`; and for each the predicted embeddings
        `(tokens, d_llm)`.
    """
    steps = AlignerSteps(aligner, lookup, speech_states, speech_mask, start_ids[:-1])
    kind = steps.weight.device.type
    weights = WEIGHTS_IN_POSITIONS.get(kind, WEIGHTS_IN_POSITIONS["other"])
    batch = DraftedBatch(drafts, [[] for _ in drafts], max_new_tokens, weights)
    embeds: list[list[torch.Tensor]] = [[] for _ in drafts]
    own = list(embeds)  # of the batch's rows, in their order
    while batch.rows:
        proposals = batch.propose()
        last = [row.output[-1] if row.output else start_ids[-1] for row in batch.rows]
        given = [[token, *proposal] for token, proposal in zip(last, proposals, strict=True)]
        predicted, choices = steps.next_of_each(given, [len(row.output) for row in batch.rows])
        new, kept = batch.accept(proposals, choices, {eoa_token_id})
        for pieces, some, tokens in zip(own, predicted, new, strict=True):
            pieces.append(some[: len(tokens)])
        own = [own[row] for row in kept]
        steps.keep(kept)
    return batch.all_rows, [torch.cat(pieces).to(speech_states.device) for pieces in embeds]


# Positions that the cache of the tokens' keys and values has at first; it doubles when they are used up.
FIRST_POSITIONS = 64


@dataclass
class StepPositions:
    """
    The positions of a step.

    Args:
        positions (`torch.LongTensor` of shape `(rows, n)`, *optional*): in their utterances; none when every row has
            one, and the same.
        stop: one more than the last of them.
        mask (`torch.FloatTensor` of shape `(rows, 1, n, stop)`, *optional*): minus infinity for what is later.
    """

    positions: torch.Tensor | None
    stop: int
    mask: torch.Tensor | None = None


class AlignerSteps:
    """
    Compute Eq. 1 and Eq. 8 for a batch, position by position.

    The keys and values of an utterance's tokens are cached, those of its speech states are computed once.

    Args:
        aligner: the weights.
        lookup: the tokens.
        speech_states, speech_mask: `(batch, speech, d_model)` and `(batch, speech)`.
        prompt: ids before `<BOA>`; positions, which count from `<BOA>`, follow them.
    """

    def __init__(
        self,
        aligner: SeamAligner,
        lookup: NearestToken,
        speech_states: torch.Tensor,
        speech_mask: torch.Tensor | None,
        prompt: list[int],
    ):
        self.aligner, self.lookup = aligner, lookup
        self.weight = aligner.embed_positions.weight
        speech_states = speech_states.to(self.weight.device, aligner.layer_norm.weight.dtype)
        mask: Any = create_bidirectional_mask(
            config=aligner.config,
            inputs_embeds=speech_states[:, :1],
            attention_mask=speech_mask,
            encoder_hidden_states=speech_states,
        )
        self.speech_mask = None if mask is None else mask.clone()
        kind = aligner.config._attn_implementation
        layers: Any = aligner.layers
        self.layers = [LayerSteps(layer, kind, speech_states) for layer in layers]
        self.before = 0
        if prompt:
            self._run_all([prompt] * len(speech_states), [0] * len(speech_states))
            self.before = len(prompt)

    def next(self, tokens: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Predict the next token of every row.

        Args:
            tokens: `(rows,)`, all at the same position.

        Returns:
            The predicted embeddings `(rows, d_llm)`, and the nearest tokens `(rows,)`.
        """
        position += self.before
        hidden_states = self._embed(tokens) + self.weight[position]
        predicted = self._predict(self._run(hidden_states, StepPositions(None, position + 1)))
        return predicted, self.lookup.nearest(predicted)

    def next_of_each(
        self, tokens: list[list[int]], positions: list[int]
    ) -> tuple[Sequence[torch.Tensor], list[list[int]]]:
        """
        Predict the token after each of several tokens of every row.

        Args:
            tokens: per row. What the cache has from the first one on is forgotten.
            positions: of the first token of each row.

        Returns:
            Per row the predicted embeddings `(tokens, d_llm)`, and the nearest tokens.
        """
        longest, device = max(map(len, tokens)), self.lookup.table.device
        if longest == 1 and len(set(positions)) == 1:
            predicted, nearest = self.next(torch.tensor([row[0] for row in tokens], device=device), positions[0])
            return list(predicted[:, None]), nearest[:, None].tolist()
        predicted = self._predict(self._run_all(tokens, [position + self.before for position in positions]))
        counts = [len(row) for row in tokens]
        return predicted.split(counts), [row.tolist() for row in self.lookup.nearest(predicted).split(counts)]

    def _run_all(self, tokens: list[list[int]], positions: list[int]) -> torch.Tensor:
        """Run several tokens of every row, from its position on: `(tokens of all rows, d_model)`."""
        longest, device = max(map(len, tokens)), self.lookup.table.device
        # Shorter rows are filled up, at positions that none of their own sees and that the next step overwrites.
        ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in tokens], device=device)
        own = torch.tensor([[i < len(row) for i in range(longest)] for row in tokens])
        at = torch.tensor(positions)[:, None] + torch.arange(longest)
        at = at.clamp_max(len(self.weight) - 1).to(self.weight.device)
        stop = min(max(positions) + longest, len(self.weight))
        mask = torch.arange(stop, device=at.device) > at[:, None, :, None]
        mask = torch.zeros(mask.shape, dtype=self.weight.dtype, device=at.device).masked_fill_(mask, -torch.inf)
        hidden_states = (self._embed(ids.flatten()).unflatten(0, ids.shape) + self.weight[at]).flatten(0, 1)
        hidden_states = self._run(hidden_states, StepPositions(at, stop, mask))
        return hidden_states[own.flatten().to(hidden_states.device)]

    def keep(self, rows: list[int]):
        """Let the i-th row be the `rows[i]`-th from now on, `rows[i] >= i`; others are no longer computed."""
        if self.speech_mask is not None:
            self.speech_mask = self.speech_mask[rows]
        for layer in self.layers:
            layer.keep(rows)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.aligner.embed_tokens(tokens, self.lookup, self._project)

    def _run(self, hidden_states: torch.Tensor, at: StepPositions) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer.step(hidden_states, at, self.speech_mask)
        return hidden_states

    def _predict(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.aligner.predict(hidden_states, self.lookup, self._project)[0]

    def _project(self, layer: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
        return skinny_linear(layer, states.to(self.weight.device))


class LayerSteps:
    """
    One `WhisperDecoderLayer` with the keys and values of both attentions.

    Args:
        layer: the weights.
        attention: name of the attention's implementation.
        speech_states: `(batch, speech, d_model)`.
    """

    def __init__(self, layer: WhisperDecoderLayer, attention: str, speech_states: torch.Tensor):
        self.layer = layer
        self.attention = ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager_attention_forward)
        of_speech = layer.encoder_attn
        self.speech = [
            self._heads(of_speech, project(speech_states)) for project in (of_speech.k_proj, of_speech.v_proj)
        ]
        self.tokens: list[torch.Tensor] = []
        self.count = len(speech_states)  # rows in use: the first ones

    def _heads(self, attention: WhisperAttention, states: torch.Tensor) -> torch.Tensor:
        """Reshape `(batch, seq, d_model)` to `(batch, heads, seq, head_dim)`."""
        return states.view(*states.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)

    def step(self, hidden_states: torch.Tensor, at: StepPositions, speech_mask: torch.Tensor | None) -> torch.Tensor:
        """
        Run the layer on some positions of every row.

        Args:
            hidden_states: `(rows * n, d_model)`.
            at: their positions.
            speech_mask: as the attention takes it, `(rows, 1, 1, speech)`, or none.

        Returns:
            The layer's output, of the same shape.
        """
        layer = self.layer
        states, own = layer.self_attn_layer_norm(hidden_states), layer.self_attn
        new = [
            self._heads(own, skinny_linear(project, states).unflatten(0, (self.count, -1)))
            for project in (own.k_proj, own.v_proj)
        ]
        self._cache(new, at)
        keys, values = (cache[: self.count, :, : at.stop] for cache in self.tokens)
        hidden_states = hidden_states + self._attend(own, states, keys, values, at.mask)
        states = layer.encoder_attn_layer_norm(hidden_states)
        keys, values = (cache[: self.count] for cache in self.speech)
        hidden_states = hidden_states + self._attend(layer.encoder_attn, states, keys, values, speech_mask)
        states = layer.activation_fn(skinny_linear(layer.fc1, layer.final_layer_norm(hidden_states)))
        return hidden_states + skinny_linear(layer.fc2, states)

    def _attend(self, attention: WhisperAttention, states, keys, values, mask) -> torch.Tensor:
        # The query is scaled before the product, as WhisperAttention does.
        query = skinny_linear(attention.q_proj, states) * attention.scaling
        query = self._heads(attention, query.unflatten(0, (self.count, -1)))
        attended, _ = self.attention(attention, query, keys, values, mask, dropout=0.0, scaling=1.0)
        return skinny_linear(attention.out_proj, attended.flatten(2).flatten(0, 1))

    def _cache(self, new: list[torch.Tensor], at: StepPositions):
        """Put keys and values `(rows, heads, n, head_dim)` of these positions into the cache."""
        if not self.tokens:
            batch, heads, _, dim = new[0].shape
            # Zeros, for what a row has not reached is read, with a weight of zero, when another row has.
            self.tokens = [state.new_zeros(batch, heads, FIRST_POSITIONS, dim) for state in new]
        while at.stop > self.tokens[0].shape[2]:
            self.tokens = [torch.cat([cache, torch.zeros_like(cache)], dim=2) for cache in self.tokens]
        for cache, state in zip(self.tokens, new, strict=True):
            if at.positions is None:
                cache[: self.count, :, at.stop - 1] = state[:, :, 0]
            else:
                rows = torch.arange(self.count, device=state.device)[:, None]
                cache[rows, :, at.positions] = state.transpose(1, 2)

    def keep(self, rows: list[int]):
        """Let the i-th row be the `rows[i]`-th from now on, as in [`AlignerSteps`]."""
        self.count = len(rows)
        for cache in (*self.speech, *self.tokens):
            for to, row in enumerate(rows):
                if to != row:
                    cache[to] = cache[row]
