"""Two-level autoregression: Algorithm 1 (Stage 1), Algorithm 2 (the full model) and First Token Guidance (Eq. 6)."""

import copy
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .aligner_decoding import can_run, checked_alignment, greedy_alignment
from .llm_decoding import is_sliding, verifies, write
from .nearest import alignment_distance
from .prompt import splice
from .speculative import Row


@dataclass
class AlignmentOutput(ModelOutput):
    """
    What Stage 1 heard.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, tokens)`): ids without `<BOA>` and `<EOA>`, padded at the end.
        mask (`torch.LongTensor` of shape `(batch, tokens)`): 1 for tokens, 0 for padding.
        aligned_embeds (`torch.FloatTensor` of shape `(batch, tokens, d_llm)`, *optional*): predicted embeddings;
            zeros for padding.
        distances (`torch.FloatTensor` of shape `(batch, tokens)`, *optional*): Eq. 7 to the chosen tokens; 0 for
            padding.
        forwards, accepted_tokens, rejected_tokens (`torch.LongTensor` of shape `(batch,)`, *optional*):
            When the tokens were written by checking the draft head's (`verify`): the aligner's passes in which the row
            took part, and the tokens of the draft that it agreed with and did not. A token that was proposed again
            counts again.
        sequences_scores, scores, logits, beam_indices (*optional*): see [`SeamGenerateOutput`].
    """

    sequences: torch.LongTensor | None = None
    mask: torch.LongTensor | None = None
    aligned_embeds: torch.FloatTensor | None = None
    distances: torch.FloatTensor | None = None
    forwards: torch.LongTensor | None = None
    accepted_tokens: torch.LongTensor | None = None
    rejected_tokens: torch.LongTensor | None = None
    sequences_scores: torch.FloatTensor | None = None
    scores: tuple[torch.FloatTensor, ...] | None = None
    logits: tuple[torch.FloatTensor, ...] | None = None
    beam_indices: torch.LongTensor | None = None


@dataclass
class SeamGenerateOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(batch, tokens)`): transcript ids, padded at the end.
        sequences_scores, scores, logits, beam_indices (*optional*):
            As `GenerationMixin.generate` returns them when asked to (`output_scores`, `output_logits`, beams), of the
            loop that wrote the transcript. The guiding first token was not chosen by it and has none; in rows where
            Stage 1 heard nothing they are minus infinity.
        alignment_sequences, alignment_mask, alignment_distances, aligned_embeds: see [`AlignmentOutput`]. Of a bridge
            without a Stage 1, the embeddings that it made and their mask.
        llm_forwards, accepted_tokens, rejected_tokens (`torch.LongTensor` of shape `(batch,)`, *optional*):
            As those of [`AlignmentOutput`], when the transcript was written by checking Stage 1's: of the language
            model and Stage 1's tokens.
        alignment_forwards, alignment_accepted_tokens, alignment_rejected_tokens (*optional*): see [`AlignmentOutput`].
    """

    sequences: torch.LongTensor | None = None
    sequences_scores: torch.FloatTensor | None = None
    scores: tuple[torch.FloatTensor, ...] | None = None
    logits: tuple[torch.FloatTensor, ...] | None = None
    beam_indices: torch.LongTensor | None = None
    alignment_sequences: torch.LongTensor | None = None
    alignment_mask: torch.LongTensor | None = None
    alignment_distances: torch.FloatTensor | None = None
    aligned_embeds: torch.FloatTensor | None = None
    llm_forwards: torch.LongTensor | None = None
    accepted_tokens: torch.LongTensor | None = None
    rejected_tokens: torch.LongTensor | None = None
    alignment_forwards: torch.LongTensor | None = None
    alignment_accepted_tokens: torch.LongTensor | None = None
    alignment_rejected_tokens: torch.LongTensor | None = None


# What a loop reports about its choices, by the value that stands for "no choice was made here".
REPORTS = {"sequences_scores": -torch.inf, "scores": -torch.inf, "logits": -torch.inf, "beam_indices": -1}
# What checking a draft reports, of Stage 1, and of the language model by the value of rows in which nothing was heard.
CHECKS = ("forwards", "accepted_tokens", "rejected_tokens")
COUNTS = {"llm_forwards": 0, "accepted_tokens": 0, "rejected_tokens": 0}


class TranscriptStreamer:
    """
    Passes a transcript on to a streamer of `GenerationMixin.generate`.

    What the loop announces first is its prompt, which a streamer may be told to skip; here that is the guiding token,
    which belongs to the transcript, or Stage 1's `<BOA>`, which does not.

    Args:
        streamer (`BaseStreamer`): what the user gave.
        guide (`torch.LongTensor` of shape `(batch, 0 or 1)`): the first token, when it is given to the loop.
    """

    def __init__(self, streamer: BaseStreamer, guide: torch.LongTensor):
        streamer.put(guide.new_empty(len(guide), 0).cpu())  # an empty prompt
        if guide.numel():
            streamer.put(guide.flatten().cpu())
        self.streamer, self.announced = streamer, False

    def put(self, value: torch.LongTensor):
        if self.announced:
            self.streamer.put(value)
        self.announced = True

    def end(self):
        self.streamer.end()


class SeamGenerationMixin(GenerationMixin):
    """`generate` of [`SeamForSpeechRecognition`]."""

    @torch.no_grad()
    def align(
        self,
        speech_states: torch.FloatTensor,
        speech_mask: torch.Tensor | None = None,
        return_distances: bool = False,
        verify: bool = True,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> AlignmentOutput:
        """
        Algorithm 1: the nearest token of each predicted embedding, fed back, until `<EOA>`.

        Greedy search is a loop of its own, which checks what the draft head wrote where there is one; the tokens are
        the same. Anything else is the loop of `GenerationMixin` on the aligner, whose logits are minus the distances.
        Of a CTC head, its most probable path, which takes no arguments and has no distances.

        Args:
            speech_states, speech_mask: what `encode` returned.
            return_distances: also return distances and predicted embeddings, which not every loop keeps: where it does
                not, from one parallel pass over the tokens.
            verify: use the draft head.
            generation_config, kwargs: of `GenerationMixin.generate`; greedy search by default.
        """
        if self.config.bridge != "aligner":
            ids, mask = self.bridge.decode(speech_states, speech_mask)
            return AlignmentOutput(sequences=ids, mask=mask)
        limit = self.config.aligner_config.max_target_positions - 1
        generation_config = copy.deepcopy(generation_config or GenerationConfig())
        generation_config.return_dict_in_generate = True
        kwargs = _update(generation_config, kwargs)
        generation_config.decoder_start_token_id = self.config.boa_token_id
        generation_config.eos_token_id = generation_config.pad_token_id = self.config.eoa_token_id
        generation_config.max_new_tokens = generation_config.max_new_tokens or limit
        if generation_config.max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens is {generation_config.max_new_tokens}, but the aligner has positions for {limit}."
            )
        if can_run(self.bridge, generation_config, kwargs):
            given = (self.bridge, self.lookup, speech_states, speech_mask)
            limits = (self.config.boa_token_id, self.config.eoa_token_id, generation_config.max_new_tokens)
            if verify and self.draft_head is not None:
                drafts, mask = self.draft_head.decode(speech_states, speech_mask)
                drafts = [row[keep].tolist() for row, keep in zip(drafts, mask.bool(), strict=True)]
                rows, predicted = checked_alignment(*given, *limits, drafts)
                sequences, counts = _sequences(rows, self.config.eoa_token_id, speech_states.device)
                embeds, loop = pad_sequence(predicted, batch_first=True), dict(zip(CHECKS, counts, strict=True))
            else:
                sequences, embeds = greedy_alignment(*given, *limits)
                loop = {}
        else:
            if kwargs.get("streamer") is not None:
                nothing = torch.empty(len(speech_states), 0, dtype=torch.long)
                kwargs["streamer"] = TranscriptStreamer(kwargs["streamer"], nothing)
            loop = self.bridge.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=speech_states),
                attention_mask=speech_mask,
                lookup=self.lookup,
                generation_config=generation_config,
                **kwargs,
            )
            sequences, embeds = loop.sequences[:, 1:], None
        ended = (sequences == self.config.eoa_token_id).cumsum(-1) > 0
        longest = int((~ended).sum(-1).max())
        sequences, mask = sequences[:, :longest], (~ended[:, :longest]).long()
        reports = {name: loop.get(name) for name in (*REPORTS, *CHECKS)}
        output = AlignmentOutput(sequences=sequences, mask=mask, **reports)
        if embeds is not None:
            output.aligned_embeds = embeds[:, :longest]
        elif return_distances:
            copies = len(sequences) // len(speech_states)  # num_return_sequences
            speech_states = speech_states.repeat_interleave(copies, dim=0)
            speech_mask = speech_mask.repeat_interleave(copies, dim=0) if speech_mask is not None else None
            output.aligned_embeds = self.teacher_forced(speech_states, speech_mask, sequences)[:, :-1]
        if return_distances:
            output.distances = alignment_distance(
                output.aligned_embeds,
                self.lookup.embed(sequences),
                self.config.alignment_lambda,
                self.config.alignment_reduction,
            ).masked_fill_(mask == 0, 0)
        if output.aligned_embeds is not None:
            output.aligned_embeds = output.aligned_embeds.masked_fill((mask == 0)[..., None], 0)
        return output

    @torch.no_grad()
    def generate(
        self,
        input_features: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        speech_states: torch.FloatTensor | None = None,
        speech_mask: torch.Tensor | None = None,
        first_token_guidance: bool = True,
        use_llm: bool | None = None,
        return_dict_in_generate: bool | None = None,
        verify: bool = True,
        generation_config: GenerationConfig | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> torch.LongTensor | SeamGenerateOutput:
        """
        Transcribe (Algorithm 2).

        Args:
            input_features (`torch.FloatTensor` of shape `(batch, n_mels, frames)`): log-mel features.
            attention_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 for frames that hold audio.
            input_ids (`torch.LongTensor` of shape `(batch, prompt)`, *optional*):
                Prompts with one `audio_token_id` each (`SeamProcessor.apply_transcription_request`); by default the
                one in the config.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*): 1 for the prompt's own ids.
            speech_states, speech_mask (*optional*): what `encode` returned, instead of `input_features`.
            first_token_guidance (`bool`, *optional*, defaults to `True`): Eq. 6.
            use_llm (`bool`, *optional*): `False` gives Stage 1's tokens ("SEAM w/o LLM"); by default `True` where the
                LLM is present.
            return_dict_in_generate (`bool`, *optional*): also return what Stage 1 heard, and `output_scores` and the
                like; by default as the generation config says.
            verify (`bool`, *optional*, defaults to `True`): let the language model check Stage 1's tokens, many in one
                forward, instead of writing one token after the other, and the aligner those of the draft head, where
                the model has one (`draft_vocabulary`). The transcript is the same. For greedy search
                that nothing else looks at (no processors, criteria or scores); the rest is left to the stock loop, and
                so is, on an accelerator, `cache_implementation="static"`, whose step that loop compiles.
            generation_config, kwargs: of `GenerationMixin.generate`, for the loop that writes the transcript: the
                language model's, or Stage 1's with `use_llm=False`.
            labels: ignored; `Trainer` passes the whole batch.

        Returns:
            Transcript ids `(batch, tokens)` padded at the end, or a [`SeamGenerateOutput`]. Where Stage 1 heard
            nothing the transcript is empty: nothing is invented.
        """
        use_llm = self.uses_llm(use_llm)
        speech_states, speech_mask = self.speech(input_features, attention_mask, speech_states, speech_mask)
        settings = generation_config or self.generation_config
        if return_dict_in_generate is None:
            return_dict_in_generate = bool(settings.return_dict_in_generate)
        if use_llm:  # the other settings are for the loop that writes
            arguments = {"cache_implementation": kwargs.get("cache_implementation", settings.cache_implementation)}
        else:
            arguments = {"generation_config": generation_config, **kwargs}
        if self.bridge.writes_tokens:
            alignment = self.align(
                speech_states, speech_mask, return_distances=return_dict_in_generate, verify=verify, **arguments
            )
        else:
            alignment = AlignmentOutput()  # no Stage 1, and no first token to guide with
        pad = self._pad_token_id(generation_config)
        if use_llm:
            prompts = self.prompt_rows(len(speech_states), input_ids, prompt_attention_mask)
            if self.bridge.writes_tokens:
                guides, mask = alignment.sequences[:, : int(first_token_guidance)], alignment.mask
                if self.config.llm_inputs == "continuous" and alignment.aligned_embeds is not None:
                    aligned = alignment.aligned_embeds
                else:
                    heard = alignment.sequences.masked_fill(mask == 0, -100)
                    aligned = self.embed_alignment(heard, speech_states=speech_states, speech_mask=speech_mask)
            else:
                aligned, mask = self.bridge(speech_states, speech_mask)
                alignment.aligned_embeds, alignment.mask, guides = aligned, mask, mask.new_empty(len(mask), 0)
            drafts = alignment.sequences if verify else None  # none of a bridge without a Stage 1
            written = self._write(aligned, mask, guides, prompts, drafts, generation_config, pad, kwargs)
        else:
            written = {name: alignment.get(name) for name in REPORTS}
            written["sequences"] = alignment.sequences.masked_fill(alignment.mask == 0, pad)
        if not return_dict_in_generate:
            return written["sequences"]
        return SeamGenerateOutput(
            **written,
            alignment_sequences=alignment.sequences,
            alignment_mask=alignment.mask,
            alignment_distances=alignment.distances,
            aligned_embeds=alignment.aligned_embeds,
            **{f"alignment_{name}": alignment.get(name) for name in CHECKS},
        )

    def _pad_token_id(self, generation_config: GenerationConfig | None) -> int:
        for config in (generation_config, self.generation_config):
            if config is not None and config.pad_token_id is not None:
                return config.pad_token_id
        return self.config.eoa_token_id

    def _write(
        self, aligned_embeds, aligned_mask, guides, prompts, drafts, generation_config, pad, kwargs
    ) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...] | None]:
        """
        The language model's loop over the rows in which something was heard: `sequences`, `REPORTS` and `COUNTS`.
        `guides`: the first tokens `(batch, 1)`, or none `(batch, 0)`. `drafts`: Stage 1's tokens, where `aligned_mask`
        is 1, to be checked; or `None`.
        """
        generation_config = copy.deepcopy(generation_config or self.generation_config)
        generation_config.pad_token_id = pad
        generation_config.return_dict_in_generate = True
        if generation_config.use_cache is None:
            generation_config.use_cache = True  # a language model that was trained says False, which is about training
        kwargs = _update(generation_config, kwargs)
        copies = generation_config.num_return_sequences or 1
        batch_size = len(aligned_mask)
        heard = aligned_mask.any(-1).nonzero().flatten().tolist()
        guide = guides[heard] if heard else guides[:, :0]
        is_guided = bool(guides.shape[1])
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = TranscriptStreamer(kwargs["streamer"], guide)
        if is_guided and generation_config.max_new_tokens is not None:
            generation_config.max_new_tokens -= 1  # the guide is part of the transcript: it counts
        is_checked = (
            drafts is not None
            and (kwargs.get("streamer") is None or len(heard) <= 1)
            and verifies(self.language_model, generation_config, kwargs)
        )
        if not heard or generation_config.max_new_tokens == 0:
            written = {"sequences": guide.repeat_interleave(copies, dim=0)}
            if is_checked:
                written |= dict.fromkeys(COUNTS, guide.new_zeros(len(heard)))
            if kwargs.get("streamer") is not None:
                kwargs["streamer"].end()
        else:
            prompts = [prompts[row] for row in heard]
            prefix = self._prefix_ids(prompts) if is_checked else []
            embeds, mask = splice(
                self.get_input_embeddings(),
                [prompt[len(prefix) :] for prompt in prompts],
                self.config.audio_token_id,
                [aligned_embeds[row][aligned_mask[row].bool()] for row in heard],
                list(guide),
            )
            if is_checked:
                drafts = [drafts[row][aligned_mask[row].bool()].tolist() for row in heard]
                written = self._check(embeds, mask, drafts, guide, prefix, generation_config, kwargs.get("streamer"))
            else:
                if is_guided:
                    kwargs["input_ids"] = guide  # shows it to processors and stopping criteria
                written = self.language_model.generate(
                    inputs_embeds=embeds, attention_mask=mask, generation_config=generation_config, **kwargs
                )

        def spread(rows: torch.Tensor, value: float) -> torch.Tensor:
            """Rows of what was heard to rows of the batch."""
            each = len(rows) // max(len(heard), 1)
            everything = rows.new_full((batch_size, each, *rows.shape[1:]), value)
            everything[heard] = rows.view(len(heard), each, *rows.shape[1:])
            return everything.flatten(0, 1)

        result = {}
        for name, value in {**REPORTS, **COUNTS}.items():
            report = written.get(name)
            if isinstance(report, tuple):
                result[name] = tuple(spread(step, value) for step in report)
            else:
                result[name] = None if report is None else spread(report, value)
        if heard:
            result["sequences"] = spread(written["sequences"], pad)
        else:
            result["sequences"] = guides.new_empty(batch_size * copies, 0)
        return result

    def _prefix_ids(self, prompts: list[torch.LongTensor]) -> list[int]:
        """
        The instruction before the audio in the config's prompt, if its keys and values can be kept: all of these
        prompts begin with it, and the language model does not change and does not care about the padding that a batch
        then has between prefix and audio, as sliding windows do.
        """
        default, config = self.config.prompt_token_ids or [], self.language_model.config.get_text_config(decoder=True)
        if self.training or is_sliding(config) or self.config.audio_token_id not in default:
            return []
        prefix = list(default[: default.index(self.config.audio_token_id)])
        return prefix if all(prompt[: len(prefix)].tolist() == prefix for prompt in prompts) else []

    def _check(self, embeds, mask, drafts, guide, prefix, generation_config, streamer) -> dict[str, torch.LongTensor]:
        """`verification.write` in the place of `language_model.generate`: `sequences` and `COUNTS`."""
        if streamer is not None:
            streamer.put(guide.cpu())  # the prompt, which the stock loop announces
        ends = generation_config.eos_token_id
        if ends is None:
            ends = self.language_model.generation_config.eos_token_id
        rows = write(
            self.language_model,
            embeds,
            mask,
            drafts,
            guides=guide.tolist(),
            max_new_tokens=generation_config.max_new_tokens,
            end_token_ids=set() if ends is None else set(torch.as_tensor(ends).flatten().tolist()),
            prefix=self._prefix.states(self.language_model, prefix) if prefix else [],
            static_cache=generation_config.cache_implementation == "static",
            streamer=streamer,
        )
        sequences, counts = _sequences(rows, generation_config.pad_token_id, guide.device)
        return {"sequences": sequences, **dict(zip(COUNTS, counts, strict=True))}


def _sequences(
    rows: list[Row], pad: int, device: torch.device
) -> tuple[torch.LongTensor, tuple[torch.LongTensor, ...]]:
    """What was written, `(batch, tokens)`, and `CHECKS`, `(batch,)` each."""
    written = [torch.tensor(row.written, dtype=torch.long, device=device) for row in rows]
    counts = torch.tensor([[row.forwards, row.accepted, row.rejected] for row in rows], device=device)
    return pad_sequence(written, batch_first=True, padding_value=pad), counts.unbind(-1)


def _update(generation_config: GenerationConfig, kwargs: dict) -> dict:
    """
    Put the arguments of `generate` into the config and return those that are none of its fields. `max_length` means the
    length of what is written, as for any encoder-decoder; the prompt does not count.
    """
    if "max_length" in kwargs:
        kwargs = {"max_new_tokens": kwargs["max_length"], **kwargs, "max_length": None}
    kwargs = generation_config.update(**kwargs)
    generation_config.max_new_tokens = generation_config.max_new_tokens or generation_config.max_length
    generation_config.max_length = None
    return kwargs
