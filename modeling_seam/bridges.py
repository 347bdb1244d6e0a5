"""
The bridges between speech encoder and language model: SEAM's aligner and the baselines that it is compared with.

The baselines are the duration-based bridges of Figure 3, whose number of embeddings follows the audio's length, and a
CTC head, which outputs tokens without attention.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from .aligner import SeamAligner
from .token_table import TableAligner


class LinearBridge(nn.Module):
    """
    Project neighbouring speech states, concatenated, through two linear layers, as SLAM-ASR does.

    See Ma et al. 2024, arXiv 2402.08846. With 5 of Whisper's 50 states a second: 10 embeddings a second.

    Args:
        config ([`SeamConfig`]): sizes of encoder and language model.
        states: speech states of one embedding, k.
        hidden_size: between the two layers.
    """

    has_stage_1 = False

    def __init__(self, config, states: int = 5, hidden_size: int = 2048):
        super().__init__()
        self.states = states
        self.inner = nn.Linear(states * config.audio_config.d_model, hidden_size)
        self.outer = nn.Linear(hidden_size, config.get_text_config().hidden_size)

    def forward(self, speech_states: torch.Tensor, speech_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Map speech states to embeddings for the language model.

        Args:
            speech_states, speech_mask: `(batch, speech, d_speech)` and `(batch, speech)`; see `encode` of the model.

        Returns:
            Embeddings `(batch, n, d_llm)` and their mask `(batch, n)`. Where fewer than k states are left at the end of
            an utterance, zeros are added; none is dropped.
        """
        speech_states = speech_states.to(self.inner.weight.dtype) * speech_mask[..., None]
        missing = -speech_states.shape[1] % self.states
        grouped = nn.functional.pad(speech_states, (0, 0, 0, missing)).unflatten(1, (-1, self.states)).flatten(2)
        mask = nn.functional.pad(speech_mask, (0, missing)).unflatten(1, (-1, self.states)).amax(-1)
        return self.outer(self.inner(grouped).relu()), mask


class QFormerBridge(nn.Module):
    """
    Let trained queries attend to the speech states of each window, as SALMONN's window-level Q-Former does.

    See Tang et al. 2023, arXiv 2310.13289. A window of 17 states is 0.33 s: 88 windows in Whisper's 30 s.

    Args:
        config ([`SeamConfig`]): sizes of encoder and language model.
        window: speech states of one window. What remains of an utterance belongs to its last window, or is a window of
            its own where it is more than half of one.
        queries: embeddings of one window.
        qformer: fields of `Blip2QFormerConfig`: BERT's sizes by default, in two layers that both attend to the speech.
    """

    has_stage_1 = False

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

    def forward(self, speech_states: torch.Tensor, speech_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map speech states to embeddings, with the arguments and results of [`LinearBridge`]."""
        speech_states = self.norm(speech_states.to(self.output.weight.dtype))
        lengths = speech_mask.sum(-1)
        counts = ((lengths + self.window // 2) // self.window).clamp_min(1)
        window = torch.arange(int(counts.max()), device=lengths.device)
        # A last window reaches to the end of the utterance: at most half a window further.
        position = window[:, None] * self.window + torch.arange(self.window + self.window // 2, device=lengths.device)
        is_last = window == counts[:, None] - 1
        own = torch.where(is_last[..., None], lengths[:, None, None], (window[:, None] + 1) * self.window)
        mask = (window < counts[:, None]).long()
        seen = (position < own) & (position < lengths[:, None, None])
        # Windows past an utterance's end look at its first state, so that no row of the attention is empty; masked.
        seen = torch.where(mask[..., None].bool(), seen, position == position[:, :1])
        rows = torch.arange(len(lengths), device=lengths.device)[:, None, None]
        windows = speech_states[rows, position.clamp_max(speech_states.shape[1] - 1)].flatten(0, 1)
        found = self.qformer(
            query_embeds=self.queries.expand(len(windows), -1, -1),
            encoder_hidden_states=windows,
            encoder_attention_mask=seen.flatten(0, 1).long(),
        ).last_hidden_state
        embeds = self.output(found).unflatten(0, mask.shape).flatten(1, 2)
        return embeds, mask.repeat_interleave(self.queries.shape[1], dim=-1)


class CTCHead(nn.Module):
    """
    Map speech states to the tokens that it can output and the blank, which is the last, by one linear layer.

    Args:
        d_speech: size of the speech states.
        token_ids: the ids that it can output, in ascending order.
        excluded_ids: those of them that `decode` leaves out.
    """

    def __init__(self, d_speech: int, token_ids: Sequence[int], excluded_ids: Sequence[int] = ()):
        super().__init__()
        self.head = nn.Linear(d_speech, len(token_ids) + 1)
        self.blank = len(token_ids)
        # No buffer, and on the CPU for sure: a model is built without memory, and what is not saved stays without it.
        self.token_ids = torch.tensor(token_ids, device="cpu")
        excluded = torch.tensor(excluded_ids, dtype=torch.long, device="cpu")
        self.excluded = torch.searchsorted(self.token_ids, excluded).tolist()

    def forward(self, speech_states: torch.Tensor) -> torch.Tensor:
        """Map speech states `(..., d_speech)` to unnormalised log probabilities `(..., len(token_ids) + 1)`."""
        return self.head(speech_states.to(self.head.weight.dtype)).float()

    def loss(self, speech_states: torch.Tensor, speech_mask: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """
        Compute the CTC loss, summed over the batch.

        Args:
            speech_states, speech_mask: `(batch, speech, d_speech)` and `(batch, speech)`; see `encode` of the model.
            token_ids: transcripts `(batch, tokens)`, padded with -100. Ids that the head cannot output are left out: it
                learns, and is measured on, the rest of the transcript.

        Returns:
            Minus the log probability of all transcripts, `()`. A transcript with more tokens than the audio has states
            is impossible for CTC: it adds nothing.
        """
        known = self.token_ids.to(token_ids.device)
        classes = torch.searchsorted(known, token_ids).clamp_max(self.blank - 1)
        is_token = known[classes] == token_ids  # the padding is no id either
        return nn.functional.ctc_loss(
            self(speech_states).log_softmax(-1).transpose(0, 1),
            classes[is_token],
            speech_mask.sum(-1),
            is_token.sum(-1),
            blank=self.blank,
            reduction="sum",
            zero_infinity=True,
        )

    def decode(
        self, speech_states: torch.Tensor, speech_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Collapse the most probable path: return ids `(batch, tokens)`, padded at the end, and their mask."""
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

    def _path(self, speech_states: torch.Tensor) -> torch.Tensor:
        """
        Return the most probable class at each state of one utterance, `(speech, d_speech)` to `(speech,)`.

        One at a time: the scores of 1500 states over a vocabulary of 151,936 take 0.9 GB.
        """
        scores = self(speech_states)
        scores[:, self.excluded] = -torch.inf
        return scores.argmax(-1)


class CTCBridge(CTCHead):
    """
    Recognise tokens by a CTC head over the language model's vocabulary: the simplest baseline that has a Stage 1.

    The language model receives the embeddings of these tokens.

    Args:
        config ([`SeamConfig`]): sizes and the ids that are never output.
    """

    has_stage_1 = True

    def __init__(self, config):
        excluded = {*(config.lookup_excluded_ids or ()), config.eoa_token_id}
        super().__init__(config.audio_config.d_model, range(config.get_text_config().vocab_size), sorted(excluded))


BRIDGES: dict[str, Any] = {"aligner": SeamAligner, "linear": LinearBridge, "qformer": QFormerBridge, "ctc": CTCBridge}


def require_stage_1(config, purpose: str) -> None:
    """Raise `ValueError`, which begins with `purpose`, where the bridge of the config has no Stage 1."""
    if not BRIDGES[config.bridge].has_stage_1:
        accepted = ", ".join(name for name, bridge in BRIDGES.items() if bridge.has_stage_1)
        raise ValueError(f"{purpose}: the bridge {config.bridge!r} has no Stage 1; accepted: {accepted}.")


def build_bridge(config) -> nn.Module:
    """
    Build the bridge that `config.bridge` names, with fresh weights.

    Raises:
        ValueError: for a setting in `config.bridge_config` that the bridge does not have.
    """
    if config.bridge == "aligner" and config.token_projection == "table":
        text_config, prompt_size = config.get_text_config(), len(config.aligner_prompt_tokens or ())
        return TableAligner(config.aligner_config, text_config.vocab_size, prompt_size, config.mixture_size)
    if config.bridge == "aligner":
        return SeamAligner(config.aligner_config, config.get_text_config().hidden_size)
    try:
        return BRIDGES[config.bridge](config, **(config.bridge_config or {}))
    except TypeError as error:
        raise ValueError(f"bridge_config of the bridge {config.bridge!r}: {error}") from error
