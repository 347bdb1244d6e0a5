"""The one place where the prompt's ids become the embeddings that the language model reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence


def left_pad(rows: list[torch.Tensor], padding_value: float = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows `(length, ...)` on the left to `(batch, longest, ...)`; return them and the `(batch, longest)` mask."""
    padded = pad_sequence([row.flip(0) for row in rows], batch_first=True, padding_value=padding_value).flip(1)
    mask = pad_sequence([row.new_ones(len(row), dtype=torch.long) for row in rows], batch_first=True).flip(1)
    return padded, mask


def last_positions(count: int, device: torch.device) -> torch.Tensor:
    """
    Return `logits_to_keep` of a language model for the last `count` positions.

    A number would mean the same, but for the view that it takes, torch copies the whole output matrix, once a row.
    """
    return torch.arange(-count, 0, device=device)


@contextmanager
def logits_at(language_model: Any, positions: torch.Tensor) -> Iterator[None]:
    """
    Compute the language model's logits, within the context, only where a loss needs them: they are `(n, vocab)`.

    Args:
        positions (`torch.Tensor` of shape `(batch, seq)`): where there is a target, n of them, among those that the
            output layer would be given.
    """

    def select(head, inputs):
        return (inputs[0][positions],)

    handle = language_model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def splice(
    embed_tokens: nn.Module,
    prompt_ids: list[torch.Tensor],
    audio_token_id: int,
    aligned_embeds: list[torch.Tensor],
    reply_ids: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Embed a batch of `[T, E-hat, <assistant>, reply]` (Eq. 4 to Eq. 6), left-padded.

    In training the reply is the transcript; at inference it is the guiding first token, or nothing.

    Args:
        embed_tokens: the language model's embedding layer.
        prompt_ids: per row `(prompt,)` ids that hold `audio_token_id` exactly once.
        aligned_embeds: per row `(tokens, d_llm)`, put in the place of `audio_token_id`.
        reply_ids: per row `(reply,)` ids of the assistant's turn, possibly none.

    Returns:
        Embeddings `(batch, seq, d_llm)` and their mask `(batch, seq)`.

    Raises:
        ValueError: when a prompt does not hold `audio_token_id` exactly once.
    """
    rows = []
    for ids, aligned, reply in zip(prompt_ids, aligned_embeds, reply_ids, strict=True):
        found = (ids == audio_token_id).nonzero()
        if len(found) != 1:
            raise ValueError(f"a prompt must hold the audio token ({audio_token_id}) exactly once, found {len(found)}.")
        position = int(found)
        before, after = embed_tokens(ids[:position]), embed_tokens(torch.cat([ids[position + 1 :], reply]))
        rows.append(torch.cat([before, aligned.to(before), after]))
    return left_pad(rows)
