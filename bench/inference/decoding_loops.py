"""
What `bench.inference` compares: stock `generate` of Whisper and of Qwen3, and SEAM's loops, on the same speech states,
the same prompts and for the same number of tokens. Each returns what it wrote.
"""

import random
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from unittest.mock import patch

import torch
from transformers import GenerationConfig, GenerationMixin, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from seam.bench.inference.synthetic_model import period_of, random_projection, successors
from seam.modeling_seam import SeamForSpeechRecognition
from seam.modeling_seam.aligner_decoding import checked_alignment, greedy_alignment
from seam.modeling_seam.llm_decoding import PromptPrefix, Row, write
from seam.modeling_seam.nearest import NearestToken
from seam.modeling_seam.prompt import splice

# Of the tokens in which Stage 1 and the full model differ (recipes/compare/tiny.yaml, three seeds, both test sets), the
# shares that are another token, missing in Stage 1's, and too many there.
ERRORS = (0.68, 0.18, 0.14)


@dataclass
class Written:
    """
    What a loop wrote.

    Args:
        tokens: per utterance its ids.
        rows: of a loop with drafts, its own account of them.
    """

    tokens: list[list[int]]
    rows: list[Row] | None = None


def corrupt(tokens: list[int], agreement: float, vocabulary: int, seed: str) -> list[int]:
    """
    A draft of a text: of its tokens the share `1 - agreement`, rounded to whole tokens, is replaced by another, left
    out, or follows one that was put in, at random, as often as `ERRORS` says.
    """
    rng = random.Random(seed)
    wrong = set(rng.sample(range(len(tokens)), round(len(tokens) * (1 - agreement))))
    draft = []
    for place, token in enumerate(tokens):
        if place in wrong:
            other = (token + rng.randrange(1, vocabulary)) % vocabulary
            draft += rng.choices(([other], [], [other, token]), ERRORS)[0]
        else:
            draft.append(token)
    return draft


@dataclass
class Speech:
    """
    Utterances that fill the encoder's window.

    Args:
        features (`torch.FloatTensor` of shape `(batch, n_mels, frames)`): random ones.
        states, mask: of `encode`.
        seconds: of each of them.
    """

    features: torch.FloatTensor
    states: torch.FloatTensor
    mask: torch.LongTensor
    seconds: float

    @classmethod
    def random(cls, model: SeamForSpeechRecognition, batch_size: int) -> "Speech":
        config, generator = model.config.audio_config, torch.Generator().manual_seed(2)
        shape = (batch_size, config.num_mel_bins, 2 * config.max_source_positions)
        features = torch.randn(shape, generator=generator).to(model.device, model.dtype)
        return cls(features, *model.encode(features), seconds=config.max_source_positions / 50)


class Utterances:
    """
    A batch of utterances of whose transcripts so many tokens are written.

    Args:
        model, whisper, lookup: see `models`.
        speech: what is heard.
        tokens: number of tokens that each loop writes.
    """

    def __init__(
        self,
        model: SeamForSpeechRecognition,
        whisper: WhisperForConditionalGeneration,
        lookup: NearestToken,
        speech: Speech,
        tokens: int,
    ):
        self.model, self.whisper, self.lookup, self.speech, self.tokens = model, whisper, lookup, speech, tokens
        config, generator = model.config, torch.Generator().manual_seed(3)
        self.states, self.mask = speech.states, speech.mask
        self.batch_size = len(speech.states)
        period = period_of(model)
        self.heard = successors(config.boa_token_id, tokens, period)  # Stage 1's text, of all rows
        # What the LLM reads differs: each row has a text of its own.
        places = torch.randint(config.eoa_token_id - tokens, (self.batch_size,), generator=generator).tolist()
        self.aligned = [successors(place, tokens, period) for place in places]
        self.guides = [text[:1] for text in self.aligned]
        self.transcripts = [successors(guide[0], tokens, period) for guide in self.guides]
        prompt, self.prefix = config.prompt_token_ids, PromptPrefix()
        self.instruction = prompt[: prompt.index(config.audio_token_id)]
        self.prefix.states(model.language_model, self.instruction)  # once per model, not per call
        self._drawn = Counter()  # drafts so far, by agreement: where the errors stand matters, so that each is new

    @cached_property
    def random_projection(self) -> torch.nn.Linear:
        return random_projection(self.model.aligner)

    # ---- the systems ----

    def encoder(self):
        self.model.encode(self.speech.features)

    def whisper_decoder(self) -> Written:
        """(a) Stock Whisper's decoder on the encoder's states, which are given."""
        settings = self._stock_settings(decoder_start_token_id=0)
        # Not Whisper's own `generate`, whose rules for long recordings are beside the point.
        ids = GenerationMixin.generate(
            self.whisper,
            encoder_outputs=BaseModelOutput(last_hidden_state=self.states),
            decoder_input_ids=torch.zeros(self.batch_size, 1, dtype=torch.long, device=self.states.device),
            generation_config=settings,
        )
        return self._written(ids[:, 1:])

    def stage_1(self, lookup: NearestToken | None = None) -> Written:
        ids, _ = greedy_alignment(self.model.aligner, lookup or self.lookup, *self._alignment())
        return self._written(ids)

    def stage_1_random(self) -> Written:
        """Stage 1 with predictions that are near no embedding."""
        with patch.object(self.model.aligner, "output_projection", self.random_projection):
            return self.stage_1()

    def stage_1_stock(self) -> Written:
        """Algorithm 1 as the stock loop on the aligner, whose logits are minus the distances."""
        eoa = self.model.config.eoa_token_id
        ids = self.model.aligner.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.states),
            attention_mask=self.mask,
            lookup=self.lookup,
            generation_config=GenerationConfig(
                max_new_tokens=self.tokens,
                decoder_start_token_id=self.model.config.boa_token_id,
                eos_token_id=eoa,
                pad_token_id=eoa,
            ),
        )
        return self._written(ids[:, 1:])

    def draft_head(self):
        """The CTC head writes the draft for Stage 1; its random weights write another one than is checked here."""
        self.model.draft_head.decode(self.states, self.mask)

    def stage_1_checked(self, agreement: float) -> Written:
        """Stage 1 that checks a draft of its own text."""
        drafts = self._drafts([self.heard] * self.batch_size, agreement)
        rows, _ = checked_alignment(self.model.aligner, self.lookup, *self._alignment(), drafts)
        return Written([row.written for row in rows], rows)

    def llm(self) -> Written:
        """(b) The stock loop of the LLM on SEAM's prompts."""
        embeds, mask = self._prompts([])
        ids = self.model.language_model.generate(
            inputs_embeds=embeds, attention_mask=mask, generation_config=self._stock_settings()
        )
        return self._written(ids)

    def llm_checked(self, agreement: float) -> Written:
        """The LLM that checks a draft of its own text, with the keys and values of the instruction at hand."""
        language_model = self.model.language_model
        embeds, mask = self._prompts(self.instruction)
        drafts = self._drafts(self.transcripts, agreement)
        rows = write(
            language_model,
            embeds,
            mask,
            [guide + draft for guide, draft in zip(self.guides, drafts, strict=True)],
            guides=self.guides,
            max_new_tokens=self.tokens,
            end_token_ids=set(),
            prefix=self.prefix.states(language_model, self.instruction),
        )
        return Written([row.written[1:] for row in rows], rows)

    # ---- the plain loops' logits `(batch, vocabulary)` at a place, to see how clear a choice was ----

    def llm_logits(self, place: int) -> torch.Tensor:
        embeds, mask = self._prompts([])
        settings = self._stock_settings(output_logits=True, return_dict_in_generate=True)
        settings.max_new_tokens = place + 1
        loop = self.model.language_model.generate
        return loop(inputs_embeds=embeds, attention_mask=mask, generation_config=settings).logits[place]

    def stage_1_logits(self, place: int) -> torch.Tensor:
        """Minus the distances, of a pass over the text up to there."""
        heard = torch.tensor([self.heard[:place]] * self.batch_size, dtype=torch.long, device=self.states.device)
        return -self.lookup.distances(self.model.teacher_forced(self.states, self.mask, heard)[:, -1])

    # ---- what they share ----

    def _alignment(self) -> tuple:
        config = self.model.config
        return self.states, self.mask, config.boa_token_id, config.eoa_token_id, self.tokens

    def _drafts(self, texts: list[list[int]], agreement: float) -> list[list[int]]:
        self._drawn[agreement] += 1
        vocabulary, draw = self.model.config.get_text_config().vocab_size, self._drawn[agreement]
        return [corrupt(text, agreement, vocabulary, f"{draw} {row}") for row, text in enumerate(texts)]

    def _prompts(self, prefix: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        device, table = self.states.device, self.model.get_input_embeddings()
        prompt = torch.tensor(self.model.config.prompt_token_ids[len(prefix) :], device=device)
        aligned = table(torch.tensor(self.aligned, device=device))
        guides = list(torch.tensor(self.guides, device=device))
        return splice(table, [prompt] * self.batch_size, self.model.config.audio_token_id, list(aligned), guides)

    def _stock_settings(self, **fields) -> GenerationConfig:
        return GenerationConfig(max_new_tokens=self.tokens, do_sample=False, pad_token_id=0, **fields)

    def _written(self, ids: torch.Tensor) -> Written:
        if ids.shape[1] != self.tokens:
            raise RuntimeError(f"{ids.shape[1]} tokens were written where {self.tokens} were asked for.")
        return Written(ids.tolist())
