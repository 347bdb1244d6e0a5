"""SEAM (Oh and Kim, Findings of EACL 2026): composition, training forward and loading."""

from contextlib import nullcontext
from dataclasses import dataclass

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
from .aligner_decoding import (
    AlignerSteps,  # noqa: F401  remote code is what this file imports: older versions copy no more
    greedy_alignment,  # noqa: F401  as above
)
from .backbones import EmbeddingTable, FullLLM
from .bridges import CTCHead, build_bridge
from .checkpoint import SeamCheckpointMixin, with_lora
from .fast_matmul import (
    Bf16Table,  # noqa: F401  as above
    few_rows_product,  # noqa: F401  as above
)
from .generation import SeamGenerationMixin
from .llm_decoding import (
    PromptPrefix,
    write,  # noqa: F401  as above
)
from .nearest import NearestToken, alignment_distance
from .pipeline import SeamPipeline  # noqa: F401  as above
from .prompt import last_positions, logits_at, splice
from .speculative import (
    DraftedBatch,  # noqa: F401  as above
    is_plain_greedy,  # noqa: F401  as above
)
from .weights import weight_files  # noqa: F401  as above

logger = logging.get_logger(__name__)

# Above this cosine, EOA and another returnable token can hardly be told apart by the lookup.
EOA_COSINE_LIMIT = 0.98


@dataclass
class SeamOutput(ModelOutput):
    """
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

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    aligned_embeds: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


class SeamPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the flags that transformers reads; the config class comes from the registry."""

    config_class = CONFIG_MAPPING["seam"]
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["WhisperEncoderLayer", "WhisperDecoderLayer", "Qwen3DecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True


class SeamForSpeechRecognition(SeamCheckpointMixin, SeamGenerationMixin, SeamPreTrainedModel):
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
        self.mask_embedding = None  # what masking writes in Stage 3, `(d_llm,)`; nothing reads it at inference
        if config.learned_mask:
            self.mask_embedding = nn.Parameter(torch.zeros(text_config.hidden_size), requires_grad=False)
        self.draft_head = None  # writes a draft for Stage 1; the aligner has the last word
        if config.draft_vocabulary is not None:
            self.draft_head = CTCHead(config.audio_config.d_model, config.draft_vocabulary).requires_grad_(False)
        self.full_llm: FullLLM | None = None  # where the LLM lies in full, when it is held in less precision
        self.register_buffer("full_table", None, persistent=False)  # its embedding table, where that differs
        self._lookup: tuple | None = None
        self._prefix = PromptPrefix()
        self.post_init()
        # The backbones are frozen throughout; what a stage trains, its trainer switches on.
        self.encoder.requires_grad_(False)
        self.language_model.requires_grad_(False)

    def train(self, mode: bool = True) -> "SeamForSpeechRecognition":
        """As in torch, except that a part without trained parameters stays in evaluation mode: frozen is frozen."""
        super().train(mode)
        self._prefix = PromptPrefix()  # training may change weights unseen
        for part in self.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def uses_llm(self, use_llm: bool | None) -> bool:
        """`use_llm` as given; by default whether there is an LLM. Raises `ValueError` where there is none to use."""
        if use_llm is False and not self.bridge.writes_tokens:
            raise ValueError(f"use_llm: the bridge {self.config.bridge!r} writes no tokens: it has no Stage 1.")
        if use_llm and self.config.alignment_only:
            raise ValueError(
                "use_llm: this checkpoint holds Stage 1 alone, of the LLM only the embedding table. Train Stage 2 on "
                "it, or put the LLM in with add_llm."
            )
        return not self.config.alignment_only if use_llm is None else use_llm

    @property
    def lookup(self) -> NearestToken:
        """The embedding table as Stage 1 sees it; rebuilt when the table's weights have changed."""
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

    def warn_if_eoa_is_ambiguous(self):
        """Warn when `<EOA>` has a near twin in the table, so that Stage 1 could not tell when to stop."""
        other, cosine = self.lookup.closest_other(self.config.eoa_token_id)
        if cosine > EOA_COSINE_LIMIT:
            logger.warning(
                f"eoa_token_id {self.config.eoa_token_id} is nearly the same embedding as id {other} (cosine "
                f"{cosine:.3f}): Stage 1 may not know when to stop. Choose a special token that the LLM was trained on."
            )

    def encode(
        self, input_features: torch.FloatTensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.FloatTensor, torch.LongTensor]:
        """
        Speech states S (Section 3.3), cut after the longest audio of the batch.

        Args:
            input_features (`torch.FloatTensor` of shape `(batch, n_mels, frames)`): log-mel features.
            attention_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 for frames that hold audio.

        Returns:
            The states `(batch, speech, d_speech)` and the mask `(batch, speech)` that is 1 for those that the aligner
            may attend to.
        """
        states = self.encoder(input_features.to(self.encoder.conv1.weight.dtype)).last_hidden_state
        if attention_mask is None or not self.config.mask_speech_padding:
            return states, states.new_ones(states.shape[:2], dtype=torch.long)
        lengths = self.encoder._get_feat_extract_output_lengths(attention_mask.sum(-1))
        longest = int(lengths.max())
        mask = (torch.arange(longest, device=states.device) < lengths[:, None]).long()
        return states[:, :longest], mask

    def speech(
        self,
        input_features: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        speech_states: torch.FloatTensor | None = None,
        speech_mask: torch.Tensor | None = None,
    ) -> tuple[torch.FloatTensor, torch.LongTensor]:
        """Speech states and their mask: the given ones, or those of `input_features` (see `encode`)."""
        if speech_states is not None:
            if speech_mask is None:
                speech_mask = torch.ones(speech_states.shape[:2], dtype=torch.long, device=speech_states.device)
            return speech_states, speech_mask
        if input_features is None:
            raise ValueError("one of input_features and speech_states is required.")
        return self.encode(input_features, attention_mask)

    def teacher_forced(
        self, speech_states: torch.FloatTensor, speech_mask: torch.Tensor | None, token_ids: torch.LongTensor
    ) -> torch.FloatTensor:
        """
        Eq. 1: the aligner's predictions when fed `<BOA>` and the given tokens.

        Args:
            token_ids (`torch.LongTensor` of shape `(batch, tokens)`): padded on the right with any id below 0.

        Returns:
            `(batch, tokens + 1, d_llm)`: position t predicts token t, the last one `<EOA>`.
        """
        return self._teacher_forced(speech_states, speech_mask, token_ids).aligned_embeds

    def _teacher_forced(self, speech_states, speech_mask, token_ids, **kwargs) -> SeamAlignerOutput:
        """`teacher_forced` with everything that the aligner gives out."""
        positions = self.config.aligner_config.max_target_positions
        if token_ids.shape[1] >= positions:
            raise ValueError(f"{token_ids.shape[1]} tokens, but the aligner has positions for {positions - 1}.")
        start = token_ids.new_full((len(token_ids), 1), self.config.boa_token_id)
        inputs = torch.cat([start, token_ids.clamp_min(0)], dim=1)
        return self.bridge(
            inputs_embeds=self.lookup.embed(inputs),
            encoder_outputs=BaseModelOutput(last_hidden_state=speech_states),
            attention_mask=speech_mask,
            **kwargs,
        )

    @torch.no_grad()
    def embed_alignment(self, token_ids: torch.LongTensor, **speech) -> torch.FloatTensor:
        """
        What the language model is given for tokens that Stage 1 wrote.

        Args:
            token_ids (`torch.LongTensor` of shape `(batch, tokens)`): padded on the right with any id below 0.
            speech: see `speech`; only `llm_inputs="continuous"` needs it.

        Returns:
            `torch.FloatTensor` of shape `(batch, tokens, d_llm)`.
        """
        if self.config.llm_inputs == "nearest":
            return self.get_input_embeddings()(token_ids.clamp_min(0))
        return self.teacher_forced(*self.speech(**speech), token_ids)[:, :-1]

    @can_return_tuple
    def forward(
        self,
        input_features: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        speech_states: torch.FloatTensor | None = None,
        speech_mask: torch.Tensor | None = None,
        aligned_embeds: torch.FloatTensor | None = None,
        alignment_ids: torch.LongTensor | None = None,
        aligned_mask: torch.Tensor | None = None,
        masked: torch.Tensor | None = None,
        first_token_ids: torch.LongTensor | None = None,
        use_llm: bool | None = None,
        use_draft_head: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SeamOutput:
        """
        The teacher-forced pass of the three stages, and the pass in which the draft head learns.

        Args:
            input_features, attention_mask: see `encode`.
            labels (`torch.LongTensor` of shape `(batch, tokens + 1)`):
                The transcript's ids and the end of the language model's turn, padded on the right with -100
                (`SeamProcessor`). In Stage 1 the last one stands for `<EOA>`.
            input_ids (`torch.LongTensor` of shape `(batch, prompt)`, *optional*):
                Prompts with one `audio_token_id` each; `config.prompt_token_ids` by default.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*): 1 for the prompt's own ids.
            speech_states, speech_mask (*optional*): what `encode` returned, instead of `input_features`.
            aligned_embeds (`torch.FloatTensor` of shape `(batch, n, d_llm)`, *optional*):
                What the language model receives. By default the aligner's teacher-forced predictions, or:
            alignment_ids (`torch.LongTensor` of shape `(batch, n)`, *optional*):
                Tokens that Stage 1 wrote, padded on the right with any id below 0: the language model receives their
                embeddings (Stage 3; see `embed_alignment`).
            aligned_mask (`torch.Tensor` of shape `(batch, n)`, *optional*): 0 leaves an aligned embedding out.
            masked (`torch.Tensor` of shape `(batch, n)`, *optional*):
                1 writes the learned mask over an aligned embedding, or zero where there is none (Stage 3).
            first_token_ids (`torch.LongTensor` of shape `(batch,)`, *optional*):
                First Token Guidance in training: the reply's first token as it is given at inference (Eq. 6), in the
                place of the first label, which adds no loss. The summed loss is divided by the same number of labels as
                without it. A row with one label, whose transcript is empty, is left as it is.
            use_llm (`bool`, *optional*): `False` for Stage 1; by default `True` where the LLM is present.
            use_draft_head (`bool`, *optional*, defaults to `False`):
                The loss of the draft head, which reads the speech only; then neither aligner nor LLM take part.
            num_items_in_batch (*optional*): number of labels that the summed loss is divided by; by default this
                batch's own, so that the loss is a mean over tokens.
            return_logits (`bool`, *optional*, defaults to `True`):
                With `False` the logits are not returned, nor computed where the loss does not need them: a row of them
                is a whole vocabulary.
            output_hidden_states, output_attentions (`bool`, *optional*):
                See [`SeamOutput`]; by default what the configs of the parts say.
        """
        if use_draft_head and self.draft_head is None:
            raise ValueError("use_draft_head: this model has no draft head; add_draft_head puts one in.")
        use_llm = not use_draft_head and self.uses_llm(use_llm)
        if labels is None:
            raise ValueError("labels are required: forward is the teacher-forced pass; use generate to transcribe.")
        given = [
            name
            for name, value in (("aligned_embeds", aligned_embeds), ("alignment_ids", alignment_ids))
            if value is not None
        ]
        if given and not use_llm:
            raise ValueError(f"{given[0]} are what the LLM reads; Stage 1 (use_llm=False) makes its own.")
        if len(given) > 1:
            raise ValueError("aligned_embeds and alignment_ids: give one of the two.")
        if first_token_ids is not None and not (use_llm and self.bridge.writes_tokens):
            raise ValueError("first_token_ids: a token of Stage 1 that guides the LLM; here is no Stage 1, or no LLM.")
        is_label = labels != -100
        count = is_label.sum() if num_items_in_batch is None else num_items_in_batch
        wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        speech = None
        if alignment_ids is not None:
            aligned_embeds = self.embed_alignment(
                alignment_ids,
                input_features=input_features,
                attention_mask=attention_mask,
                speech_states=speech_states,
                speech_mask=speech_mask,
            )
            aligned_mask = (alignment_ids >= 0).long() if aligned_mask is None else aligned_mask
        elif aligned_embeds is None:
            speech = self.speech(input_features, attention_mask, speech_states, speech_mask)
        if use_draft_head:
            return SeamOutput(loss=self._ctc_loss(self.draft_head, labels, is_label, *speech) / count)
        if not use_llm:
            return self._stage_1_loss(labels, is_label, count, *speech, **wanted)
        if speech is not None:
            aligned_embeds, aligned_mask = self.aligned(*speech, labels)
        if masked is not None:
            mask = 0.0 if self.mask_embedding is None else self.mask_embedding.to(aligned_embeds)
            aligned_embeds = torch.where(masked[..., None].bool(), mask, aligned_embeds)
        prompt = (input_ids, prompt_attention_mask)
        return self._reply_loss(
            labels, is_label, count, *prompt, aligned_embeds, aligned_mask, first_token_ids, return_logits, **wanted
        )

    def aligned(
        self, speech_states: torch.FloatTensor, speech_mask: torch.Tensor, labels: torch.LongTensor
    ) -> tuple[torch.FloatTensor, torch.Tensor]:
        """
        What the language model is given for speech in training: embeddings `(batch, n, d_llm)` and their mask
        `(batch, n)`. The aligner's are predicted under teacher forcing; its rivals have nothing to force.
        """
        if self.config.bridge == "aligner":
            # The prediction at the last label of a row is that of <EOA>: no part of what the LLM reads.
            predictions = self.teacher_forced(speech_states, speech_mask, labels[:, :-1])[:, :-1]
            mask = labels[:, 1:] != -100
            if self.config.llm_inputs == "continuous":
                return predictions, mask
            # What is left out is not looked up either: each takes its distances to a whole vocabulary.
            token_ids = torch.zeros_like(labels[:, 1:])
            token_ids[mask] = self.lookup.nearest(predictions[mask])
            return self.get_input_embeddings()(token_ids), mask
        if self.bridge.writes_tokens:
            token_ids, mask = self.bridge.decode(speech_states, speech_mask)
            return self.get_input_embeddings()(token_ids), mask
        return self.bridge(speech_states, speech_mask)

    def _stage_1_loss(self, labels, is_label, count, speech_states, speech_mask, **kwargs) -> SeamOutput:
        """Eq. 3, of the aligner; a rival's own loss."""
        if self.config.bridge != "aligner":
            return SeamOutput(loss=self._ctc_loss(self.bridge, labels, is_label, speech_states, speech_mask) / count)
        aligner = self._teacher_forced(speech_states, speech_mask, labels[:, :-1], **kwargs)
        ends = _last(is_label)
        targets = self.lookup.embed(labels.masked_fill(ends, self.config.eoa_token_id).clamp_min(0))
        distances = alignment_distance(
            aligner.aligned_embeds, targets, self.config.alignment_lambda, self.config.alignment_reduction
        )
        return SeamOutput(
            loss=(distances * is_label).sum() / count,
            aligned_embeds=aligner.aligned_embeds,
            hidden_states=aligner.hidden_states,
            attentions=aligner.attentions,
            cross_attentions=aligner.cross_attentions,
        )

    def _ctc_loss(self, head: CTCHead, labels, is_label, speech_states, speech_mask) -> torch.FloatTensor:
        """Of the transcripts without the end, which CTC has no need of; summed."""
        return head.loss(speech_states, speech_mask, labels.masked_fill(_last(is_label), -100))

    def _reply_loss(
        self,
        labels,
        is_label,
        count,
        input_ids,
        prompt_attention_mask,
        aligned_embeds,
        aligned_mask,
        first_token_ids,
        return_logits,
        **kwargs,
    ) -> SeamOutput:
        """Cross-entropy on the assistant's reply only (Eq. 4, Eq. 5), with a first token that is given from y_2 on."""
        prompts = self.prompt_rows(len(labels), input_ids, prompt_attention_mask)
        if aligned_mask is None:
            aligned_mask = aligned_embeds.new_ones(aligned_embeds.shape[:2])
        aligned = [row[keep.bool()] for row, keep in zip(aligned_embeds, aligned_mask, strict=True)]
        read = learned = labels
        if first_token_ids is not None:
            is_given = torch.zeros_like(is_label)
            is_given[:, 0] = is_label[:, 1:].any(-1)
            read = torch.where(is_given, first_token_ids[:, None], labels)
            learned = labels.masked_fill(is_given, -100)
        # The label at i is predicted from the reply up to i - 1; the first from the prompt's own last position.
        replies = [row[keep][:-1] for row, keep in zip(read, is_label, strict=True)]
        embeds, mask = splice(self.get_input_embeddings(), prompts, self.config.audio_token_id, aligned, replies)
        longest = int(is_label.sum(-1).max())
        # Rows are left-padded, so their replies end together: bring the labels to the same side.
        targets = torch.full_like(labels[:, :longest], -100)
        for row, (label, keep) in enumerate(zip(learned, is_label, strict=True)):
            targets[row, longest - int(keep.sum()) :] = label[keep]
        is_target = targets != -100
        with nullcontext() if return_logits else logits_at(self.language_model, is_target):
            reply = self.language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
                use_cache=False,
                logits_to_keep=last_positions(longest, embeds.device),
                **kwargs,
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
        self, batch_size: int, input_ids: torch.LongTensor | None, prompt_attention_mask: torch.Tensor | None
    ) -> list[torch.LongTensor]:
        """Each row's prompt ids without padding: the given ones, or the default prompt of the config."""
        if input_ids is None:
            if self.config.prompt_token_ids is None:
                raise ValueError(
                    "no prompt: give input_ids, or set config.prompt_token_ids (SeamProcessor.prompt_ids)."
                )
            default = torch.tensor(self.config.prompt_token_ids, device=self.device)
            return [default] * batch_size
        if len(input_ids) not in (1, batch_size):
            raise ValueError(f"{len(input_ids)} prompts for {batch_size} utterances; give one for all or one for each.")
        if prompt_attention_mask is None:
            prompt_attention_mask = torch.ones_like(input_ids)
        input_ids = input_ids.expand(batch_size, -1)
        prompt_attention_mask = prompt_attention_mask.expand(batch_size, -1)
        return [row[keep.bool()] for row, keep in zip(input_ids, prompt_attention_mask, strict=True)]


def _last(is_label: torch.Tensor) -> torch.Tensor:
    """The last label of every row, where transcripts end: `(batch, tokens + 1)`, as `is_label`."""
    return is_label & ~nn.functional.pad(is_label[:, 1:], (0, 1))
