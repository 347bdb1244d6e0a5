"""`pipeline("automatic-speech-recognition", model=…, trust_remote_code=True)`."""

from collections.abc import Iterator

from transformers.pipelines.base import ChunkPipeline


class SeamPipeline(ChunkPipeline):
    """
    Audio of any kind, rate and length to `{"text": transcript}`.

    It takes what `SeamProcessor.load_audio` takes, a list of them, or a generator, which it answers one by one. Audio
    longer than the encoder's window is cut at quiet places (`SeamProcessor.split`): no overlap, so that no word comes
    twice. `batch_size` counts these pieces, which are batched across files.

    Args of a call:
        prompt (`str`, *optional*): task instruction, instead of the model's.
        sampling_rate (`int`, *optional*): of bare waveforms, in Hz.
        generate_kwargs (`dict`, *optional*) and its keys: of `SeamForSpeechRecognition.generate`.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.processor.check_fits(self.model.config)
        # Batches are collated by the feature extractor, not beside a tokenizer that pads on the other side.
        self.tokenizer = None

    def save_pretrained(self, save_directory, **kwargs):
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
            raise ValueError("return_timestamps: SEAM writes tokens, not times; leave it out.")
        for name in ("chunk_length_s", "stride_length_s"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name}: long audio is cut at quiet places by itself; leave it out.")
        preprocess = {"prompt": prompt, "sampling_rate": sampling_rate}
        return {k: v for k, v in preprocess.items() if v is not None}, {**(generate_kwargs or {}), **kwargs}, {}

    def preprocess(self, inputs, prompt: str | None = None, sampling_rate: int | None = None) -> Iterator[dict]:
        pieces = self.processor.split(self.processor.load_audio(inputs, sampling_rate))
        for index, piece in enumerate(pieces):
            yield {"is_last": index == len(pieces) - 1, **self.processor(audio=piece, prompt=prompt)}

    def _forward(self, model_inputs: dict, **generate_kwargs) -> dict:
        is_last = model_inputs.pop("is_last")
        model_inputs["input_features"] = model_inputs["input_features"].to(self.model.dtype)
        sequences = self.model.generate(**model_inputs, **generate_kwargs)
        return {"is_last": is_last, "sequences": getattr(sequences, "sequences", sequences)}

    def postprocess(self, model_outputs: list[dict]) -> dict[str, str]:
        texts = [text.strip() for one in model_outputs for text in self.processor.batch_decode(one["sequences"])]
        return {"text": " ".join(filter(None, texts))}
