"""Transcribe any audio with a model and its processor: the path of the command line and of every evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

from seam.data.dataset import batches_by_length
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor


@dataclass(frozen=True)
class Transcription:
    """
    Args:
        seconds: length of the audio.
        stage1: what the alignment decoder heard (Algorithm 1); empty where the bridge has no Stage 1.
        text: the transcript (Algorithm 2, or Stage 1's with `use_llm=False`).
        stage1_tokens, tokens: the ids of both, without special tokens: what the texts were decoded from.
        embeddings: number of embeddings that the language model was given for the audio; 0 for a Whisper.
    """

    seconds: float
    stage1: str
    text: str
    stage1_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    embeddings: int


def load_checkpoint(name: str, **kwargs) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """
    Model and processor of a folder or a Hub id. `kwargs`: of `PreTrainedModel.from_pretrained`.

    Raises:
        OSError: when it cannot be found; ValueError: when it is no SEAM checkpoint, or not a whole one.
    """
    try:
        model = SeamForSpeechRecognition.from_pretrained(name, **kwargs).eval()  # first: it names other architectures
        processor = SeamProcessor.from_pretrained(name)
    except OSError as error:
        raise OSError(f"cannot load the checkpoint {name!r}: {error}") from error
    processor.check_fits(model.config)
    return model, processor


def load_whisper(name: str, **kwargs) -> tuple[WhisperForConditionalGeneration, SeamProcessor]:
    """
    A Whisper checkpoint with its own decoder, of a folder or a Hub id, to be transcribed with beside SEAM.

    Args:
        kwargs: of `PreTrainedModel.from_pretrained`.
    """
    model = WhisperForConditionalGeneration.from_pretrained(name, **kwargs).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    ends = model.generation_config.decoder_start_token_id, tokenizer.eos_token_id
    start, end = tokenizer.convert_ids_to_tokens(list(ends))
    feature_extractor = AutoFeatureExtractor.from_pretrained(name)
    return model, SeamProcessor(feature_extractor, tokenizer, boa_token=start, eoa_token=end)


def transcribe(
    model: SeamForSpeechRecognition | WhisperForConditionalGeneration,
    processor: SeamProcessor,
    sources: Sequence,
    batch_size: int = 8,
    progress: bool = False,
    **generate_kwargs,
) -> list[Transcription]:
    """
    Transcribe audio of any length: longer audio than the window is cut at quiet places and the texts are joined.
    Pieces of like length are decoded together, the longest first: they are padded little, and what does not fit into
    memory fails at once.

    Args:
        model, processor: of one checkpoint.
        sources: what `SeamProcessor.load_audio` takes.
        generate_kwargs: of the model's `generate`.

    Returns:
        one per source, in their order.
    """
    waveforms = [processor.load_audio(source) for source in sources]
    pieces = [(owner, piece) for owner, waveform in enumerate(waveforms) for piece in processor.split(waveform)]
    batches = batches_by_length([len(piece) for _, piece in pieces], batch_size)
    decoded = [None] * len(pieces)
    added = processor.tokenizer.added_tokens_decoder.items()
    special = {*processor.tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)}
    generate = _generate_whisper if isinstance(model, WhisperForConditionalGeneration) else _generate
    model.eval()
    for batch in tqdm(batches, desc="transcribing", leave=False, disable=not progress):
        inputs = processor(audio=[pieces[place][1] for place in batch]).to(model.device)
        with torch.no_grad():
            alignments, sequences, embeddings = generate(model, inputs, **generate_kwargs)
        for place, *outputs in zip(batch, alignments, sequences, embeddings, strict=True):
            decoded[place] = outputs
    heard, written, counts = [[] for _ in sources], [[] for _ in sources], [0] * len(sources)
    for (owner, _), (alignment, sequence, count) in zip(pieces, decoded, strict=True):
        counts[owner] += count
        heard[owner].append(tuple(token_id for token_id in alignment if token_id not in special))
        written[owner].append(tuple(token_id for token_id in sequence if token_id not in special))

    def join(rows: list[tuple[int, ...]]) -> str:
        return " ".join(filter(None, (text.strip() for text in processor.batch_decode(rows))))

    return [
        Transcription(len(waveform) / processor.sampling_rate, join(h), join(w), sum(h, ()), sum(w, ()), count)
        for waveform, h, w, count in zip(waveforms, heard, written, counts, strict=True)
    ]


def _generate(model: SeamForSpeechRecognition, inputs, **kwargs) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Ids of Stage 1, where there is one, and of the transcripts, and the number of embeddings."""
    output = model.generate(**inputs, return_dict_in_generate=True, **kwargs)
    sequences, counts = output.sequences.tolist(), output.alignment_mask.sum(-1).tolist()
    if output.alignment_sequences is None:
        return [[]] * len(sequences), sequences, counts
    alignments = output.alignment_sequences.masked_fill(output.alignment_mask == 0, model.config.eoa_token_id)
    return alignments.tolist(), sequences, counts


def _generate_whisper(model: WhisperForConditionalGeneration, inputs, **kwargs):
    """The same of a Whisper, which has no Stage 1. A multilingual one is told the language: it would guess."""
    if getattr(model.generation_config, "is_multilingual", False):
        kwargs = {"language": "en", "task": "transcribe", **kwargs}
    sequences = model.generate(inputs["input_features"].to(model.dtype), **kwargs).tolist()
    return [[]] * len(sequences), sequences, [0] * len(sequences)
