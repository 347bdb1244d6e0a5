"""
What may stand between the speech encoder and the language model: SEAM's aligner, or one of its rivals. The rivals are
the duration-based bridges of Figure 3, whose number of embeddings follows the audio's length, and a CTC head, which
writes tokens without attention.
"""

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from .aligner import SeamAligner
from .ctc import CTCHead


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
