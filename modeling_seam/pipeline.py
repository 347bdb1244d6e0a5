"""`pipeline("automatic-speech-recognition", model=…, trust_remote_code=True)`."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from transformers.pipelines.base import ChunkPipeline

# Batches whose pieces are sorted by length at a time: not all audio of a long list of paths is in memory at once.
SORTED_BATCHES = 16


class SeamPipeline(ChunkPipeline):
    """
    Transcribe audio of any kind, rate and length to `{"text": transcript}`.

    It takes what `SeamProcessor.load_audio` takes, a list of these, or a generator, whose items it transcribes one by
    one. Audio longer than the encoder's window is cut at quiet places (`SeamProcessor.split`), without overlap, so that
    no word comes twice. `batch_size` counts these pieces, which are batched across files: those of a list by length, so
    that there is little padding, those of a generator or a dataset as they come.

    Args of a call:
        prompt (`str`, *optional*): task instruction, instead of the model's.
        sampling_rate (`int`, *optional*): of bare waveforms, in Hz.
        generate_kwargs (`dict`, *optional*) and its keys: of `SeamForSpeechRecognition.generate`.
    """

    processor: Any
    model: Any
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.processor.check_fits(self.model.config)
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
        return_timestamps: bool | None = None,
        **kwargs,
    ) -> tuple[dict, dict, dict]:
        if return_timestamps:
            raise ValueError("return_timestamps: SEAM outputs tokens, not times; leave it out.")
        for name in ("chunk_length_s", "stride_length_s"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name}: long audio is cut at quiet places by itself; leave it out.")
        preprocess = {"prompt": prompt, "sampling_rate": sampling_rate}
        return {k: v for k, v in preprocess.items() if v is not None}, {**(generate_kwargs or {}), **kwargs}, {}

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params: dict, *other_params: dict
    ) -> Iterable[dict[str, str]]:
        """Yield results; those of a list batch its pieces by length."""
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
        sequences = self.model.generate(**input_tensors, **generate_kwargs)
        return {"is_last": is_last, "sequences": getattr(sequences, "sequences", sequences)}

    def postprocess(self, model_outputs: Any, **postprocess_parameters) -> dict[str, str]:
        """Join the transcripts of one recording's pieces."""
        return {"text": _join(text for one in model_outputs for text in self.processor.batch_decode(one["sequences"]))}


def _join(texts: Iterable[str]) -> str:
    return " ".join(filter(None, map(str.strip, texts)))
