"""
What may stand between the speech encoder and the language model: SEAM's aligner, or one of its rivals. The rivals are
the duration-based bridges of Figure 3, whose number of embeddings follows the audio's length, and a CTC head, which
writes tokens without attention.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from .aligner import SeamAligner


class LinearBridge(nn.Module):
    """
    SLAM-ASR's projector (Ma et al. 2024, arXiv 2402.08846): neighbouring speech states side by side, through two linear
    layers. With 5 of Whisper's 50 states a second: 10 embeddings a second.

    Args:
        config ([`SeamConfig`]): sizes of encoder and language model.
        states: speech states of one embedding, k.
        hidden_size: between the two layers.
    """

    writes_tokens = False

    def __init__(self, config, states: int = 5, hidden_size: int = 2048):
        super().__init__()
        self.states = states
        self.inner = nn.Linear(states * config.audio_config.d_model, hidden_size)
        self.outer = nn.Linear(hidden_size, config.get_text_config().hidden_size)

    def forward(
        self, speech_states: torch.FloatTensor, speech_mask: torch.Tensor
    ) -> tuple[torch.FloatTensor, torch.LongTensor]:
        """
        Args:
            speech_states `(batch, speech, d_speech)`, speech_mask `(batch, speech)`: see `encode` of the model.

        Returns:
            Embeddings `(batch, n, d_llm)` and their mask `(batch, n)`; the last states of an utterance, fewer than k,
            are filled up with zeros rather than dropped.
        """
        speech_states = speech_states.to(self.inner.weight.dtype) * speech_mask[..., None]
        missing = -speech_states.shape[1] % self.states
        grouped = nn.functional.pad(speech_states, (0, 0, 0, missing)).unflatten(1, (-1, self.states)).flatten(2)
        mask = nn.functional.pad(speech_mask, (0, missing)).unflatten(1, (-1, self.states)).amax(-1)
        return self.outer(self.inner(grouped).relu()), mask


class QFormerBridge(nn.Module):
    """
    SALMONN's window-level Q-Former (Tang et al. 2023, arXiv 2310.13289): trained queries attend to the speech states of
    a window, of 0.33 s with 17 of Whisper's 50 states a second: 88 windows in 30 s.

    Args:
        config ([`SeamConfig`]): sizes of encoder and language model.
        window: speech states of one window. What remains of an utterance belongs to its last window, or is one of its
            own where it is more than half.
        queries: embeddings of one window.
        qformer: fields of `Blip2QFormerConfig`: BERT's sizes by default, in two layers that both attend to the speech.
    """

    writes_tokens = False

    def __init__(self, config, window: int = 17, queries: int = 1, **qformer):
        super().__init__()
        self.window = window
        settings = {
            "num_hidden_layers": 2,
            "cross_attention_frequency": 1,
            "encoder_hidden_size": config.audio_config.d_model,
            **qformer,
        }
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(**settings))
        self.queries = nn.Parameter(torch.zeros(1, queries, self.qformer.config.hidden_size))
        nn.init.normal_(self.queries, std=self.qformer.config.initializer_range)
        self.norm = nn.LayerNorm(config.audio_config.d_model)
        self.output = nn.Linear(self.qformer.config.hidden_size, config.get_text_config().hidden_size)

    def forward(
        self, speech_states: torch.FloatTensor, speech_mask: torch.Tensor
    ) -> tuple[torch.FloatTensor, torch.LongTensor]:
        """As that of [`LinearBridge`]."""
        speech_states = self.norm(speech_states.to(self.output.weight.dtype))
        lengths = speech_mask.sum(-1)
        counts = ((lengths + self.window // 2) // self.window).clamp_min(1)
        window = torch.arange(int(counts.max()), device=lengths.device)
        # A last window reaches to the end of the utterance: at most half a window further.
        place = window[:, None] * self.window + torch.arange(self.window + self.window // 2, device=lengths.device)
        is_last = window == counts[:, None] - 1
        own = torch.where(is_last[..., None], lengths[:, None, None], (window[:, None] + 1) * self.window)
        mask = (window < counts[:, None]).long()
        seen = (place < own) & (place < lengths[:, None, None])
        # Windows past an utterance's end look at its first state, so that no row of the attention is empty; masked.
        seen = torch.where(mask[..., None].bool(), seen, (place == place[:, :1]))
        rows = torch.arange(len(lengths), device=lengths.device)[:, None, None]
        windows = speech_states[rows, place.clamp_max(speech_states.shape[1] - 1)].flatten(0, 1)
        found = self.qformer(
            query_embeds=self.queries.expand(len(windows), -1, -1),
            encoder_hidden_states=windows,
            encoder_attention_mask=seen.flatten(0, 1).long(),
        ).last_hidden_state
        embeds = self.output(found).unflatten(0, mask.shape).flatten(1, 2)
        return embeds, mask.repeat_interleave(self.queries.shape[1], dim=-1)


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


class CTCBridge(CTCHead):
    """
    A CTC head over the language model's vocabulary on the frozen encoder: the simplest rival that has a Stage 1. The
    language model is given the embeddings of the tokens that it writes.

    Args:
        config ([`SeamConfig`]): sizes and the ids that are never written.
    """

    writes_tokens = True

    def __init__(self, config):
        never = {*(config.lookup_excluded_ids or ()), config.eoa_token_id}
        super().__init__(config.audio_config.d_model, range(config.get_text_config().vocab_size), sorted(never))


BRIDGES = {"linear": LinearBridge, "qformer": QFormerBridge, "ctc": CTCBridge}


def build_bridge(config) -> nn.Module:
    """
    The bridge that `config.bridge` names, with fresh weights.

    Raises:
        ValueError: for a setting in `config.bridge_config` that the bridge does not have.
    """
    if config.bridge == "aligner":
        return SeamAligner(config.aligner_config, config.get_text_config().hidden_size)
    try:
        return BRIDGES[config.bridge](config, **(config.bridge_config or {}))
    except TypeError as error:
        raise ValueError(f"bridge_config of the bridge {config.bridge!r}: {error}") from error
