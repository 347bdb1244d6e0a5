"""What `align` and `generate` return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class AlignmentOutput(ModelOutput):
    """
    Output of Stage 1.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, tokens)`): ids without `<BOA>` and `<EOA>`, padded at the end.
        mask (`torch.LongTensor` of shape `(batch, tokens)`): 1 for tokens, 0 for padding.
        aligned_embeds (`torch.FloatTensor` of shape `(batch, tokens, d_llm)`, *optional*): predicted embeddings;
            zeros for padding.
        distances (`torch.FloatTensor` of shape `(batch, tokens)`, *optional*): Eq. 7 to the chosen tokens; 0 for
            padding.
        forwards, accepted_tokens, rejected_tokens (`torch.LongTensor` of shape `(batch,)`, *optional*):
            When the draft head's tokens were verified (`verify`): the aligner's passes in which the row took part, and
            the draft tokens that it agreed with and did not. A token that was proposed again counts again.
        sequences_scores, scores, logits, beam_indices, hidden_states, attentions, cross_attentions (*optional*):
            See [`SeamGenerateOutput`].
    """

    sequences: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    aligned_embeds: torch.Tensor | None = None
    distances: torch.Tensor | None = None
    forwards: torch.Tensor | None = None
    accepted_tokens: torch.Tensor | None = None
    rejected_tokens: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    beam_indices: torch.Tensor | None = None
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
    attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    cross_attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None


@dataclass
class SeamGenerateOutput(ModelOutput):
    """
    Output of `generate`: the transcript, and what Stage 1 found.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, tokens)`): transcript ids, padded at the end.
        sequences_scores, scores, logits, beam_indices (*optional*):
            As `GenerationMixin.generate` returns them when asked to (`output_scores`, `output_logits`, beams), of the
            loop that decoded the transcript. The guiding first token was not chosen by it and has none; in rows where
            Stage 1 found no token they are minus infinity.
        hidden_states, attentions, cross_attentions (*optional*):
            As `GenerationMixin.generate` returns them with `output_hidden_states` and `output_attentions`: for each
            step of that loop one tensor for each layer. They are the language model's, with `use_llm=False` the
            aligner's, which alone attends to speech states. In rows where Stage 1 found no token they are zero.
        alignment_sequences, alignment_mask, alignment_distances, aligned_embeds: see [`AlignmentOutput`]. Of a bridge
            without a Stage 1, its embeddings and their mask.
        llm_forwards, accepted_tokens, rejected_tokens (`torch.LongTensor` of shape `(batch,)`, *optional*):
            As those of [`AlignmentOutput`], when the language model verified Stage 1's tokens: of its own forwards.
        alignment_forwards, alignment_accepted_tokens, alignment_rejected_tokens (*optional*): see [`AlignmentOutput`].
    """

    sequences: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    beam_indices: torch.Tensor | None = None
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
    attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    cross_attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    alignment_sequences: torch.Tensor | None = None
    alignment_mask: torch.Tensor | None = None
    alignment_distances: torch.Tensor | None = None
    aligned_embeds: torch.Tensor | None = None
    llm_forwards: torch.Tensor | None = None
    accepted_tokens: torch.Tensor | None = None
    rejected_tokens: torch.Tensor | None = None
    alignment_forwards: torch.Tensor | None = None
    alignment_accepted_tokens: torch.Tensor | None = None
    alignment_rejected_tokens: torch.Tensor | None = None


# What a loop reports about its choices, each with the value where it made none.
REPORTS = {
    "sequences_scores": -torch.inf,
    "scores": -torch.inf,
    "logits": -torch.inf,
    "beam_indices": -1,
    "hidden_states": 0,
    "attentions": 0,
    "cross_attentions": 0,
}
# What verifying a draft reports, of Stage 1 and of the language model.
ALIGNMENT_COUNTS = ("forwards", "accepted_tokens", "rejected_tokens")
LLM_COUNTS = ("llm_forwards", "accepted_tokens", "rejected_tokens")
