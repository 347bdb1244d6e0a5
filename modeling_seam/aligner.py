"""The alignment decoder (Section 3.4): a Whisper decoder driven by projected LLM embeddings (Eq. 2)."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    WhisperConfig,
)
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.whisper.modeling_whisper import (
    WhisperAttention,
    WhisperDecoderLayer,
    WhisperPositionalEmbedding,
)
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .nearest import NearestToken

# What transformers calls the keys and values so far: `cache` since 5.24, in arguments and outputs alike.
CACHE = "cache" if "cache" in inspect.signature(WhisperDecoderLayer.forward).parameters else "past_key_values"


# Applies a linear layer: as it is, or as the loops do, which have a faster product for few rows.
Project = Callable[[nn.Linear, torch.Tensor], torch.Tensor]


def apply(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """Apply a linear layer as it is."""
    return layer(states)


@dataclass
class SeamAlignerOutput(CausalLMOutputWithCrossAttentions):
    """
    Output of the alignment decoder.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, seq, vocab_size)`, *optional*):
            Minus the alignment distance to every token, when a lookup is given: argmax is the nearest neighbour.
        aligned_embeds (`torch.FloatTensor` of shape `(batch, seq, d_llm)`):
            The predicted embeddings.
        past_key_values, since transformers 5.24 cache (`EncoderDecoderCache`, *optional*): Keys and values of both
            attentions.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): with `output_hidden_states`, the first layer's input
            and every layer's output.
        attentions, cross_attentions (`tuple[torch.FloatTensor]`, *optional*): with `output_attentions`, every layer's
            weights on the tokens and on the speech states.
        token_logits (`torch.FloatTensor` of shape `(batch, seq, returnable)`, *optional*):
            Of a [`TableAligner`], with `return_token_logits`: the table's scores of `lookup.returnable`.
    """

    aligned_embeds: torch.Tensor | None = None
    token_logits: torch.Tensor | None = None

    @property
    def decoder_hidden_states(self):
        """Return `hidden_states` by the name that the loop of an encoder-decoder looks for."""
        return self.hidden_states

    @property
    def decoder_attentions(self):
        """Return `attentions` by the name that the loop of an encoder-decoder looks for."""
        return self.attentions


class SeamAligner(PreTrainedModel, GenerationMixin):
    """
    Predict the LLM embedding of the next token from the tokens so far and the speech states.

    It is an encoder-decoder without an encoder whose logits are minus the alignment distance, so that the stock
    greedy search of `GenerationMixin` *is* Algorithm 1. The layers are transformers' own `WhisperDecoderLayer`s; they
    are run here rather than by `WhisperDecoder`, which has a vocabulary table and takes no mask over the speech.

    Args:
        config: `WhisperConfig`, of which the decoder's fields are used.
        llm_dim: size of the LLM's embeddings, d_llm.
    """

    has_stage_1 = True  # it predicts tokens
    config: WhisperConfig
    base_model_prefix = "aligner"
    main_input_name = "input_features"  # never given: `generate` takes `encoder_outputs`
    supports_gradient_checkpointing = True
    _no_split_modules = ["WhisperDecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": WhisperDecoderLayer,
        "attentions": OutputRecorder(WhisperAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(WhisperAttention, index=1, layer_name="encoder_attn"),
    }

    def __init__(self, config: WhisperConfig, llm_dim: int):
        super().__init__(config)
        self.input_projection = nn.Linear(llm_dim, config.d_model, bias=False)  # W_E-proj
        self._add_layers()
        self.output_projection = nn.Linear(config.d_model, llm_dim, bias=False)  # W_out
        self._finish()

    def _add_layers(self) -> None:
        """Add what it has in common with a Whisper decoder."""
        config = self.config
        self.embed_positions = WhisperPositionalEmbedding(config.max_target_positions, config.d_model)
        self.layers = nn.ModuleList([WhisperDecoderLayer(config, index) for index in range(config.decoder_layers)])
        self.layer_norm = nn.LayerNorm(config.d_model)

    def _finish(self) -> None:
        """Initialise the weights, once all are there."""
        self.gradient_checkpointing = False
        self.post_init()
        # Not the one that transformers derives from a Whisper config, which forbids Whisper's own token ids.
        self.generation_config = GenerationConfig()

    def embed_tokens(self, token_ids: torch.Tensor, lookup: NearestToken, project: Project = apply) -> torch.Tensor:
        """
        Read tokens (Eq. 2): map ids `(...)` to the first layer's input without positions, `(..., d_model)`.

        Args:
            project: applies a linear layer; the loops have a faster one for few rows.
        """
        return project(self.input_projection, lookup.embed(token_ids).to(self.layer_norm.weight))

    def predict(
        self, hidden_states: torch.Tensor, lookup: NearestToken, project: Project = apply
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Write tokens (Eq. 2): map the last layer's output `(..., d_model)` to the predicted embeddings.

        Returns:
            The embeddings `(..., d_llm)` and, of a [`TableAligner`], its scores (see `token_logits`).
        """
        return project(self.output_projection, self.layer_norm(hidden_states)), None

    def logits(self, aligned_embeds: torch.Tensor, lookup: NearestToken) -> torch.Tensor:
        """Return minus the alignment distances of predicted embeddings to all tokens, `(..., vocab_size)` (Eq. 7)."""
        return -lookup.distances(aligned_embeds)

    @capture_outputs
    def forward(
        self,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        attention_mask: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        lookup: NearestToken | None = None,
        return_logits: bool = True,
        return_token_logits: bool = False,
        **kwargs: Any,
    ) -> SeamAlignerOutput:
        """
        Predict the embedding after each token (Eq. 2).

        Args:
            decoder_input_ids (`torch.LongTensor` of shape `(batch, seq)`): tokens so far; those of the cache left out.
            encoder_outputs (`BaseModelOutput`): speech states `(batch, speech, d_model)` as `last_hidden_state`.
            attention_mask (`torch.Tensor` of shape `(batch, speech)`, *optional*): 1 for states that hold audio.
            decoder_attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): 1 for real tokens.
            past_key_values, cache (`EncoderDecoderCache`, *optional*): keys and values so far, by the one name or the
                other.
            lookup (`NearestToken`): the tokens.
            return_logits (`bool`, *optional*, defaults to `True`): whether `logits` are computed.
            return_token_logits (`bool`, *optional*, defaults to `False`): see [`SeamAlignerOutput`].
        """
        if lookup is None or decoder_input_ids is None:
            raise ValueError("decoder_input_ids and lookup are required.")
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        # The encoder and the language model may be kept in half precision beside an fp32 aligner.
        speech_states = encoder_outputs.last_hidden_state.to(self.layer_norm.weight.dtype)

        hidden_states = self.embed_tokens(decoder_input_ids, lookup)
        past_length = cache.get_seq_length() if cache is not None else 0
        position_ids = past_length + torch.arange(hidden_states.shape[1], device=hidden_states.device)
        hidden_states = hidden_states + self.embed_positions(hidden_states, position_ids=position_ids)
        hidden_states = nn.functional.dropout(hidden_states, p=self.config.dropout, training=self.training)

        named_cache: dict[str, Any] = {CACHE: cache}
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=decoder_attention_mask,
            **named_cache,
        )
        speech_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=speech_states,
        )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                causal_mask,
                speech_states,  # in its place, not by name: reentrant checkpointing looks for gradients there only
                speech_mask,
                use_cache=use_cache,
                **named_cache,
                **kwargs,
            )
        aligned_embeds, token_logits = self.predict(hidden_states, lookup)
        return SeamAlignerOutput(
            logits=self.logits(aligned_embeds, lookup) if return_logits else None,
            aligned_embeds=aligned_embeds,
            token_logits=token_logits if return_token_logits else None,
            **named_cache,
        )
