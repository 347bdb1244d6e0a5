"""The alignment decoder (Section 3.4): a Whisper decoder driven by projected LLM embeddings (Eq. 2)."""

import inspect
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
    """

    aligned_embeds: torch.Tensor | None = None


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
        self.embed_positions = WhisperPositionalEmbedding(config.max_target_positions, config.d_model)
        self.layers = nn.ModuleList([WhisperDecoderLayer(config, index) for index in range(config.decoder_layers)])
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.output_projection = nn.Linear(config.d_model, llm_dim, bias=False)  # W_out
        self.gradient_checkpointing = False
        self.post_init()
        # Not the one that transformers derives from a Whisper config, which forbids Whisper's own token ids.
        self.generation_config = GenerationConfig()

    @capture_outputs
    def forward(
        self,
        decoder_input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        attention_mask: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        lookup: NearestToken | None = None,
        **kwargs: Any,
    ) -> SeamAlignerOutput:
        """
        Predict the embedding after each token (Eq. 2).

        Args:
            decoder_input_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): tokens so far; needs `lookup`.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, seq, d_llm)`, *optional*): their embeddings instead.
            encoder_outputs (`BaseModelOutput`): speech states `(batch, speech, d_model)` as `last_hidden_state`.
            attention_mask (`torch.Tensor` of shape `(batch, speech)`, *optional*): 1 for states that hold audio.
            decoder_attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): 1 for real tokens.
            past_key_values, cache (`EncoderDecoderCache`, *optional*): keys and values so far, by the one name or the
                other.
            lookup (`NearestToken`, *optional*): when given, `logits` are computed.
        """
        if inputs_embeds is None:
            if lookup is None or decoder_input_ids is None:
                raise ValueError("inputs_embeds, or decoder_input_ids and lookup, are required.")
            inputs_embeds = lookup.embed(decoder_input_ids)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        # The encoder and the language model may be kept in half precision beside an fp32 aligner.
        dtype = self.input_projection.weight.dtype
        speech_states = encoder_outputs.last_hidden_state.to(dtype)

        hidden_states = self.input_projection(inputs_embeds.to(dtype))
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
        aligned_embeds = self.output_projection(self.layer_norm(hidden_states))
        return SeamAlignerOutput(
            logits=-lookup.distances(aligned_embeds) if lookup is not None else None,
            aligned_embeds=aligned_embeds,
            **named_cache,
        )
