"""A CTC head (Graves et al. 2006) on the frozen speech encoder: tokens without attention, all at once."""

from collections.abc import Sequence

import torch
from torch import nn


class CTCHead(nn.Module):
    """
    One linear layer from speech states to the tokens that it can write and the blank, which is the last.

    Args:
        d_speech: size of the speech states.
        token_ids: the ids that it can write, in ascending order.
        never: those of them that `decode` leaves out.
    """

    def __init__(self, d_speech: int, token_ids: Sequence[int], never: Sequence[int] = ()):
        super().__init__()
        self.head = nn.Linear(d_speech, len(token_ids) + 1)
        self.blank = len(token_ids)
        # No buffer, and on the CPU for sure: a model is built without memory, and what is not saved stays without it.
        self.token_ids = torch.tensor(token_ids, device="cpu")
        self.never = torch.searchsorted(self.token_ids, torch.tensor(never, dtype=torch.long, device="cpu")).tolist()

    def forward(self, speech_states: torch.FloatTensor) -> torch.FloatTensor:
        """Speech states `(..., d_speech)` to unnormalised log probabilities `(..., len(token_ids) + 1)`."""
        return self.head(speech_states.to(self.head.weight.dtype)).float()

    def loss(
        self, speech_states: torch.FloatTensor, speech_mask: torch.Tensor, token_ids: torch.LongTensor
    ) -> torch.FloatTensor:
        """
        Args:
            speech_states `(batch, speech, d_speech)`, speech_mask `(batch, speech)`: see `encode` of the model.
            token_ids `(batch, tokens)`: transcripts, padded with -100. Ids that the head cannot write are passed over:
                it learns, and is measured on, the rest of the transcript.

        Returns:
            Minus the log probability of all transcripts, `()`. A transcript with more tokens than the audio has states
            cannot be written: it adds nothing.
        """
        known = self.token_ids.to(token_ids.device)
        places = torch.searchsorted(known, token_ids).clamp_max(self.blank - 1)
        is_token = known[places] == token_ids  # the padding is no id either
        return nn.functional.ctc_loss(
            self(speech_states).log_softmax(-1).transpose(0, 1),
            places[is_token],
            speech_mask.sum(-1),
            is_token.sum(-1),
            blank=self.blank,
            reduction="sum",
            zero_infinity=True,
        )

    def decode(
        self, speech_states: torch.FloatTensor, speech_mask: torch.Tensor | None = None
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """The most probable path, collapsed: ids `(batch, tokens)`, padded at the end, and their mask."""
        path = torch.stack([self._path(states) for states in speech_states]).to(speech_states.device)
        keep = path != self.blank
        keep[:, 1:] &= path[:, 1:] != path[:, :-1]
        if speech_mask is not None:
            keep &= speech_mask.bool()
        counts = keep.sum(-1, keepdim=True)
        mask = (torch.arange(int(counts.max()), device=path.device) < counts).long()
        ids = path.new_zeros(mask.shape)
        ids[mask.bool()] = self.token_ids.to(path.device)[path[keep]]
        return ids, mask

    def _path(self, speech_states: torch.FloatTensor) -> torch.LongTensor:
        """
        The most probable output at each state of one utterance, `(speech, d_speech)` to `(speech,)`. The scores of one
        are large enough: 1500 states over a vocabulary of 151,936 take 0.9 GB.
        """
        scores = self(speech_states)
        scores[:, self.never] = -torch.inf
        return scores.argmax(-1)
