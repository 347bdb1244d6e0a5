"""SEAM (Oh and Kim, Findings of EACL 2026): the model from speech to the losses of its three stages."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import ModelOutput, can_return_tuple, logging

from .aligner import SeamAlignerOutput
from .backbones import EmbeddingTable, StoredLLM
from .bridges import CTCHead, build_bridge, require_stage_1
from .building import EOA_COSINE_LIMIT, with_lora
from .encoder_window import encode_frames, frames_with_margin
from .generation import SeamGenerationMixin
from .llm_decoding import PromptPrefix
from .loading import SeamLoadingMixin
from .nearest import NearestToken, alignment_distance
from .prompt import last_positions, logits_at, splice
from .saving import SeamSavingMixin
from .token_table import start_ids

# isort: split
# Not used here. Before 5.12, transformers copies as remote code only those siblings that this very file imports.
from .aligner_decoding import greedy_alignment as greedy_alignment
from .fast_matmul import skinny_matmul as skinny_matmul
from .generation_io import SeamGenerateOutput as SeamGenerateOutput
from .pipeline import SeamPipeline as SeamPipeline
from .size_check import check_sizes as check_sizes
from .speculative import DraftedBatch as DraftedBatch
from .weights import weight_files as weight_files

logger = logging.get_logger(__name__)


@dataclass
class SeamOutput(ModelOutput):
    """
    Output of the training forward.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            Eq. 3 with `use_llm=False`, else Eq. 4 and Eq. 5; the CTC loss with `use_draft_head=True`.
        logits (`torch.FloatTensor` of shape `(batch, seq, vocab_size)`, *optional*):
            With `use_llm=True` the language model's, at the positions of the reply (one per label), unless
            `return_logits=False`.
        aligned_embeds (`torch.FloatTensor` of shape `(batch, tokens, d_llm)`, *optional*): what the aligner predicted.
        hidden_states, attentions (`tuple[torch.FloatTensor]`, *optional*):
            With `output_hidden_states` and `output_attentions`: the language model's, with `use_llm=False` the
            aligner's.
        cross_attentions (`tuple[torch.FloatTensor]`, *optional*):
            With `use_llm=False` and `output_attentions`: the aligner's, from tokens to speech states.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    aligned_embeds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class SeamPreTrainedModel(PreTrainedModel):
    """Hold the flags that transformers reads; the config class comes from the registry."""

    config_class = CONFIG_MAPPING["seam"]
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ["audio", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["WhisperEncoderLayer", "WhisperDecoderLayer", "Qwen3DecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True


class SeamForSpeechRecognition(SeamLoadingMixin, SeamSavingMixin, SeamGenerationMixin, SeamPreTrainedModel):
    """
    A frozen speech encoder, a trainable aligner and a frozen language model with LoRA.

    Args:
        config ([`SeamConfig`]): sizes and settings.
    """

    accepts_loss_kwargs = True  # `forward` divides by `num_items_in_batch` itself

    def __init__(self, config):
        super().__init__(config)
        text_config = config.get_text_config()
        self.encoder = WhisperEncoder(config.audio_config)
        self.bridge = build_bridge(config)  # the aligner, or a baseline in its place
        if config.alignment_only:
            self.language_model = EmbeddingTable(text_config)
        else:
            self.language_model = with_lora(AutoModelForCausalLM.from_config(text_config), config)
        # What masking puts in the place of an embedding in Stage 3, `(d_llm,)`; not used at inference.
        self.mask_embedding: nn.Parameter | None = None
        if config.learned_mask:
            self.mask_embedding = nn.Parameter(torch.zeros(text_config.hidden_size))
        self.draft_head: CTCHead | None = None  # drafts Stage 1's tokens, which the aligner verifies
        if config.draft_vocabulary is not None:
            self.draft_head = CTCHead(config.audio_config.d_model, config.draft_vocabulary)
        self.stored_llm: StoredLLM | None = None  # the LLM as its files have it, when it is here in less precision
        self.register_buffer("full_table", None, persistent=False)  # its embedding table, where that differs
        self._lookup: tuple | None = None
        self._prefix = PromptPrefix()
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        """Freeze all but the bridge, in place; what else a stage trains, its trainer switches on."""
        for part in (self.encoder, self.language_model, self.draft_head):
            if part is not None:
                part.requires_grad_(False)
        if self.mask_embedding is not None:
            self.mask_embedding.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in torch, but keep parts without trained parameters in evaluation mode: frozen is frozen."""
        super().train(mode)
        self._prefix = PromptPrefix()  # training may change weights unseen
        for part in self.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def get_input_embeddings(self) -> Any:
        """Return the language model's embedding table."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embedding table."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the speech encoder."""
        return self.encoder

    def uses_llm(self, use_llm: bool | None) -> bool:
        """Return `use_llm` as given, by default whether there is an LLM; raise `ValueError` for what is not there."""
        if use_llm is False:
            require_stage_1(self.config, "use_llm=False")
        if use_llm and self.config.alignment_only:
            raise ValueError(
                "use_llm: this checkpoint holds Stage 1 alone, of the LLM only the embedding table. Train Stage 2 on "
                "it, or put the LLM in with add_llm."
            )
        return not self.config.alignment_only if use_llm is None else use_llm

    @property
    def lookup(self) -> NearestToken:
        """Return the embedding table as Stage 1 sees it; it is rebuilt when the table's weights have changed."""
        table = self.get_input_embeddings().weight if self.full_table is None else self.full_table
        key = (table.data_ptr(), table._version, table.dtype, table.device)
        if self._lookup is None or self._lookup[0] != key:
            excluded = [i for i in self.config.lookup_excluded_ids or () if i != self.config.eoa_token_id]
            active = self.config.active_vocabulary
            if active is not None:
                active = [*active, self.config.eoa_token_id]
            self._lookup = (
                key,
                NearestToken(table, self.config.alignment_lambda, self.config.alignment_reduction, excluded, active),
            )
        return self._lookup[1]

    def warn_if_eoa_is_ambiguous(self) -> None:
        """Warn when `<EOA>` has a near twin in the table, so that Stage 1 could not tell when to stop."""
        other, cosine = self.lookup.closest_other(self.config.eoa_token_id)
        if cosine > EOA_COSINE_LIMIT:
            logger.warning(
                f"eoa_token_id {self.config.eoa_token_id} is nearly the same embedding as id {other} (cosine "
                f"{cosine:.3f}): Stage 1 may not know when to stop. Choose a special token that the LLM was trained on."
            )

    def encode(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute the speech states S (Section 3.3), cut after the longest audio of the batch.

        Args:
            input_features (`torch.FloatTensor` of shape `(batch, n_mels, frames)`): log-mel features.
            attention_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 for frames that hold audio.

        Returns:
            The states `(batch, speech, d_speech)` and the mask `(batch, speech)`, 1 for those that the bridge may
            attend to: those of the audio and of the margin after it.
        """
        features = input_features.to(self.encoder.conv1.weight.dtype)
        if attention_mask is None or not self.config.mask_speech_padding:
            states = self.encoder(features).last_hidden_state
            return states, states.new_ones(states.shape[:2], dtype=torch.long)
        frames = frames_with_margin(attention_mask.sum(-1), self.config.speech_margin, features.shape[-1])
        if self.config.encoder_window == "audio":
            return encode_frames(self.encoder, features, frames)
        states = self.encoder(features).last_hidden_state
        lengths = self.encoder._get_feat_extract_output_lengths(frames)
        longest = int(lengths.max())
        mask = (torch.arange(longest, device=states.device) < lengths[:, None]).long()
        return states[:, :longest], mask

    def speech(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        speech_states: torch.Tensor | None = None,
        speech_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the given speech states and their mask, or those of `input_features` (see `encode`)."""
        if speech_states is not None:
            if speech_mask is None:
                speech_mask = torch.ones(speech_states.shape[:2], dtype=torch.long, device=speech_states.device)
            return speech_states, speech_mask
        if input_features is None:
            raise ValueError("one of input_features and speech_states is required.")
        return self.encode(input_features, attention_mask)

    def teacher_forced(
        self,
        speech_states: torch.Tensor,
        speech_mask: torch.Tensor | None,
        token_ids: torch.Tensor,
        start: list[int] | None = None,
    ) -> torch.Tensor:
        """
        Predict the embedding of every next token from `<BOA>` and the given tokens (Eq. 1).

        Args:
            token_ids (`torch.LongTensor` of shape `(batch, tokens)`): padded on the right with any id below 0.
            start: see `token_table.start_ids`, whose default is the one of the config.

        Returns:
            `(batch, tokens + 1, d_llm)`: position t predicts token t, the last one `<EOA>`.
        """
        return self._teacher_forced(speech_states, speech_mask, token_ids, start)["aligned_embeds"]

    def _teacher_forced(self, speech_states, speech_mask, token_ids, start=None, **kwargs) -> SeamAlignerOutput:
        """Return everything that the aligner outputs for `teacher_forced`, from `<BOA>` on."""
        limit = self.config.max_alignment_tokens
        if token_ids.shape[1] > limit:
            raise ValueError(f"{token_ids.shape[1]} tokens, but the aligner has positions for {limit}.")
        start = token_ids.new_tensor(start or start_ids(self.config)).expand(len(token_ids), -1)
        output = self.bridge(
            decoder_input_ids=torch.cat([start, token_ids.clamp_min(0)], dim=1),
            encoder_outputs=BaseModelOutput(last_hidden_state=speech_states),
            attention_mask=speech_mask,
            lookup=self.lookup,
            return_logits=False,
            **kwargs,
        )
        before = start.shape[1] - 1
        if before == 0:  # what a user retains gradients of stays what it is
            return output
        for name in ("aligned_embeds", "token_logits"):
            if output.get(name) is not None:
                output[name] = output[name][:, before:]
        for name in ("hidden_states", "attentions", "cross_attentions"):
            if output.get(name) is not None:
                output[name] = tuple(None if one is None else one[..., before:, :] for one in output[name])
        return output

    @torch.no_grad()
    def embed_alignment(self, token_ids: torch.Tensor, start: list[int] | None = None, **speech) -> torch.Tensor:
        """
        Embed Stage 1's tokens as the language model receives them.

        Args:
            token_ids (`torch.LongTensor` of shape `(batch, tokens)`): padded on the right with any id below 0.
            start: see `teacher_forced`.
            speech: see `speech`; only `llm_inputs="continuous"` needs it.

        Returns:
            `torch.FloatTensor` of shape `(batch, tokens, d_llm)`.
        """
        if self.config.llm_inputs == "nearest":
            return self.get_input_embeddings()(token_ids.clamp_min(0))
        return self.teacher_forced(*self.speech(**speech), token_ids, start)[:, :-1]

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        prompt_input_ids: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        speech_states: torch.Tensor | None = None,
        speech_mask: torch.Tensor | None = None,
        aligned_embeds: torch.Tensor | None = None,
        alignment_ids: torch.Tensor | None = None,
        aligned_mask: torch.Tensor | None = None,
        masked: torch.Tensor | None = None,
        first_token_ids: torch.Tensor | None = None,
        use_llm: bool | None = None,
        use_draft_head: bool = False,
        cross_entropy_weight: float = 0.0,
        alignment_inputs: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        input_ids: torch.Tensor | None = None,
    ) -> SeamOutput:
        """
        Compute the loss of a stage under teacher forcing, or that of the draft head.

        Args:
            input_features, attention_mask: see `encode`.
            labels (`torch.LongTensor` of shape `(batch, tokens + 1)`):
                The transcript's ids and the end of the language model's turn, padded on the right with -100
                (`SeamProcessor`). In Stage 1 the last one stands for `<EOA>`.
            prompt_input_ids (`torch.LongTensor` of shape `(batch, prompt)`, *optional*):
                Prompts with one `audio_token_id` each; `config.prompt_token_ids` by default.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*): 1 for the prompt's own ids.
            speech_states, speech_mask (*optional*): what `encode` returned, instead of `input_features`.
            aligned_embeds (`torch.FloatTensor` of shape `(batch, n, d_llm)`, *optional*):
                What the language model receives. By default the aligner's teacher-forced predictions, or:
            alignment_ids (`torch.LongTensor` of shape `(batch, n)`, *optional*):
                Stage 1's tokens, padded on the right with any id below 0: the language model receives their embeddings
                (Stage 3; see `embed_alignment`).
            aligned_mask (`torch.Tensor` of shape `(batch, n)`, *optional*): 0 leaves an aligned embedding out.
            masked (`torch.Tensor` of shape `(batch, n)`, *optional*):
                1 replaces an aligned embedding by the learned mask, or by zero where there is none (Stage 3).
            first_token_ids (`torch.LongTensor` of shape `(batch,)`, *optional*):
                First Token Guidance in training: the reply's first token as it is given at inference (Eq. 6), in the
                place of the first label, which adds no loss. The summed loss is divided by the same number of labels as
                without it. A row with one label, whose transcript is empty, is left as it is.
            use_llm (`bool`, *optional*): `False` for Stage 1; by default `True` where the LLM is present.
            use_draft_head (`bool`, *optional*, defaults to `False`):
                The loss of the draft head, which needs the speech only; neither bridge nor LLM take part.
            cross_entropy_weight (`float`, *optional*, defaults to 0.0):
                In Stage 1, the weight of a cross-entropy on the table's scores, which is added to Eq. 3
                (`token_projection="table"`). A label that Stage 1 cannot return adds none.
            alignment_inputs (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                In Stage 1, the tokens that the aligner is given in the place of the labels but the last, to learn from
                mistakes of its own kind.
            num_items_in_batch (*optional*): number of labels that the summed loss is divided by; by default this
                batch's own, so that the loss is a mean over tokens.
            return_logits (`bool`, *optional*, defaults to `True`):
                With `False` the logits are not returned, nor computed where the loss does not need them: a row of them
                is a whole vocabulary.
            output_hidden_states, output_attentions (`bool`, *optional*):
                See [`SeamOutput`]; by default what the configs of the parts say.
            input_ids (*optional*): see `generate`.
        """
        if use_draft_head and self.draft_head is None:
            raise ValueError("use_draft_head: this model has no draft head; add_draft_head puts one in.")
        use_llm = not use_draft_head and self.uses_llm(use_llm)
        if labels is None:
            raise ValueError("labels are required: forward is the teacher-forced pass; use generate to transcribe.")
        self._check_llm_inputs(use_llm, aligned_embeds, alignment_ids, first_token_ids)
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        outputs: dict[str, Any] = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        outputs = {name: value for name, value in outputs.items() if value is not None}
        speech: dict[str, Any] = {
            "input_features": input_features,
            "attention_mask": attention_mask,
            "speech_states": speech_states,
            "speech_mask": speech_mask,
        }
        if use_draft_head:
            return SeamOutput(loss=self._ctc_loss(self.draft_head, labels, *self.speech(**speech)) / count)
        if not use_llm:
            outputs |= {"cross_entropy_weight": cross_entropy_weight, "alignment_inputs": alignment_inputs}
            return self._stage_1_loss(labels, count, *self.speech(**speech), **outputs)
        if alignment_ids is not None:
            aligned_embeds = self.embed_alignment(alignment_ids, **speech)
            aligned_mask = (alignment_ids >= 0).long() if aligned_mask is None else aligned_mask
        elif aligned_embeds is None:
            aligned_embeds, aligned_mask = self.aligned(*self.speech(**speech), labels)
        if masked is not None:
            mask = 0.0 if self.mask_embedding is None else self.mask_embedding.to(aligned_embeds)
            aligned_embeds = torch.where(masked[..., None].bool(), mask, aligned_embeds)
        prompts = self.prompt_rows(len(labels), prompt_input_ids, prompt_attention_mask, input_ids)
        return self._llm_loss(
            labels, count, prompts, aligned_embeds, aligned_mask, first_token_ids, return_logits, **outputs
        )

    def _check_llm_inputs(self, use_llm: bool, aligned_embeds, alignment_ids, first_token_ids) -> None:
        """Raise `ValueError` for inputs of the LLM where it takes no part, or for two of one kind."""
        given = {"aligned_embeds": aligned_embeds, "alignment_ids": alignment_ids}
        names = [name for name, value in given.items() if value is not None]
        if names and not use_llm:
            raise ValueError(f"{names[0]} are what the LLM reads; Stage 1 (use_llm=False) makes its own.")
        if len(names) > 1:
            raise ValueError("aligned_embeds and alignment_ids: give one of the two.")
        if first_token_ids is not None:
            if not use_llm:
                raise ValueError("first_token_ids guide the LLM, which takes no part here.")
            require_stage_1(self.config, "first_token_ids")

    def aligned(
        self, speech_states: torch.Tensor, speech_mask: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return what the language model receives for speech in training.

        The aligner predicts under teacher forcing; the other bridges have nothing to force.

        Returns:
            Embeddings `(batch, n, d_llm)` and their mask `(batch, n)`.
        """
        if self.config.bridge == "aligner":
            # The prediction at the last label of a row is that of <EOA>: no part of what the LLM reads.
            predictions = self.teacher_forced(speech_states, speech_mask, labels[:, :-1])[:, :-1]
            mask = labels[:, 1:] != -100
            if self.config.llm_inputs == "continuous":
                return predictions, mask
            # Padding is not looked up: every lookup takes the distances to a whole vocabulary.
            token_ids = torch.zeros_like(labels[:, 1:])
            token_ids[mask] = self.lookup.nearest(predictions[mask])
            return self.get_input_embeddings()(token_ids), mask
        if self.bridge.has_stage_1:
            token_ids, mask = self.bridge.decode(speech_states, speech_mask)
            return self.get_input_embeddings()(token_ids), mask
        return self.bridge(speech_states, speech_mask)

    def _stage_1_loss(
        self,
        labels: torch.Tensor,
        count,
        speech_states: torch.Tensor,
        speech_mask: torch.Tensor,
        cross_entropy_weight: float,
        alignment_inputs: torch.Tensor | None,
        **outputs,
    ) -> SeamOutput:
        """
        Compute the loss of Stage 1, the alignment distance of each prediction to its label's embedding (Eq. 3).

        The CTC bridge has its own.
        """
        if self.config.bridge != "aligner":
            return SeamOutput(loss=self._ctc_loss(self.bridge, labels, speech_states, speech_mask) / count)
        if cross_entropy_weight and self.config.token_projection != "table":
            raise ValueError("cross_entropy_weight: linear projections have no scores; accepted: 0.")
        is_label = labels != -100
        inputs = labels[:, :-1] if alignment_inputs is None else alignment_inputs
        predicted = self._teacher_forced(
            speech_states, speech_mask, inputs, return_token_logits=cross_entropy_weight > 0, **outputs
        )
        target_ids = labels.masked_fill(_is_last(is_label), self.config.eoa_token_id)
        targets = self.lookup.embed(target_ids.clamp_min(0))
        distances = alignment_distance(
            predicted["aligned_embeds"], targets, self.config.alignment_lambda, self.config.alignment_reduction
        )
        loss = (distances * is_label).sum()
        if cross_entropy_weight:
            logits: Any = predicted.token_logits
            classes = self.lookup.index_of(target_ids)[is_label]
            entropy = nn.functional.cross_entropy(logits[is_label].float(), classes, ignore_index=-1, reduction="sum")
            loss = loss + cross_entropy_weight * entropy
        return SeamOutput(
            loss=loss / count,
            aligned_embeds=predicted.aligned_embeds,
            hidden_states=predicted.hidden_states,
            attentions=predicted.attentions,
            cross_attentions=predicted.cross_attentions,
        )

    def _ctc_loss(
        self, head: Any, labels: torch.Tensor, speech_states: torch.Tensor, speech_mask: torch.Tensor
    ) -> torch.Tensor:
        """Sum the CTC loss of a draft head or CTC bridge over the transcripts, without their end: CTC needs none."""
        return head.loss(speech_states, speech_mask, labels.masked_fill(_is_last(labels != -100), -100))

    def _llm_loss(
        self,
        labels: torch.Tensor,
        count,
        prompts: list[torch.Tensor],
        aligned_embeds: torch.Tensor,
        aligned_mask: torch.Tensor | None,
        first_token_ids: torch.Tensor | None,
        return_logits: bool,
        **outputs,
    ) -> SeamOutput:
        """Compute the LLM's cross-entropy on the assistant's reply only (Eq. 4, Eq. 5), from y_2 on if y_1 is given."""
        is_label = labels != -100
        if aligned_mask is None:
            aligned_mask = aligned_embeds.new_ones(aligned_embeds.shape[:2])
        aligned = [row[keep.bool()] for row, keep in zip(aligned_embeds, aligned_mask, strict=True)]
        reply_ids = targets = labels
        if first_token_ids is not None:
            is_given = torch.zeros_like(is_label)
            is_given[:, 0] = is_label[:, 1:].any(-1)
            reply_ids = torch.where(is_given, first_token_ids[:, None], labels)
            targets = labels.masked_fill(is_given, -100)
        # The label at i is predicted from the reply up to i - 1; the first from the prompt's own last position.
        replies = [row[keep][:-1] for row, keep in zip(reply_ids, is_label, strict=True)]
        embeds, mask = splice(self.get_input_embeddings(), prompts, self.config.audio_token_id, aligned, replies)
        targets = _right_aligned(targets, is_label)
        is_target = targets != -100
        with nullcontext() if return_logits else logits_at(self.language_model, is_target):
            reply = self.language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
                use_cache=False,
                logits_to_keep=last_positions(targets.shape[1], embeds.device),
                **outputs,
            )
        logits = reply.logits.float()
        targets = targets if return_logits else targets[is_target]
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum")
        return SeamOutput(
            loss=loss / count,
            logits=logits if return_logits else None,
            aligned_embeds=aligned_embeds,
            hidden_states=reply.get("hidden_states"),  # not every language model has them
            attentions=reply.get("attentions"),
        )

    def prompt_rows(
        self,
        batch_size: int,
        prompt_input_ids: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        input_ids: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Return each row's prompt ids without padding: the given ones, or the default prompt of the config."""
        if prompt_input_ids is None and input_ids is not None and input_ids.shape[1]:
            prompt_input_ids = input_ids  # the name that prompts had
        if prompt_input_ids is None:
            if self.config.prompt_token_ids is None:
                raise ValueError(
                    "no prompt: give prompt_input_ids, or set config.prompt_token_ids (SeamProcessor.prompt_ids)."
                )
            default = torch.tensor(self.config.prompt_token_ids, device=self.device)
            return [default] * batch_size
        given = len(prompt_input_ids)
        if given not in (1, batch_size):
            raise ValueError(f"{given} prompts for {batch_size} utterances; give one for all or one for each.")
        if prompt_attention_mask is None:
            prompt_attention_mask = torch.ones_like(prompt_input_ids)
        prompt_input_ids = prompt_input_ids.expand(batch_size, -1)
        prompt_attention_mask = prompt_attention_mask.expand(batch_size, -1)
        return [row[keep.bool()] for row, keep in zip(prompt_input_ids, prompt_attention_mask, strict=True)]


def _is_last(is_label: torch.Tensor) -> torch.Tensor:
    """Mark the last label of every row, where transcripts end: `(batch, tokens + 1)`, as `is_label`."""
    return is_label & ~nn.functional.pad(is_label[:, 1:], (0, 1))


def _right_aligned(labels: torch.Tensor, is_label: torch.Tensor) -> torch.Tensor:
    """Move labels to the right end, where the replies of a left-padded batch end; the rest is -100."""
    longest = int(is_label.sum(-1).max())
    moved = torch.full_like(labels[:, :longest], -100)
    for row, (label, keep) in enumerate(zip(labels, is_label, strict=True)):
        moved[row, longest - int(keep.sum()) :] = label[keep]
    return moved
