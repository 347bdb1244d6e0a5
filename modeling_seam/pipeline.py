"""`pipeline("automatic-speech-recognition", model=…)`, of a name (`trust_remote_code=True`) or of a loaded model."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from transformers import AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.automatic_speech_recognition import AutomaticSpeechRecognitionPipeline
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

logger = logging.get_logger(__name__)

TASK = "automatic-speech-recognition"

# Batches whose pieces are sorted by length at a time: not all audio of a long list of paths is in memory at once.
SORTED_BATCHES = 16


class SeamPipeline(ChunkPipeline):
    """
    Transcribe audio of any kind, rate and length to `{"text": transcript}`.

    It takes what `SeamProcessor.load_audio` takes, a list of these, or a generator, whose items it transcribes one by
    one. Audio longer than the encoder's window is cut at quiet places (`SeamProcessor.split`), without overlap, so that
    no word comes twice. `batch_size` counts these pieces, which are batched across files: those of a list by length, so
    that there is little padding, those of a generator or a dataset as they come.

    Args:
        processor ([`SeamProcessor`], *optional*): by default the one of the model's checkpoint.
        tokenizer, feature_extractor (*optional*): of that processor, as Whisper's pipeline takes them.
        kwargs: of `transformers.Pipeline`, and those of a call.

    Args of a call:
        prompt (`str`, *optional*): task instruction, instead of the model's.
        sampling_rate (`int`, *optional*): of bare waveforms, in Hz.
        generate_kwargs (`dict`, *optional*) and its keys: of `SeamForSpeechRecognition.generate`.
        chunk_length_s, stride_length_s, ignore_warning (*optional*): without effect.
    """

    processor: Any
    model: Any
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False

    def __init__(self, model: Any, processor=None, tokenizer=None, feature_extractor=None, **kwargs):
        if processor is None:
            processor = _processor_of(model)
        for name, given in (("tokenizer", tokenizer), ("feature_extractor", feature_extractor)):
            if given is not None and given is not processor and not _is_same(given, getattr(processor, name)):
                raise ValueError(
                    f"{name}: it is not the one of the model's processor; leave it out, or give processor."
                )
        processor.check_fits(model.config)
        super().__init__(model, processor=processor, **kwargs)
        # Batches are collated by the feature extractor, not beside a tokenizer that pads on the other side.
        self.tokenizer = None

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save the model, its code and the processor: a folder that `pipeline` loads."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(
        self,
        prompt: str | None = None,
        sampling_rate: int | None = None,
        generate_kwargs: dict | None = None,
        return_timestamps: bool | str | None = None,
        return_language: bool | None = None,
        chunk_length_s: float | None = None,
        stride_length_s: Any = None,
        ignore_warning: bool | None = None,
        **kwargs,
    ) -> tuple[dict, dict, dict]:
        if return_timestamps:
            raise ValueError("return_timestamps: SEAM outputs tokens, not times; leave it out.")
        if return_language:
            raise ValueError("return_language: SEAM does not say which language it hears; leave it out.")
        if (chunk_length_s or stride_length_s) and not ignore_warning:
            logger.warning_once(
                "chunk_length_s, stride_length_s: without effect, for long audio is cut at quiet places by itself."
            )
        forward = {**(generate_kwargs or {}), **kwargs}
        if forward.get("num_return_sequences") not in (None, 1):
            raise ValueError(
                f"num_return_sequences is {forward['num_return_sequences']!r}, but the pipeline returns one transcript "
                "of each recording; accepted: 1. SeamForSpeechRecognition.generate returns several."
            )
        preprocess = {"prompt": prompt, "sampling_rate": sampling_rate}
        return {k: v for k, v in preprocess.items() if v is not None}, forward, {}

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params: dict, *other_params: dict
    ) -> Iterable[dict[str, str]]:
        """Yield results; those of a list batch its pieces by length."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; accepted: whole numbers from 1.")
        if not isinstance(inputs, list) or batch_size == 1:
            return super().get_iterator(inputs, num_workers, batch_size, preprocess_params, *other_params)
        rate = preprocess_params.get("sampling_rate")
        pieces = (
            (source_index, index, piece)
            for source_index, source in enumerate(inputs)
            for index, piece in enumerate(self.processor.split(self.processor.load_audio(source, rate)))
        )
        preprocess_params = {**preprocess_params, "sampling_rate": None}  # the pieces are resampled already
        texts: list[dict[int, str]] = [{} for _ in inputs]
        # The longest first: what does not fit into memory fails early.
        while group := sorted(islice(pieces, SORTED_BATCHES * batch_size), key=lambda one: len(one[-1]), reverse=True):
            audio = [piece for *_, piece in group]
            outputs = super().get_iterator(audio, num_workers, batch_size, preprocess_params, *other_params)
            for (source_index, index, _), output in zip(group, outputs, strict=True):
                texts[source_index][index] = output["text"]
        return [{"text": _join(text for _, text in sorted(one.items()))} for one in texts]

    def preprocess(  # type: ignore[override]  # as any `ChunkPipeline`
        self, inputs, prompt: str | None = None, sampling_rate: int | None = None
    ) -> Iterator[dict]:
        """Yield the inputs of every piece of one recording."""
        pieces = self.processor.split(self.processor.load_audio(inputs, sampling_rate))
        for index, piece in enumerate(pieces):
            yield {"is_last": index == len(pieces) - 1, **self.processor(audio=piece, prompt=prompt)}

    def _forward(self, input_tensors: Any, **generate_kwargs) -> Any:
        is_last = input_tensors.pop("is_last")
        input_tensors["input_features"] = input_tensors["input_features"].to(self.model.dtype)
        output = self.model.generate(**input_tensors, **generate_kwargs)
        sequences = getattr(output, "sequences", output)
        pieces = len(input_tensors["input_features"])
        if len(sequences) != pieces:  # as a generation config says; the rows would go to other recordings
            raise ValueError(
                f"{len(sequences)} transcripts of {pieces} pieces of audio: set num_return_sequences of the generation "
                "config to 1."
            )
        return {"is_last": is_last, "sequences": sequences}

    def postprocess(self, model_outputs: Any, **postprocess_parameters) -> dict[str, str]:
        """Join the transcripts of one recording's pieces."""
        return {"text": _join(text for one in model_outputs for text in self.processor.batch_decode(one["sequences"]))}


def _join(texts: Iterable[str]) -> str:
    return " ".join(filter(None, map(str.strip, texts)))


def _processor_of(model: Any) -> Any:
    """Return the processor that lies where a model was loaded from."""
    name = model.config._name_or_path
    if not name:
        raise ValueError("processor: this model was loaded from no checkpoint that has one; give processor.")
    return AutoProcessor.from_pretrained(
        name,
        revision=getattr(model.config, "_commit_hash", None),
        # The model's own code is from there already, and then its processor's is.
        trust_remote_code=type(model).__module__.startswith("transformers_modules."),
    )


def _is_same(given: Any, own: Any) -> bool:
    """Return whether a tokenizer or feature extractor is the processor's, or equal to it."""
    if given is own:
        return True
    if hasattr(own, "get_vocab"):
        return hasattr(given, "get_vocab") and given.get_vocab() == own.get_vocab()
    return type(given) is type(own) and given.to_dict() == own.to_dict()


class SpeechRecognition(AutomaticSpeechRecognitionPipeline):
    """
    What `pipeline` makes for speech recognition once this code is loaded: a [`SeamPipeline`] of a SEAM model.

    Given a loaded model rather than a name, `pipeline` does not read which pipeline its config names. Other models have
    the pipeline that they had.

    Args:
        model: loaded.
        kwargs: of the pipeline.
    """

    before: Any = AutomaticSpeechRecognitionPipeline
    # Not required, for a SEAM model's processor has them.
    _load_tokenizer: Any = None
    _load_feature_extractor: Any = None

    def __new__(cls, model: Any, **kwargs):
        """Return the pipeline of the model."""
        # Of the same code as the model, where that was loaded twice. A wrapped model has a class of others.
        is_own = type(model).__module__.rpartition(".")[0] == __name__.rpartition(".")[0]
        if is_own or (model.config.model_type == "seam" and not hasattr(cls.before, "before")):
            return SeamPipeline(model, **kwargs)
        for name in ("tokenizer", "feature_extractor"):
            if kwargs.get(name) is None and getattr(cls.before, f"_load_{name}"):
                raise ValueError(f"{name}: {model.config._name_or_path or 'the model'} has none that loads; give one.")
        return cls.before(model, **kwargs)


_entry: dict[str, Any] = PIPELINE_REGISTRY.supported_tasks[TASK]
if isinstance(
    _entry["impl"], type
):  # not the name of transformers' own, which newer versions look up when it is asked for
    SpeechRecognition.before = _entry["impl"]
_entry["impl"] = SpeechRecognition
