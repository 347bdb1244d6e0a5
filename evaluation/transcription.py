"""Transcribe audio of any length with a model and its processor, for the command line and every evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

from seam.data.dataset import batches_by_length
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor

# Batches of recordings that are read before their results are given: enough of them to find some of like length.
GROUP_BATCHES = 8


@dataclass(frozen=True)
class Transcription:
    """
    The transcript of one audio.

    Args:
        seconds: length of the audio.
        stage1: the text of Stage 1 (Algorithm 1); empty if the bridge has no Stage 1.
        text: the transcript (Algorithm 2, or Stage 1's with `use_llm=False`).
        stage1_tokens, tokens: the ids from which the two texts were decoded, without special tokens.
        embeddings: number of embeddings that the language model was given for the audio; 0 for a Whisper.
    """

    seconds: float
    stage1: str
    text: str
    stage1_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    embeddings: int


def load_whisper(name: str, **kwargs) -> tuple[WhisperForConditionalGeneration, SeamProcessor]:
    """
    Load a Whisper checkpoint with its own decoder, to compare SEAM with it.

    Args:
        name: a folder or a Hub id.
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
    Transcribe audio of any length.

    Audio that is longer than the window is cut where it is quiet, and the texts of the pieces are joined. Pieces of
    similar length are decoded together, the longest first: they need little padding, and what does not fit into memory
    fails at once.

    Args:
        model, processor: of one checkpoint.
        sources: each of them what `SeamProcessor.load_audio` takes.
        batch_size: pieces of audio decoded at once.
        progress: whether to show a progress bar.
        generate_kwargs: of the model's `generate`.

    Returns:
        One per source, in their order.
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
        inputs = processor(audio=[pieces[index][1] for index in batch]).to(model.device)
        with torch.no_grad():
            alignments, sequences, embeddings = generate(model, inputs, **generate_kwargs)
        for index, *outputs in zip(batch, alignments, sequences, embeddings, strict=True):
            decoded[index] = outputs
    stage1, transcripts, counts = [[] for _ in sources], [[] for _ in sources], [0] * len(sources)
    for (owner, _), (alignment, sequence, count) in zip(pieces, decoded, strict=True):
        counts[owner] += count
        stage1[owner].append(tuple(token_id for token_id in alignment if token_id not in special))
        transcripts[owner].append(tuple(token_id for token_id in sequence if token_id not in special))

    def join(rows: list[tuple[int, ...]]) -> str:
        return " ".join(filter(None, (text.strip() for text in processor.batch_decode(rows))))

    return [
        Transcription(
            len(waveform) / processor.sampling_rate, join(before), join(after), sum(before, ()), sum(after, ()), count
        )
        for waveform, before, after, count in zip(waveforms, stage1, transcripts, counts, strict=True)
    ]


def transcribe_each(
    model: SeamForSpeechRecognition | WhisperForConditionalGeneration,
    processor: SeamProcessor,
    sources: Sequence,
    batch_size: int = 8,
    **kwargs,
) -> Iterator[Transcription | Exception]:
    """
    Transcribe recordings and yield one result after the other, in order; for one that cannot be read, its error.

    Args:
        model, processor, sources, batch_size: of `transcribe`, which is given `GROUP_BATCHES` batches at a time.
        kwargs: of `transcribe`.
    """
    for start in range(0, len(sources), GROUP_BATCHES * batch_size):
        read: list[np.ndarray | Exception] = []
        for source in sources[start : start + GROUP_BATCHES * batch_size]:
            try:
                read.append(processor.load_audio(source))
            except (OSError, ValueError) as error:
                read.append(error)
        waveforms = [one for one in read if not isinstance(one, Exception)]
        results = iter(transcribe(model, processor, waveforms, batch_size, **kwargs) if waveforms else [])
        for one in read:
            yield one if isinstance(one, Exception) else next(results)


def _generate(model: SeamForSpeechRecognition, inputs, **kwargs) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Return the ids of Stage 1, if there is one, and of the transcripts, and the numbers of embeddings."""
    kwargs = {"num_return_sequences": 1, **kwargs}  # whatever the checkpoint says: a transcript of each
    output = model.generate(**inputs, return_dict_in_generate=True, **kwargs)
    sequences, counts = output.sequences.tolist(), output.alignment_mask.sum(-1).tolist()
    if output.alignment_sequences is None:
        return [[]] * len(sequences), sequences, counts
    alignments = output.alignment_sequences.masked_fill(output.alignment_mask == 0, model.config.eoa_token_id)
    return alignments.tolist(), sequences, counts


def _generate_whisper(model: WhisperForConditionalGeneration, inputs, **kwargs):
    """Return the same for a Whisper. A multilingual one is told the language, which it would otherwise guess."""
    if getattr(model.generation_config, "is_multilingual", False):
        kwargs = {"language": "en", "task": "transcribe", **kwargs}
    sequences = model.generate(inputs["input_features"].to(model.dtype), **kwargs).tolist()
    return [[]] * len(sequences), sequences, [0] * len(sequences)
