"""
The aligner whose tokens are rows of a table: Whisper's, re-written for the vocabulary of the language model.

It takes the place of Eq. 2's linear projections (`token_projection="table"`), and transcribes without training.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, WhisperConfig
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE
from transformers.utils import logging

from .aligner import Project, SeamAligner, apply
from .fast_matmul import skinny_matmul
from .nearest import NearestToken

logger = logging.get_logger(__name__)

TASKS = ("transcribe", "translate")


class TableAligner(SeamAligner):
    """
    Read tokens as rows of a table, and write them as mixtures of the language model's embeddings.

    A hidden state is scored against the rows, as Whisper's decoder does; the embeddings of the best tokens, mixed by
    the softmax of their scores, are the prediction. It lies in the convex hull of the embeddings, so that a token is
    predicted that no training has shown.

    The table's last rows are Whisper's prompt: start, languages, tasks. They precede `<BOA>` (see `start_ids`).

    Args:
        config: see [`SeamAligner`].
        vocab_size: of the language model.
        prompt_size: number of the prompt's tokens.
        top_k: number of tokens in a mixture.
    """

    def __init__(self, config: WhisperConfig, vocab_size: int, prompt_size: int, top_k: int):
        PreTrainedModel.__init__(self, config)
        self.prompt_size, self.top_k = prompt_size, top_k
        self.token_table = nn.Embedding(vocab_size + prompt_size, config.d_model)
        self._add_layers()
        self._finish()
        self._rows: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in torch, and forget the rows that were kept: training may change weights unseen."""
        self._rows = None
        return super().train(mode)

    def embed_tokens(self, token_ids: torch.Tensor, lookup: NearestToken, project: Project = apply) -> torch.Tensor:
        """Read tokens: map ids `(...)` to rows of the table, `(..., d_model)`."""
        return self.token_table(token_ids.to(self.token_table.weight.device))

    def predict(
        self, hidden_states: torch.Tensor, lookup: NearestToken, project: Project = apply
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Write tokens: map the last layer's output `(..., d_model)` to mixtures of embeddings.

        Returns:
            The embeddings `(..., d_llm)` and the scores `(..., returnable)` of `lookup.returnable`.
        """
        states = self.layer_norm(hidden_states)
        rows = self._returnable_rows(lookup)
        multiply = nn.functional.linear if project is apply else skinny_matmul
        scores = multiply(states, rows)
        best = scores.float().topk(min(self.top_k, scores.shape[-1]))
        embeds = lookup.embed(lookup.returnable[best.indices.to(lookup.returnable.device)]).float()
        with torch.autocast(embeds.device.type, enabled=False):  # weights that sum to one, in fp32
            mixed = best.values.softmax(-1).to(embeds.device)[..., None, :] @ embeds
        return mixed.squeeze(-2).to(states.device, states.dtype), scores

    def logits(self, aligned_embeds: torch.Tensor, lookup: NearestToken) -> torch.Tensor:
        """Return minus the distances, as [`SeamAligner`] does, with minus infinity for the prompt's tokens."""
        return nn.functional.pad(super().logits(aligned_embeds, lookup), (0, self.prompt_size), value=-torch.inf)

    def _returnable_rows(self, lookup: NearestToken) -> torch.Tensor:
        """Return the rows of the tokens that can be written, `(returnable, d_model)`; kept while nothing changes."""
        weight, ids = self.token_table.weight, lookup.returnable
        if (weight.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return weight.index_select(0, ids.to(weight.device))
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._rows is None or self._rows[0] != key or self._rows[1] is not ids:
            self._rows = (key, ids, weight.detach().index_select(0, ids.to(weight.device)))
        return self._rows[2]


@dataclass(frozen=True)
class WhisperPrompt:
    """
    The tokens that Whisper's decoder is given before a transcript.

    Args:
        default: their names, in order.
        ids: ids in Whisper's vocabulary by name, of these and of the other languages and tasks.
        end_id: of the token that ends a transcript.
    """

    default: list[str]
    ids: dict[str, int]
    end_id: int

    @classmethod
    def of(cls, settings: Any, language: str | None) -> "WhisperPrompt":
        """
        Read the prompt from a checkpoint's generation config.

        Args:
            settings (`GenerationConfig`): of a Whisper, which has fields of its own.
            language: of the default prompt, for a multilingual checkpoint; by default English, where it has that.

        Raises:
            ValueError: for a language that the checkpoint does not have.
        """
        start, end = settings.decoder_start_token_id, settings.eos_token_id
        ids, default = {"<|startoftranscript|>": start}, ["<|startoftranscript|>"]
        languages = getattr(settings, "lang_to_id", None)
        if languages:
            tasks = {f"<|{name}|>": number for name, number in settings.task_to_id.items()}
            ids |= languages | tasks
            usual = "en" if "<|en|>" in languages else next(iter(languages))
            default += [language_token(language or usual, list(languages)), "<|transcribe|>"]
        elif language is not None:
            language_token(language, ["<|en|>"])
        without_times = getattr(settings, "no_timestamps_token_id", None)
        if without_times is not None:
            ids["<|notimestamps|>"] = without_times
            default.append("<|notimestamps|>")
        return cls(default, ids, end[0] if isinstance(end, list) else end)


def language_token(language: str, known: list[str]) -> str:
    """
    Return the prompt's token of a language, given by its code, its English name or the token itself.

    Raises:
        ValueError: for a language that is not known.
    """
    code = language.strip("<|>").lower()
    token = f"<|{TO_LANGUAGE_CODE.get(code, code)}|>"
    if token not in known:
        codes = ", ".join(sorted(name.strip("<|>") for name in known))
        raise ValueError(f"language is {language!r}; accepted: {codes}.")
    return token


def _task_token(task: str, known: list[str]) -> str:
    token = f"<|{task}|>"
    if token not in known:
        raise ValueError(f"task is {task!r}; accepted: {', '.join(name.strip('<|>') for name in known)}.")
    return token


def _check_untold(name: str, value: str, is_whispers: bool) -> None:
    """
    Check a language or task that the aligner is not told, for it begins with none.

    Args:
        is_whispers: whether it begins with Whisper's prompt, which names neither where Whisper is an English one.

    Raises:
        ValueError: for one that the aligner certainly does not have.
    """
    if name == "task":
        _task_token(value, ["<|transcribe|>"])
    elif is_whispers:
        language_token(value, ["<|en|>"])
    else:
        logger.warning_once(
            f"language is {value!r}, without effect: this model is not told a language, but writes what it was trained "
            "to write."
        )


def start_ids(config, language: str | None = None, task: str | None = None) -> list[int]:
    """
    Return the ids that precede the tokens of every utterance: `<BOA>`, after Whisper's prompt where there is one.

    Args:
        config ([`SeamConfig`]): whose `aligner_prompt` is the default.
        language: spoken in the audio (see `language_token`).
        task: `"transcribe"` or `"translate"`, for what Whisper's decoder was trained on.

    Raises:
        ValueError: for a language or task that the aligner does not have.
    """
    prompt = list(config.aligner_prompt or ())
    known = list(config.aligner_prompt_tokens or ())
    languages = [token for token in known if token.strip("<|>") in LANGUAGES]
    tasks = [token for token in known if token.strip("<|>") in TASKS]
    for name, value, tokens in (("language", language, languages), ("task", task, tasks)):
        if value is None:
            continue
        own = next((i for i, token in enumerate(prompt) if token in tokens), None)
        if own is None:
            _check_untold(name, value, bool(known))
            continue
        prompt[own] = language_token(value, tokens) if name == "language" else _task_token(value, tokens)
    vocab_size = config.get_text_config().vocab_size
    return [*(vocab_size + known.index(name) for name in prompt), config.boa_token_id]


# ---- building the table ----


def byte_strings(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """
    Return the bytes that every text token stands for, by its id; special tokens are left out.

    Two tokens may stand for the same: SentencePiece's have bytes beside characters.

    Raises:
        ValueError: for a vocabulary that is neither byte-level nor SentencePiece's.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json; accepted: a fast tokenizer.")
    settings = json.loads(backend.to_str())
    parts = json.dumps([settings[name] for name in ("pre_tokenizer", "decoder", "normalizer")], ensure_ascii=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if '"ByteLevel"' in parts:
        convert = _of_byte_level
    elif SPACE in parts or '"Metaspace"' in parts:
        convert = _of_sentencepiece
    else:
        raise ValueError(
            f"the vocabulary of {type(tokenizer).__name__} is of another kind; accepted: byte-level and SentencePiece."
        )
    texts = {i: convert(token) for token, i in tokenizer.get_vocab().items() if i not in special}
    return {i: text for i, text in texts.items() if text is not None}


def _byte_characters() -> dict[str, int]:
    """Return the byte of every character of a byte-level vocabulary: those that can be printed are themselves."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_characters()
SPACE = "\u2581"  # in SentencePiece's vocabularies


def _of_byte_level(token: str) -> bytes | None:
    return bytes(BYTES[character] for character in token) if BYTES.keys() >= set(token) else None


def _of_sentencepiece(token: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes.fromhex(token[3:5])
    return token.replace(SPACE, " ").encode()


def pieces(text: bytes, vocabulary: Mapping[bytes, int]) -> list[int]:
    """
    Return the ids that spell some bytes: that of all of them, or of the longest pieces, from the left.

    Bytes without a token are left out.
    """
    found, start = [], 0
    while start < len(text):
        end = next((end for end in range(len(text), start, -1) if text[start:end] in vocabulary), None)
        if end is not None:
            found.append(vocabulary[text[start:end]])
        start = end or start + 1
    return found


def rewritten_table(
    whisper_table: torch.Tensor,
    whisper_tokenizer: PreTrainedTokenizerBase,
    llm_tokenizer: PreTrainedTokenizerBase,
    config,
    prompt: WhisperPrompt,
) -> torch.Tensor:
    """
    Re-write the table of Whisper's decoder for the language model's tokens.

    A token has the row of the same bytes, otherwise the mean of the rows of its pieces; `<EOA>` that of Whisper's end,
    `<BOA>` that of the prompt's last token. Tokens that are no text have zeros.

    Args:
        whisper_table: `(V_whisper, d_model)`.
        whisper_tokenizer, llm_tokenizer: of both vocabularies.
        config ([`SeamConfig`]): ids of `<BOA>` and `<EOA>`, size of the vocabulary, names of the prompt's tokens.
        prompt: Whisper's.

    Returns:
        `(V_llm + prompt tokens, d_model)`, fp32.
    """
    whisper_table = whisper_table.detach().float()
    known = {text: i for i, text in byte_strings(whisper_tokenizer).items()}
    vocab_size = config.get_text_config().vocab_size
    table = whisper_table.new_zeros(vocab_size + len(config.aligner_prompt_tokens), whisper_table.shape[1])
    spelled = {i: pieces(text, known) for i, text in byte_strings(llm_tokenizer).items() if i < vocab_size}
    spelled = {i: found for i, found in spelled.items() if found}
    starts = [0, *accumulate(map(len, spelled.values()))][:-1]
    flat = torch.tensor(list(chain.from_iterable(spelled.values())))
    table[list(spelled)] = nn.functional.embedding_bag(flat, whisper_table, torch.tensor(starts), mode="mean")
    table[config.eoa_token_id] = whisper_table[prompt.end_id]
    table[config.boa_token_id] = whisper_table[prompt.ids[prompt.default[-1]]]
    for i, name in enumerate(config.aligner_prompt_tokens):
        table[vocab_size + i] = whisper_table[prompt.ids[name]]
    return table
