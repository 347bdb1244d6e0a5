"""
The decoding loops that `bench.inference` compares: stock `generate` of Whisper and of Qwen3, and SEAM's own.

All decode the same number of tokens from the same speech states and prompts, and return these tokens.
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
from seam.modeling_seam.aligner_decoding import greedy_alignment, verified_alignment
from seam.modeling_seam.llm_decoding import PromptPrefix, Row, verified_greedy
from seam.modeling_seam.nearest import NearestToken
from seam.modeling_seam.prompt import splice

# How Stage-1 tokens differ from the output of the full model (recipes/compare/tiny.yaml, three seeds, both test sets):
# shares of substitutions, deletions and insertions.
ERRORS = (0.68, 0.18, 0.14)


@dataclass
class Output:
    """
    Hold the output of a loop.

    Args:
        tokens: ids of each utterance.
        rows: counts that a loop with drafts keeps of each utterance.
    """

    tokens: list[list[int]]
    rows: list[Row] | None = None


def corrupt(tokens: list[int], agreement: float, vocabulary: int, seed: str) -> list[int]:
    """
    Make a draft of a text with random errors.

    Args:
        tokens: ids of the text.
        agreement: share of its tokens that are kept. Each of the others is substituted, deleted, or follows an
            insertion, with the probabilities in `ERRORS`.
        vocabulary: size of the vocabulary.
        seed: of the random choices.
    """
    rng = random.Random(seed)
    wrong = set(rng.sample(range(len(tokens)), round(len(tokens) * (1 - agreement))))
    draft = []
    for position, token in enumerate(tokens):
        if position in wrong:
            other = (token + rng.randrange(1, vocabulary)) % vocabulary
            draft += rng.choices(([other], [], [other, token]), ERRORS)[0]
        else:
            draft.append(token)
    return draft


@dataclass
class Speech:
    """
    Hold a batch of utterances that fill the encoder's window.

    Args:
        features (`torch.FloatTensor` of shape `(batch, n_mels, frames)`): random log-mel features.
        states (`torch.FloatTensor` of shape `(batch, seq, d_speech)`): what `encode` returns for them.
        mask (`torch.LongTensor` of shape `(batch, seq)`): the attention mask of the states.
        seconds: duration of each utterance.
    """

    features: torch.FloatTensor
    states: torch.FloatTensor
    mask: torch.LongTensor
    seconds: float

    @classmethod
    def random(cls, model: SeamForSpeechRecognition, batch_size: int) -> "Speech":
        """Return the speech of random features that fill the encoder's window."""
        config, generator = model.config.audio_config, torch.Generator().manual_seed(2)
        shape = (batch_size, config.num_mel_bins, 2 * config.max_source_positions)
        features = torch.randn(shape, generator=generator).to(model.device, model.dtype)
        return cls(features, *model.encode(features), seconds=config.max_source_positions / 50)


class Utterances:
    """
    Decode a batch of utterances with every loop, a fixed number of tokens each.

    Args:
        model: see `synthetic_model.build`.
        whisper: see `synthetic_model.stock_whisper`.
        lookup: see `synthetic_model.lookup`.
        speech: the utterances.
        tokens: number of tokens that each loop decodes.
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
        self.stage_1_text = successors(config.boa_token_id, tokens, period)  # of all rows
        # The LLM reads another text in each row.
        starts = torch.randint(config.eoa_token_id - tokens, (self.batch_size,), generator=generator).tolist()
        self.aligned = [successors(start, tokens, period) for start in starts]
        self.guides = [text[:1] for text in self.aligned]
        self.transcripts = [successors(guide[0], tokens, period) for guide in self.guides]
        prompt, self.prefix = config.prompt_token_ids, PromptPrefix()
        self.instruction = prompt[: prompt.index(config.audio_token_id)]
        self.prefix.states(model.language_model, self.instruction)  # computed once per model, not in the timed calls
        self._drawn = (
            Counter()
        )  # number of drafts made so far, by agreement; each has other errors, since their positions matter

    @cached_property
    def random_projection(self) -> torch.nn.Linear:
        """Return an output projection whose predictions are near no embedding."""
        return random_projection(self.model.bridge)

    # ---- the systems ----

    def encoder(self):
        """Encode the speech."""
        self.model.encode(self.speech.features)

    def whisper_decoder(self) -> Output:
        """Decode with stock Whisper from the states of the encoder."""
        settings = self._stock_settings(decoder_start_token_id=0)
        # Not Whisper's own `generate`, which adds work for long recordings.
        ids = GenerationMixin.generate(
            self.whisper,
            encoder_outputs=BaseModelOutput(last_hidden_state=self.states),
            decoder_input_ids=torch.zeros(self.batch_size, 1, dtype=torch.long, device=self.states.device),
            generation_config=settings,
        )
        return self._output(ids[:, 1:])

    def stage_1(self, lookup: NearestToken | None = None) -> Output:
        """Decode with Stage 1's greedy loop."""
        ids, _ = greedy_alignment(self.model.bridge, lookup or self.lookup, *self._alignment())
        return self._output(ids)

    def stage_1_random(self) -> Output:
        """Decode with Stage 1 whose predictions are near no embedding."""
        with patch.object(self.model.bridge, "output_projection", self.random_projection):
            return self.stage_1()

    def stage_1_stock(self) -> Output:
        """Decode with the stock loop on the aligner, whose logits are the negative distances (Algorithm 1)."""
        eoa = self.model.config.eoa_token_id
        ids = self.model.bridge.generate(
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
        return self._output(ids[:, 1:])

    def draft_head(self):
        """Time the CTC head alone: its weights are random, so that Stage 1 verifies another draft than it predicts."""
        self.model.draft_head.decode(self.states, self.mask)

    def stage_1_checked(self, agreement: float) -> Output:
        """Decode with Stage 1 that verifies a draft of its own text."""
        drafts = self._drafts([self.stage_1_text] * self.batch_size, agreement)
        rows, _ = verified_alignment(self.model.bridge, self.lookup, *self._alignment(), drafts)
        return Output([row.output for row in rows], rows)

    def llm(self) -> Output:
        """Decode with the stock loop of the LLM on SEAM's prompts."""
        embeds, mask = self._prompts([])
        ids = self.model.language_model.generate(
            inputs_embeds=embeds, attention_mask=mask, generation_config=self._stock_settings()
        )
        return self._output(ids)

    def llm_checked(self, agreement: float) -> Output:
        """Decode with the LLM that verifies a draft of its own text, with the instruction's keys and values cached."""
        language_model = self.model.language_model
        embeds, mask = self._prompts(self.instruction)
        drafts = self._drafts(self.transcripts, agreement)
        rows = verified_greedy(
            language_model,
            embeds,
            mask,
            [guide + draft for guide, draft in zip(self.guides, drafts, strict=True)],
            guides=self.guides,
            max_new_tokens=self.tokens,
            end_token_ids=set(),
            prefix=self.prefix.states(language_model, self.instruction),
        )
        return Output([row.output[1:] for row in rows], rows)

    # ---- logits `(batch, vocabulary)` of the plain loops at a position, to tell numerical ties from errors ----

    def llm_logits(self, position: int) -> torch.Tensor:
        """Return the logits of the stock loop of the LLM at a position, `(batch, vocab_size)`."""
        embeds, mask = self._prompts([])
        settings = self._stock_settings(output_logits=True, return_dict_in_generate=True)
        settings.max_new_tokens = position + 1
        loop = self.model.language_model.generate
        return loop(inputs_embeds=embeds, attention_mask=mask, generation_config=settings).logits[position]

    def stage_1_logits(self, position: int) -> torch.Tensor:
        """Return the negative distances after the text up to that position."""
        ids = torch.tensor(
            [self.stage_1_text[:position]] * self.batch_size, dtype=torch.long, device=self.states.device
        )
        return -self.lookup.distances(self.model.teacher_forced(self.states, self.mask, ids)[:, -1])

    # ---- used by several systems ----

    def _alignment(self) -> tuple:
        config = self.model.config
        return self.states, self.mask, [config.boa_token_id], config.eoa_token_id, self.tokens

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

    def _output(self, ids: torch.Tensor) -> Output:
        if ids.shape[1] != self.tokens:
            raise RuntimeError(f"{ids.shape[1]} tokens were decoded; expected {self.tokens}.")
        return Output(ids.tolist())
