"""Two-level autoregression: Algorithm 1 (Stage 1), Algorithm 2 (the full model) and First Token Guidance (Eq. 6)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput

from .aligner_decoding import can_run, greedy_alignment, verified_alignment
from .bridges import CTCHead
from .generation_io import (
    ALIGNMENT_COUNTS,
    LLM_COUNTS,
    REPORTS,
    AlignmentOutput,
    SeamGenerateOutput,
    check_arguments,
    put_into,
    without_whispers,
)
from .llm_decoding import PromptPrefix, can_verify, is_sliding, verified_greedy
from .nearest import NearestToken, alignment_distance
from .prompt import splice
from .speculative import Row
from .token_table import start_ids


class TranscriptStreamer:
    """
    Pass a transcript on to a streamer of `GenerationMixin.generate`.

    The loop puts its prompt first, which a streamer may be set to skip. Here that is the guiding token, which belongs
    to the transcript, or Stage 1's `<BOA>`, which does not.

    Args:
        streamer (`BaseStreamer`): the user's.
        guide (`torch.LongTensor` of shape `(batch, 0 or 1)`): the first token, when it is given to the loop.
    """

    def __init__(self, streamer: BaseStreamer, guide: torch.Tensor):
        streamer.put(guide.new_empty(len(guide), 0).cpu())  # an empty prompt
        if guide.numel():
            streamer.put(guide.flatten().cpu())
        self.streamer, self.prompt_is_past = streamer, False

    def put(self, value: torch.Tensor) -> None:
        """Pass tokens on, unless they are the loop's prompt."""
        if self.prompt_is_past:
            self.streamer.put(value)
        self.prompt_is_past = True

    def end(self) -> None:
        """End the user's streamer."""
        self.streamer.end()


@dataclass
class LLMInputs:
    """
    What the language model receives, of the rows of a batch in which Stage 1 found something.

    Args:
        batch_size: of the whole batch.
        rows: their indices in it.
        prompts: per row `(prompt,)` ids.
        aligned: per row `(tokens, d_llm)`.
        guides: the first tokens `(rows, 1)`, or none `(rows, 0)`.
        drafts: per row Stage 1's tokens; `None` for a bridge without a Stage 1.
    """

    batch_size: int
    rows: list[int]
    prompts: list[torch.Tensor]
    aligned: list[torch.Tensor]
    guides: torch.Tensor
    drafts: list[list[int]] | None

    def spread(self, values: Any, fill: float) -> Any:
        """Spread what a loop returned, a tensor `(rows * copies, ...)` or several, over the whole batch."""
        if values is None:
            return None
        if isinstance(values, tuple):
            return tuple(self.spread(step, fill) for step in values)
        copies = len(values) // max(len(self.rows), 1)
        spread = values.new_full((self.batch_size, copies, *values.shape[1:]), fill)
        spread[self.rows] = values.view(len(self.rows), copies, *values.shape[1:])
        return spread.flatten(0, 1)


class SeamGenerationMixin(GenerationMixin):
    """`align` and `generate` of [`SeamForSpeechRecognition`]."""

    if TYPE_CHECKING:  # what that class has
        config: Any
        bridge: Any
        language_model: Any
        draft_head: CTCHead | None
        training: bool
        _prefix: PromptPrefix
        uses_llm: Callable[[bool | None], bool]
        speech: Callable[..., tuple[torch.Tensor, torch.Tensor]]
        teacher_forced: Callable[..., torch.Tensor]
        embed_alignment: Callable[..., torch.Tensor]
        prompt_rows: Callable[..., list[torch.Tensor]]
        get_input_embeddings: Callable[[], torch.nn.Module]

        @property
        def lookup(self) -> NearestToken:
            """See [`SeamForSpeechRecognition`]."""

    # ---- Stage 1 ----

    @torch.no_grad()
    def align(
        self,
        speech_states: torch.Tensor,
        speech_mask: torch.Tensor | None = None,
        return_distances: bool = False,
        verify: bool = True,
        generation_config: GenerationConfig | None = None,
        language: str | None = None,
        task: str | None = None,
        **kwargs,
    ) -> AlignmentOutput:
        """
        Decode Stage 1 (Algorithm 1): feed back the nearest token of each predicted embedding, until `<EOA>`.

        Greedy search has a loop of its own, which verifies the draft head's tokens where there is one; the result is
        the same. Any other search is the loop of `GenerationMixin` on the aligner, whose logits are minus the
        distances. A CTC bridge has its most probable path, which takes no arguments and has no distances.

        Args:
            speech_states, speech_mask: what `encode` returned.
            return_distances: also return distances and predicted embeddings. Where the loop does not keep them, one
                parallel pass over the tokens computes them.
            verify: use the draft head.
            language, task: what Whisper's prompt says before `<BOA>` (see `token_table.start_ids`).
            generation_config, kwargs: of `GenerationMixin.generate`; greedy search by default.
        """
        kwargs = without_whispers(kwargs)
        check_arguments(generation_config, kwargs, from_embeddings=False)
        start = start_ids(self.config, language, task)
        if self.config.bridge != "aligner":
            sequences, mask = self.bridge.decode(speech_states, speech_mask)
            return AlignmentOutput(sequences=sequences, mask=mask)
        generation_config, kwargs = self._alignment_settings(generation_config, start, kwargs)
        embeds: torch.Tensor | None
        reports: Any
        if not can_run(self.bridge, generation_config, kwargs):
            sequences, reports = self._align_by_stock_loop(speech_states, speech_mask, start, generation_config, kwargs)
            embeds = None
        elif verify and self.draft_head is not None:
            sequences, embeds, reports = self._align_by_draft(
                self.draft_head, speech_states, speech_mask, start, generation_config.max_new_tokens
            )
        else:
            sequences, embeds = greedy_alignment(
                self.bridge,
                self.lookup,
                speech_states,
                speech_mask,
                start,
                self.config.eoa_token_id,
                generation_config.max_new_tokens,
            )
            reports = {}
        has_ended = (sequences == self.config.eoa_token_id).cumsum(-1) > 0
        longest = int((~has_ended).sum(-1).max())
        sequences, mask = sequences[:, :longest], (~has_ended[:, :longest]).long()
        if embeds is not None:
            embeds = embeds[:, :longest]
        elif return_distances:
            copies = len(sequences) // len(speech_states)  # num_return_sequences
            speech_states = speech_states.repeat_interleave(copies, dim=0)
            speech_mask = speech_mask.repeat_interleave(copies, dim=0) if speech_mask is not None else None
            embeds = self.teacher_forced(speech_states, speech_mask, sequences, start)[:, :-1]
        return AlignmentOutput(
            sequences=sequences,
            mask=mask,
            aligned_embeds=None if embeds is None else embeds.masked_fill((mask == 0)[..., None], 0),
            distances=self._distances(embeds, sequences, mask) if return_distances else None,
            **{name: reports.get(name) for name in (*REPORTS, *ALIGNMENT_COUNTS)},
        )

    def _alignment_settings(
        self, generation_config: GenerationConfig | None, start: list[int], kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Return the config of Stage 1's loop, and the arguments that are none of its fields."""
        limit = self.config.max_alignment_tokens
        generation_config = copy.deepcopy(generation_config or GenerationConfig())
        generation_config.return_dict_in_generate = True
        kwargs = put_into(generation_config, kwargs)
        generation_config.decoder_start_token_id = start[0]
        generation_config.eos_token_id = generation_config.pad_token_id = self.config.eoa_token_id
        generation_config.max_new_tokens = generation_config.max_new_tokens or limit
        if generation_config.max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens is {generation_config.max_new_tokens}, but the aligner has positions for {limit}."
            )
        return generation_config, kwargs

    def _align_by_draft(
        self,
        draft_head: CTCHead,
        speech_states: torch.Tensor,
        speech_mask: torch.Tensor | None,
        start: list[int],
        max_new_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Verify the draft head's tokens: return sequences with `<EOA>`, predicted embeddings and the counts."""
        draft_ids, mask = draft_head.decode(speech_states, speech_mask)
        rows, predicted = verified_alignment(
            self.bridge,
            self.lookup,
            speech_states,
            speech_mask,
            start,
            self.config.eoa_token_id,
            max_new_tokens,
            drafts=[row[keep].tolist() for row, keep in zip(draft_ids, mask.bool(), strict=True)],
        )
        sequences = _padded(rows, self.config.eoa_token_id, speech_states.device)
        counts = dict(zip(ALIGNMENT_COUNTS, _counts(rows, speech_states.device), strict=True))
        return sequences, pad_sequence(predicted, batch_first=True), counts

    def _align_by_stock_loop(
        self,
        speech_states: torch.Tensor,
        speech_mask: torch.Tensor | None,
        start: list[int],
        generation_config: GenerationConfig,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Run `GenerationMixin.generate` on the aligner: return sequences with `<EOA>`, and what it reports."""
        if kwargs.get("streamer") is not None:
            no_guide = torch.empty(len(speech_states), 0, dtype=torch.long)
            kwargs["streamer"] = TranscriptStreamer(kwargs["streamer"], no_guide)
        # Older versions of transformers look there for the size of the logits. It is Whisper's.
        config, vocab_size = self.bridge.config, len(self.lookup.table)
        before, config.vocab_size = config.vocab_size, vocab_size + len(self.config.aligner_prompt_tokens or ())
        try:
            output = self.bridge.generate(
                decoder_input_ids=torch.tensor(start, device=speech_states.device).repeat(len(speech_states), 1),
                encoder_outputs=BaseModelOutput(last_hidden_state=speech_states),
                attention_mask=speech_mask,
                lookup=self.lookup,
                generation_config=generation_config,
                **kwargs,
            )
        finally:
            config.vocab_size = before
        reports = {**output, **{name: output.get(f"decoder_{name}") for name in ("hidden_states", "attentions")}}
        for name in ("scores", "logits"):
            if reports.get(name) is not None:  # without Whisper's prompt, which is no part of the vocabulary
                reports[name] = tuple(step[:, :vocab_size] for step in reports[name])
        return output.sequences[:, len(start) :], reports

    def _distances(self, predicted: Any, sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute Eq. 7 between predicted embeddings and chosen tokens, `(batch, tokens)`; 0 for padding."""
        return alignment_distance(
            predicted, self.lookup.embed(sequences), self.config.alignment_lambda, self.config.alignment_reduction
        ).masked_fill_(mask == 0, 0)

    # ---- the full model ----

    @torch.no_grad()
    def generate(  # type: ignore[override]  # of speech, not of token ids
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_input_ids: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        speech_states: torch.Tensor | None = None,
        speech_mask: torch.Tensor | None = None,
        first_token_guidance: bool = True,
        use_llm: bool | None = None,
        return_dict_in_generate: bool | None = None,
        verify: bool = True,
        generation_config: GenerationConfig | None = None,
        labels: torch.Tensor | None = None,
        language: str | None = None,
        task: str | None = None,
        input_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | SeamGenerateOutput:
        """
        Transcribe (Algorithm 2).

        Args:
            input_features (`torch.FloatTensor` of shape `(batch, n_mels, frames)`): log-mel features.
            attention_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 for frames that hold audio.
            prompt_input_ids (`torch.LongTensor` of shape `(batch, prompt)`, *optional*):
                Prompts with one `audio_token_id` each (`SeamProcessor.apply_transcription_request`); by default the
                one in the config.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*): 1 for the prompt's own ids.
            speech_states, speech_mask (*optional*): what `encode` returned, instead of `input_features`.
            first_token_guidance (`bool`, *optional*, defaults to `True`): Eq. 6.
            use_llm (`bool`, *optional*): `False` gives Stage 1's tokens ("SEAM w/o LLM"); by default `True` where the
                LLM is present.
            return_dict_in_generate (`bool`, *optional*): also return Stage 1's output, and `output_scores` and the
                like; by default as the generation config says.
            verify (`bool`, *optional*, defaults to `True`): let the language model verify Stage 1's tokens, many in one
                forward, instead of decoding one token after the other, and let the aligner verify those of the draft
                head, where the model has one (`draft_vocabulary`). The transcript is the same. This is for greedy
                search without processors, criteria or scores; anything else is left to the stock loop, and so is, on
                an accelerator, `cache_implementation="static"`, whose step that loop compiles.
            generation_config, kwargs: of `GenerationMixin.generate`, for the loop that decodes the transcript: the
                language model's, or Stage 1's with `use_llm=False`.
            labels: ignored; `Trainer` passes the whole batch.
            language (`str`, *optional*): spoken in the audio: a code, an English name, or Whisper's token. Only an
                aligner that begins as a multilingual Whisper's decoder is told it (`token_projection="table"`).
            task (`str`, *optional*): `"transcribe"` or `"translate"`, of the same aligners; the others transcribe.
            input_ids (`torch.LongTensor` of shape `(batch, 0)`, *optional*): what the output begins with, as
                `SeamProcessor` says it. Others are taken for `prompt_input_ids`; the output is the transcript alone.

        Returns:
            Transcript ids `(batch, tokens)` padded at the end, or a [`SeamGenerateOutput`]. Where Stage 1 finds no
            token, the transcript is empty: nothing is invented.
        """
        kwargs = without_whispers(kwargs)
        if input_features is None:
            input_features = kwargs.pop("inputs", None)  # the name that `GenerationMixin.generate` has for all models
        use_llm = self.uses_llm(use_llm)
        check_arguments(generation_config or self.generation_config, kwargs, from_embeddings=use_llm)
        start = start_ids(self.config, language, task)
        speech_states, speech_mask = self.speech(input_features, attention_mask, speech_states, speech_mask)
        settings = generation_config or self.generation_config
        if return_dict_in_generate is None:
            return_dict_in_generate = bool(settings.return_dict_in_generate)
        if not self.bridge.has_stage_1:
            aligned_embeds, mask = self.bridge(speech_states, speech_mask)
            alignment = AlignmentOutput(aligned_embeds=aligned_embeds, mask=mask)
        else:
            if use_llm:  # the other settings are for the LLM's loop
                arguments = {"cache_implementation": kwargs.get("cache_implementation", settings.cache_implementation)}
            else:
                arguments = {"generation_config": generation_config, **kwargs}
            alignment = self.align(
                speech_states,
                speech_mask,
                return_distances=return_dict_in_generate,
                verify=verify,
                language=language,
                task=task,
                **arguments,
            )
        pad = self._pad_token_id(generation_config)
        if use_llm:
            prompts = self.prompt_rows(len(speech_states), prompt_input_ids, prompt_attention_mask, input_ids)
            inputs = self._llm_inputs(alignment, prompts, first_token_guidance, speech_states, speech_mask, start)
            output = self._transcribe(inputs, verify, generation_config, pad, kwargs)
        else:
            output = {name: alignment.get(name) for name in REPORTS}
            output["sequences"] = alignment["sequences"].masked_fill(alignment["mask"] == 0, pad)
        if not return_dict_in_generate:
            return output["sequences"]
        return SeamGenerateOutput(
            **output,
            alignment_sequences=alignment.sequences,
            alignment_mask=alignment.mask,
            alignment_distances=alignment.distances,
            aligned_embeds=alignment.aligned_embeds,
            alignment_forwards=alignment.forwards,
            alignment_accepted_tokens=alignment.accepted_tokens,
            alignment_rejected_tokens=alignment.rejected_tokens,
        )

    def _pad_token_id(self, generation_config: GenerationConfig | None) -> int:
        for config in (generation_config, self.generation_config):
            if config is not None and config.pad_token_id is not None:
                return config.pad_token_id
        return self.config.eoa_token_id

    def _llm_inputs(
        self,
        alignment: AlignmentOutput,
        prompts: list[torch.Tensor],
        first_token_guidance: bool,
        speech_states: torch.Tensor,
        speech_mask: torch.Tensor,
        start: list[int],
    ) -> LLMInputs:
        """Gather what the language model receives, of the rows in which Stage 1 found something."""
        aligned: Any = alignment.aligned_embeds
        mask, sequences = alignment["mask"], alignment.sequences
        if sequences is None:
            guides = mask.new_empty(len(mask), 0)
        else:
            guides = sequences[:, : int(first_token_guidance)]
            if self.config.llm_inputs != "continuous" or aligned is None:
                token_ids = sequences.masked_fill(mask == 0, -100)
                speech = {"speech_states": speech_states, "speech_mask": speech_mask}
                aligned = self.embed_alignment(token_ids, start, **speech)
        rows = mask.any(-1).nonzero().flatten().tolist()
        return LLMInputs(
            batch_size=len(mask),
            rows=rows,
            prompts=[prompts[row] for row in rows],
            aligned=[aligned[row][mask[row].bool()] for row in rows],
            guides=guides[rows] if rows else guides[:, :0],
            drafts=None if sequences is None else [sequences[row][mask[row].bool()].tolist() for row in rows],
        )

    def _transcribe(
        self,
        inputs: LLMInputs,
        verify: bool,
        generation_config: GenerationConfig | None,
        pad: int,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Run the language model's loop: return `sequences` of the whole batch, `REPORTS` and `LLM_COUNTS`."""
        generation_config, kwargs = self._llm_settings(inputs, generation_config, pad, kwargs)
        streamer, guides = kwargs.get("streamer"), inputs.guides
        copies = generation_config.num_return_sequences or 1
        drafts = None
        if verify and (streamer is None or len(inputs.rows) <= 1):
            drafts = inputs.drafts if can_verify(self.language_model, generation_config, kwargs) else None
        output: Any
        if not inputs.rows or generation_config.max_new_tokens == 0:
            output = {"sequences": guides.repeat_interleave(copies, dim=0)}
            if drafts is not None:
                output |= dict.fromkeys(LLM_COUNTS, guides.new_zeros(len(inputs.rows)))
            if streamer is not None:
                streamer.end()
        elif drafts is not None:
            output = self._transcribe_by_draft(inputs, drafts, generation_config, streamer)
        else:
            embeds, mask = self._splice(inputs)
            if guides.shape[1]:
                kwargs["input_ids"] = guides  # shows it to processors and stopping criteria
            output = self.language_model.generate(
                inputs_embeds=embeds, attention_mask=mask, generation_config=generation_config, **kwargs
            )
        result = {name: inputs.spread(output.get(name), value) for name, value in REPORTS.items()}
        result |= {name: inputs.spread(output.get(name), 0) for name in LLM_COUNTS}
        if inputs.rows:
            result["sequences"] = inputs.spread(output["sequences"], pad)
        else:
            result["sequences"] = guides.new_empty(inputs.batch_size * copies, 0)
        return result

    def _llm_settings(
        self, inputs: LLMInputs, generation_config: GenerationConfig | None, pad: int, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Return the config of the language model's loop, and the arguments that are none of its fields."""
        generation_config = copy.deepcopy(generation_config or self.generation_config)
        generation_config.pad_token_id = pad
        generation_config.return_dict_in_generate = True
        if generation_config.use_cache is None:
            generation_config.use_cache = True  # a language model that was trained says False, which is about training
        kwargs = put_into(generation_config, kwargs)
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = TranscriptStreamer(kwargs["streamer"], inputs.guides)
        if inputs.guides.shape[1] and generation_config.max_new_tokens is not None:
            generation_config.max_new_tokens -= 1  # the guide is part of the transcript: it counts
        return generation_config, kwargs

    def _splice(self, inputs: LLMInputs, skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings that the language model receives and their mask, without `skip` ids of the prompts."""
        return splice(
            self.get_input_embeddings(),
            [prompt[skip:] for prompt in inputs.prompts],
            self.config.audio_token_id,
            inputs.aligned,
            list(inputs.guides),
        )

    def _transcribe_by_draft(
        self,
        inputs: LLMInputs,
        drafts: list[list[int]],
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> dict[str, torch.Tensor]:
        """Verify Stage 1's tokens instead of `language_model.generate`: return `sequences` and `LLM_COUNTS`."""
        prefix = self._prefix_ids(inputs.prompts)
        embeds, mask = self._splice(inputs, skip=len(prefix))
        if streamer is not None:
            streamer.put(inputs.guides.cpu())  # the prompt, which the stock loop puts first
        ends = generation_config.eos_token_id
        if ends is None:
            ends = self.language_model.generation_config.eos_token_id
        rows = verified_greedy(
            self.language_model,
            embeds,
            mask,
            drafts,
            guides=inputs.guides.tolist(),
            max_new_tokens=generation_config.max_new_tokens,
            end_token_ids=set() if ends is None else set(torch.as_tensor(ends).flatten().tolist()),
            prefix=self._prefix.states(self.language_model, prefix) if prefix else [],
            static_cache=generation_config.cache_implementation == "static",
            streamer=streamer,
        )
        device = inputs.guides.device
        sequences = _padded(rows, generation_config.pad_token_id, device)
        return {"sequences": sequences, **dict(zip(LLM_COUNTS, _counts(rows, device), strict=True))}

    def _prefix_ids(self, prompts: list[torch.Tensor]) -> list[int]:
        """
        Return the instruction before the audio in the config's prompt, if its keys and values can be cached.

        They can when all of these prompts begin with it, and the language model neither is in training nor depends on
        the padding that a batch then has between prefix and audio, as sliding windows do. Otherwise return nothing.
        """
        default, config = self.config.prompt_token_ids or [], self.language_model.config.get_text_config(decoder=True)
        if self.training or is_sliding(config) or self.config.audio_token_id not in default:
            return []
        prefix = list(default[: default.index(self.config.audio_token_id)])
        return prefix if all(prompt[: len(prefix)].tolist() == prefix for prompt in prompts) else []


def _padded(rows: Sequence[Row], pad: int, device: torch.device) -> torch.Tensor:
    """Return the rows' output, `(batch, tokens)`, padded at the end."""
    sequences = [torch.tensor(row.output, dtype=torch.long, device=device) for row in rows]
    return pad_sequence(sequences, batch_first=True, padding_value=pad)


def _counts(rows: Sequence[Row], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the rows' forwards, accepted and rejected draft tokens, `(batch,)` each."""
    counts = torch.tensor([[row.forwards, row.accepted, row.rejected] for row in rows], device=device)
    return counts.unbind(-1)
