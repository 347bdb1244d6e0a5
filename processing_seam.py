"""Turn waveforms into log-mel features, instructions into prompt ids, and transcripts into ids and back."""

import difflib
import hashlib
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import librosa
import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file

from .audio_files import checked_rate, content_of, decode, download, is_mapping, named_content, waveform_of

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]  # a module or none

logger = logging.getLogger(__name__)

DEFAULT_INSTRUCTION = "Transcribe the following audio:"  # Section 3.5
# Long audio is cut in the last part of a window, in the middle of the quietest interval of this length.
CUT_SEARCH_SHARE = 0.4
CUT_INTERVAL_SECONDS = 0.1
# As vocabularies of SentencePiece and byte-level ones spell it.
SPACES = ("\u2581", "\u0120")

# Options that other processors have, of which every value gives the same result here: audio is always padded to the
# window, never truncated, and has a mask.
ALIASES = {"sr": "sampling_rate", "rate": "sampling_rate", "transcript": "text", "raw_speech": "audio"}
IGNORED_KEYWORDS = ("padding", "truncation", "return_attention_mask", "pad_to_multiple_of", "device")

# Of a chat template: usual ones take and write some hundred.
MOST_STEPS, MOST_CHARACTERS = 300_000, 1_000_000
MOST_MEMORY = 256 * 1024 * (1024 if sys.platform == "darwin" else 1)  # in the unit of `getrusage`
# Where templates run, and what they call; not where they are compiled.
RENDERING = ("<template>", *(os.path.join("jinja2", f"{name}.py") for name in ("filters", "runtime", "utils")))
# Of the feature extractor: many times those of any Whisper.
MOST_FEATURES = {
    "feature_size": 4096,
    "n_fft": 65536,
    "hop_length": 65536,
    "sampling_rate": 768_000,
    "chunk_length": 3600,
}
_TEMPLATES_THAT_END: set[str] = set()

PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Also in `modeling_seam/weights.py`: remote code at the root and in `modeling_seam/` cannot import each other.
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")

# Also file objects, and what `datasets` decodes.
AudioSource = Any


class SeamProcessor(ProcessorMixin):
    r"""
    Prepare the inputs of a [`SeamForSpeechRecognition`] and turn the ids that it generates back into text.

    Args:
        feature_extractor (`WhisperFeatureExtractor`): log-mel features of the speech encoder.
        tokenizer (`PreTrainedTokenizerFast`): the language model's tokenizer, with a chat template.
        chat_template (`str`, *optional*): by default the tokenizer's.
        instruction (`str`, *optional*): the task instruction T of the default prompt.
        boa_token (`str`, *optional*): token whose embedding starts Stage 1.
        eoa_token (`str`, *optional*): token that ends Stage 1.
        audio_token (`str`, *optional*): placeholder of the audio in the prompt; added to the tokenizer when new.
        leading_space (`bool`, *optional*, defaults to `False`): whether transcripts begin with a space, as words within
            a sentence do. Whisper's begin so, and with them an aligner that begins as its decoder.
    """

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        instruction: str = DEFAULT_INSTRUCTION,
        boa_token: str = "<|im_start|>",
        eoa_token: str = "<|im_end|>",
        audio_token: str = "<|audio|>",
        leading_space: bool = False,
    ):
        tokenizer.add_special_tokens({"additional_special_tokens": [audio_token]}, replace_extra_special_tokens=False)
        vocabulary = tokenizer.get_vocab()
        if not isinstance(instruction, str):
            raise ValueError(f"instruction is {instruction!r}; accepted: a string.")
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError(f"the tokenizer's model_max_length is {tokenizer.model_max_length!r}; accepted: a number.")
        for name, token in (("boa_token", boa_token), ("eoa_token", eoa_token)):
            if token not in vocabulary:
                raise ValueError(
                    f"{name} {token!r} is not one token of the tokenizer; choose one of its special tokens."
                )
        self.instruction = instruction
        self.leading_space = leading_space
        self.boa_token, self.boa_token_id = boa_token, vocabulary[boa_token]
        self.eoa_token, self.eoa_token_id = eoa_token, vocabulary[eoa_token]
        self.audio_token, self.audio_token_id = audio_token, vocabulary[audio_token]
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    # transformers names some of the arguments that are passed on here: mypy calls that another signature.
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "SeamProcessor":
        """Load a processor as transformers does, but raise a `ValueError` that names the file when one is damaged."""
        kwargs.pop("dtype", None)  # pipelines pass the model's; the tokenizer would save it
        if __name__ == "seam.processing_seam":  # or transformers would ask on the terminal whether to run unknown code
            importlib.import_module("seam.configuration_seam")
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        _check_features(pretrained_model_name_or_path, hub)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except Exception as error:
            _raise_for_damage(pretrained_model_name_or_path, hub, error)
            if isinstance(error, ValueError | OSError | ImportError):
                raise
            raise ValueError(  # whatever transformers says of settings of another type
                f"{pretrained_model_name_or_path}: processor_config.json or tokenizer_config.json describes no "
                f"processor: {' '.join(str(error).split()) or type(error).__name__}."
            ) from error

    @classmethod
    def from_backbones(cls, encoder: str, llm: str, **kwargs: Any) -> "SeamProcessor":
        """Combine the feature extractor of `encoder` with the tokenizer of `llm` (Hub ids or folders)."""
        return cls(AutoFeatureExtractor.from_pretrained(encoder), AutoTokenizer.from_pretrained(llm), **kwargs)

    @property
    def sampling_rate(self) -> int:
        """Return the sampling rate that the feature extractor expects, in Hz."""
        return self.feature_extractor.sampling_rate

    @property
    def max_seconds(self) -> float:
        """Return the length of the encoder's window, in seconds."""
        return self.feature_extractor.chunk_length

    @property
    def end_of_turn_id(self) -> int:
        """Return the id that ends the assistant's reply."""
        return self.tokenizer.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """Return the id that pads transcripts, which trainers of transformers look for here."""
        pad = self.tokenizer.pad_token_id
        return self.end_of_turn_id if pad is None else pad

    @property
    def model_input_names(self) -> list[str]:
        """Return the names of the model's inputs."""
        return ["input_features", "attention_mask", "input_ids", "prompt_input_ids", "prompt_attention_mask"]

    def lookup_excluded_ids(self, vocab_size: int) -> list[int]:
        """
        Return the ids that Stage 1 must not return.

        These are special tokens other than `<EOA>`, and ids of an embedding table of `vocab_size` rows that the
        tokenizer never uses: their rows are untrained and nearly identical. Among these are the bytes of SentencePiece
        whose characters are tokens.
        """
        vocabulary = self.tokenizer.get_vocab()
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder} - {self.eoa_token_id}
        twins = {i for token, i in vocabulary.items() if _character(token) in vocabulary}
        returnable = set(vocabulary.values()) - special - twins
        return [i for i in range(vocab_size) if i not in returnable]

    def vocabulary_fingerprint(self) -> str:
        """Return a digest of all tokens and their ids."""
        ids = sorted((i, token) for token, i in self.tokenizer.get_vocab().items())
        return hashlib.sha256(
            "".join(f"{i} {token}\n" for i, token in ids).encode("utf-8", "surrogatepass")
        ).hexdigest()

    def check_fits(self, config: Any) -> None:
        """
        Check that this processor belongs to the checkpoint with the given `SeamConfig`.

        Raises:
            ValueError: the vocabulary or the token ids differ, or the prompt from the one that the model was trained
                with.
        """
        for name in ("boa_token_id", "eoa_token_id", "audio_token_id"):
            if getattr(self, name) != getattr(config, name):
                raise ValueError(
                    f"the processor's {name} is {getattr(self, name)}, the model's {getattr(config, name)}: "
                    "tokenizer.json or processor_config.json belongs to another checkpoint."
                )
        if config.vocabulary_fingerprint not in (None, self.vocabulary_fingerprint()):
            raise ValueError(
                "the tokenizer's vocabulary is not the model's (config.vocabulary_fingerprint): tokenizer.json belongs "
                "to another checkpoint or was changed."
            )
        if config.prompt_token_ids is not None and self.prompt_ids() != list(config.prompt_token_ids):
            raise ValueError(
                "the processor's prompt is not the model's (config.prompt_token_ids): tokenizer.json, "
                "chat_template.jinja or processor_config.json belongs to another checkpoint or was changed."
            )

    # ---- audio ----

    def load_audio(self, source: AudioSource, sampling_rate: int | None = None, allow_cut: bool = True) -> np.ndarray:
        """
        Decode audio, mix it down to mono and resample it.

        Args:
            source: a path, a URL, the bytes of an audio file, a file object, a waveform of shape `(samples,)` or
                `(samples, channels)`, or a dict as `datasets` and the ASR pipeline make them: with `array` (or `raw`)
                and `sampling_rate`, or with `bytes` or `path`. Its decoder, which gives `["array"]` and
                `["sampling_rate"]`, is such a dict.
            sampling_rate: of a bare waveform, in Hz; by default the feature extractor's.
            allow_cut: whether a file that was cut short is decoded as far as it goes, with a warning.

        Returns:
            `np.ndarray` of shape `(samples,)`, float32, at `self.sampling_rate`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not audio, no samples, samples that are not finite or of an unknown scale, a shape or a rate
                that cannot be, or a file that was cut short, where that is not allowed.
        """
        name = str(source) if isinstance(source, (str, Path)) else f"the given {type(source).__name__}"
        if isinstance(getattr(source, "name", None), str) and hasattr(source, "read"):
            name = source.name
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            source = download(source)
        audio, is_dict = source, is_mapping(source)
        if is_dict:
            audio, sampling_rate = named_content(source, name)
        if hasattr(audio, "read"):
            audio = content_of(audio, name)
        if isinstance(audio, (str, Path, bytes)):
            decoded = decode(audio, name)
            waveform, sampling_rate = decoded.waveform, decoded.rate
            if decoded.cut:
                said = f"{name} is cut short: {decoded.cut}."
                if not allow_cut:
                    raise ValueError(said)
                logger.warning(said)
        else:
            waveform = waveform_of(audio, name, one_recording=is_dict)
            if sampling_rate is not None:
                sampling_rate = checked_rate(sampling_rate, name)
        if waveform.size == 0:
            raise ValueError(f"{name} holds no audio samples.")
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            waveform = librosa.resample(waveform, orig_sr=sampling_rate, target_sr=self.sampling_rate)
        return np.ascontiguousarray(waveform, dtype=np.float32)

    def split(self, waveform: np.ndarray) -> list[np.ndarray]:
        """
        Cut a waveform at `self.sampling_rate` into pieces that fit the encoder's window.

        Each cut is at the quietest interval near the end of the window. The pieces concatenate to the waveform.
        """
        window = int(self.max_seconds * self.sampling_rate)
        interval = int(CUT_INTERVAL_SECONDS * self.sampling_rate)
        pieces = []
        while len(waveform) > window:
            first = window - int(CUT_SEARCH_SHARE * window)
            power = np.convolve(waveform[first:window].astype(np.float64) ** 2, np.ones(interval), mode="valid")
            quietest = len(power) - 1 - int(power[::-1].argmin())  # the last of equals: speech soon follows the cut
            cut = first + quietest + interval // 2
            pieces.append(waveform[:cut])
            waveform = waveform[cut:]
        return [*pieces, waveform]

    # ---- prompt and transcript ----

    def prompt_ids(self, instruction: str | None = None) -> list[int]:
        """
        Return the ids of the prompt `[T, audio, <assistant>]` of Section 3.5, up to where the reply begins.

        The prompt is in the language model's own chat template. Training and inference both call this method.

        Args:
            instruction: the task instruction T. It may contain `self.audio_token` where the audio goes; by default the
                audio follows it.

        Raises:
            ValueError: the prompt has more than one audio token, the chat template drops it, or does not end.
        """
        instruction = self.instruction if instruction is None else instruction
        if self.audio_token not in instruction:
            instruction = f"{instruction}{self.audio_token}"

        def render() -> str:
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": instruction}],
                chat_template=self.chat_template,
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,  # so that hybrid models answer at once; other templates ignore it
            )

        text = _rendered(self.chat_template, render)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if ids.count(self.audio_token_id) != 1:
            raise ValueError(
                f"a prompt must contain {self.audio_token} exactly once, found {ids.count(self.audio_token_id)}."
            )
        return ids

    def transcript_ids(self, text: str) -> list[int]:
        """Return the ids of a transcript, as the function of the same name does."""
        return transcript_ids(self.tokenizer, text, self.leading_space)

    def labels(self, transcripts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the labels `(batch, tokens + 1)` of transcripts: ids and the end of the turn, padded with -100."""
        rows = [torch.tensor([*transcript, self.end_of_turn_id]) for transcript in transcripts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)

    def __call__(
        self,
        audio: AudioSource | list[AudioSource] | None = None,
        text: str | list[str] | None = None,
        sampling_rate: int | None = None,
        prompt: str | list[str] | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prepare audio, transcripts and prompts for the model.

        Args:
            audio: one audio source or a list of them (see `load_audio`), each at most `max_seconds` long.
            text: transcripts, one per audio.
            sampling_rate: of bare waveforms, in Hz.
            prompt: task instructions, one for all or one per audio; without it the model uses its default prompt.
            return_tensors: only `"pt"`.
            kwargs: options of other processors that change nothing here (`IGNORED_KEYWORDS`), or `None`.

        Returns:
            `BatchFeature` with
            - of audio, `input_features` `(batch, n_mels, frames)` and `attention_mask` `(batch, frames)`, 1 where there
              is audio;
            - of text, `labels` `(batch, tokens + 1)`: ids and the end of the turn, padded on the right with -100;
            - of prompts, `prompt_input_ids` and `prompt_attention_mask` `(batch, prompt)`, padded on the left; and
              `input_ids` `(batch, 0)`, what the ids of `generate` begin with: nothing, so that a script which cuts off
              `input_ids.shape[1]` ids, as other models need it, has the transcript as well.

        Raises:
            ValueError: for audio longer than the window (see `split`), or unreadable audio.
            TypeError: for an unknown keyword.
        """
        _check_keywords(kwargs)
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; accepted: 'pt'.")
        if audio is None and text is None:
            raise ValueError("give audio, text or both.")
        data: dict[str, torch.Tensor] = {}
        if audio is not None:
            waveforms = [self.load_audio(one, sampling_rate) for one in _listed(audio)]
            data |= self._features(waveforms)
            if prompt is not None:
                data |= self._prompts(prompt, len(waveforms))
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            data["labels"] = self.labels([self.transcript_ids(one) for one in texts])
        return BatchFeature(data)

    def _features(self, waveforms: list[np.ndarray]) -> dict[str, torch.Tensor]:
        for waveform in waveforms:
            if len(waveform) > self.max_seconds * self.sampling_rate:
                raise ValueError(
                    f"audio of {len(waveform) / self.sampling_rate:.1f} s is longer than the encoder's window of "
                    f"{self.max_seconds} s; cut it with SeamProcessor.split."
                )
        features = self.feature_extractor(
            waveforms, sampling_rate=self.sampling_rate, return_attention_mask=True, return_tensors="pt"
        )
        return {"input_features": features.input_features, "attention_mask": features.attention_mask.long()}

    def _prompts(self, prompt: str | list[str], n: int) -> dict[str, torch.Tensor]:
        prompts = [prompt] * n if isinstance(prompt, str) else prompt
        if len(prompts) != n:
            raise ValueError(f"{n} audio inputs but {len(prompts)} prompts.")
        rows = [torch.tensor(self.prompt_ids(one)) for one in prompts]
        longest = max(map(len, rows))
        pad = self.pad_token_id
        return {
            "input_ids": torch.zeros(n, 0, dtype=torch.long),
            "prompt_input_ids": torch.stack(
                [torch.nn.functional.pad(r, (longest - len(r), 0), value=pad) for r in rows]
            ),
            "prompt_attention_mask": torch.stack(
                [torch.nn.functional.pad(torch.ones_like(r), (longest - len(r), 0)) for r in rows]
            ),
        }

    def apply_transcription_request(
        self, audio: AudioSource | list[AudioSource], prompt: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """
        Prepare all that `generate` needs to transcribe `audio`; `prompt` replaces the default instruction.

        `generate` returns the transcript alone, and `input_ids` are of no length: with and without
        `ids[:, inputs.input_ids.shape[1] :]` it is the same.
        """
        return self(audio=audio, prompt=self.instruction if prompt is None else prompt, **kwargs)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Turn ids `(batch, tokens)` into texts; ids below 0 are padding, as in labels."""
        return [self.decode(ids, **kwargs) for ids in sequences]

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Turn ids `(tokens,)` into text, or `(batch, tokens)` into texts; ids below 0 are padding, as in labels."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, (list, tuple)):
            if any(hasattr(one, "__len__") for one in ids):
                return self.batch_decode(ids, **kwargs)
            ids = [one for one in ids if one >= 0]
        return self._without_leading_space(self.tokenizer.decode(ids, **{"skip_special_tokens": True, **kwargs}))

    def _without_leading_space(self, text: str) -> str:
        return text.removeprefix(" ") if self.leading_space else text


def _check_features(name: str | Path, hub: dict[str, Any]) -> None:
    """Raise `ValueError` for features of sizes beyond any model, for which tables would be computed at once."""
    for file in ("processor_config.json", "preprocessor_config.json"):
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        if path is None:
            continue
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            continue  # damaged, which has its own message
        features = settings.get("feature_extractor", settings) if isinstance(settings, dict) else {}
        for field, most in MOST_FEATURES.items():
            value = features.get(field) if isinstance(features, dict) else None
            if value is not None and not (type(value) in (int, float) and 0 < value <= most):
                raise ValueError(f"{path}: {field} is {str(value)[:40]}; accepted: above 0, up to {most}.")


def _rendered(template: Any, render: Callable[[], str]) -> str:
    """
    Return what a chat template writes.

    The first time its steps are counted: one of an unknown checkpoint might never end. A power of numbers, which no
    prompt needs, cannot be interrupted: it is refused before anything is computed.

    Raises:
        ValueError: when it does not end, or writes far more than a prompt.
    """
    if template in _TEMPLATES_THAT_END or not isinstance(template, str):
        return render()
    from jinja2 import Environment  # comes with torch; what renders templates imports it, too

    endless = ValueError(
        "chat_template.jinja does not end, or writes more than a prompt; accepted: up to "
        f"{MOST_STEPS:,} steps and {MOST_CHARACTERS:,} characters, and no powers of numbers."
    )
    tokens = [(kind, value) for _, kind, value in Environment().lex(template) if kind != "whitespace"]
    for before, (kind, value), after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if kind == "operator" and (value == "**" or value == "*" and "string" in (before[0], after[0])):
            raise endless
    left, most_memory = MOST_STEPS, _peak_memory() + MOST_MEMORY

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0 or _peak_memory() > most_memory:
            raise _Endless
        return step

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return step if frame.f_code.co_filename.endswith(RENDERING) else None

    tracing = sys.gettrace()
    sys.settrace(enter)
    try:
        text = render()
    except (_Endless, MemoryError, OverflowError, RecursionError) as error:
        raise endless from error
    except ValueError:
        raise
    except Exception as error:  # whatever the template does wrong
        raise ValueError(f"chat_template.jinja cannot be rendered: {' '.join(str(error).split())}.") from error
    finally:
        sys.settrace(tracing)
    if len(text) > MOST_CHARACTERS:
        raise endless
    _TEMPLATES_THAT_END.add(template)
    return text


def _peak_memory() -> int:
    """Return the most memory that this process has had, in KiB on Linux; 0 where the system does not say."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _Endless(BaseException):
    """Too many steps; no template catches it."""


def transcript_ids(tokenizer: PreTrainedTokenizerBase, text: str, leading_space: bool = False) -> list[int]:
    """
    Return the ids of a transcript without any end token, as in Stage 1's targets and in the assistant's reply.

    Args:
        text: an empty one, of audio without speech, has no ids.
        leading_space: see [`SeamProcessor`].
    """
    text = text.strip()
    if leading_space and text and not _writes_space(tokenizer):
        text = f" {text}"
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def _writes_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer itself puts a space before a text, as most of SentencePiece's do."""
    first = tokenizer("a", add_special_tokens=False).input_ids[:1]
    return "".join(tokenizer.convert_ids_to_tokens(first)).startswith(SPACES)


def _character(token: str) -> str | None:
    """Return the character of SentencePiece's token of a byte, as that vocabulary spells it; `None` for others."""
    if not re.fullmatch("<0x[0-7][0-9A-F]>", token):
        return None
    return bytes.fromhex(token[3:5]).decode().replace(" ", SPACES[0])


def _check_keywords(given: Mapping[str, Any]) -> None:
    """Raise `TypeError` for a keyword that would be ignored though it means something, naming the nearest known one."""
    known = ["audio", "text", "sampling_rate", "prompt", "return_tensors"]
    for name, value in given.items():
        if value is not None and name not in IGNORED_KEYWORDS:
            close = difflib.get_close_matches(ALIASES.get(name, name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"accepted: {', '.join(known)}."
            raise TypeError(f"SeamProcessor got an unexpected keyword {name!r}; {hint}")


def _listed(audio: Any) -> Sequence[AudioSource]:
    """Return a list of audio sources, which a single source and a list of numbers (a waveform) are not yet."""
    is_list = isinstance(audio, (list, tuple))
    if is_list and not audio:
        raise ValueError("the list of audio inputs is empty.")
    return audio if is_list and not isinstance(audio[0], (int, float, np.number)) else [audio]


def _raise_for_damage(name: str | Path, hub: dict[str, Any], error: Exception) -> None:
    """Raise an error that names the file that made loading fail: one that is missing or cannot be parsed."""
    for file in PROCESSOR_FILES:
        found = cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        if found is None:
            if file in ("processor_config.json", "tokenizer.json"):
                raise OSError(f"{name} lacks {file}, or cannot be reached.") from error
            continue
        try:
            content = Path(found).read_text(encoding="utf-8")
            damaged = file.endswith(".json") and not isinstance(json.loads(content), dict)
        except ValueError:
            damaged = True
        if damaged:
            raise ValueError(f"{found} is damaged: {type(error).__name__}: {error}") from error


SeamProcessor.register_for_auto_class()  # saving a processor copies this file too
