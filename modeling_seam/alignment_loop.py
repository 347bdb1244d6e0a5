"""Algorithm 1, greedy, without overhead: token by token, or checking a draft in a few parallel passes."""

import torch
from transformers import GenerationConfig

from .aligner import SeamAligner
from .aligner_steps import AlignerSteps
from .drafts import DraftedBatch, Row, close_ranks
from .nearest import NearestToken
from .plain_greedy import is_plain_greedy, is_shared, merged_settings

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
