"""Explain one transcript: where Stage 1 attended, how sure it was of each token, and what the LLM changed."""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import kaldialign
import librosa
import numpy as np
import torch

from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor

EOA = "<EOA>"
_NO_TOKEN = -1  # is no token id


class Change(StrEnum):
    """What the LLM did with a token of Stage 1, of which it is given the first (First Token Guidance, Eq. 6)."""

    GIVEN = "given"
    KEPT = "kept"
    SUBSTITUTED = "substituted"
    INSERTED = "inserted"
    DELETED = "deleted"


@dataclass(frozen=True)
class Token:
    """A token and its text, including a leading space; `<EOA>` is the text of the end token."""

    id: int
    text: str


@dataclass(frozen=True)
class Stage1Token(Token):
    """
    A token of Stage 1.

    Args:
        distance: from the predicted embedding to this token's (Eq. 7).
        runner_up, runner_up_distance: the next nearest token (Eq. 8).
        start, end: its span of the audio in seconds (see `token_spans`); None for `<EOA>`, which has none.
    """

    distance: float
    runner_up: Token
    runner_up_distance: float
    start: float | None
    end: float | None


@dataclass(frozen=True)
class Edit:
    """
    One edit from Stage 1's tokens to the transcript's.

    Args:
        change: None for `<EOA>`, which the LLM does not see, and for every token if there is no LLM.
        stage1_index: of Stage 1's token, None for an insertion.
        index: of the transcript's token, None for a deletion and where `change` is None.
    """

    change: Change | None
    stage1_index: int | None
    index: int | None


@dataclass(frozen=True, eq=False)
class Explanation:
    """
    How one utterance was transcribed.

    Args:
        seconds: length of the audio.
        stage1: the text of Stage 1.
        text: the transcript, with First Token Guidance.
        stage1_tokens: Stage 1's tokens, `<EOA>` being the last unless the aligner ran out of positions.
        tokens: the transcript's tokens.
        edits: from `stage1_tokens` to `tokens`, in order.
        ended: whether Stage 1 ended with `<EOA>` before the aligner ran out of positions.
        attention (`np.ndarray` of shape `(layers, tokens, speech)`): the aligner's cross-attention, averaged over the
            heads: the weights with which each of `stage1_tokens` was predicted. Every row sums to 1.
        state_seconds: length of the audio that one speech state covers.
        log_mel (`np.ndarray` of shape `(n_mels, frames)`): the encoder's input, up to the audio's end.
        frame_seconds: length of the audio that one frame covers.
    """

    seconds: float
    stage1: str
    text: str
    stage1_tokens: tuple[Stage1Token, ...]
    tokens: tuple[Token, ...]
    edits: tuple[Edit, ...]
    ended: bool
    attention: np.ndarray
    state_seconds: float
    log_mel: np.ndarray
    frame_seconds: float


def explain(model: SeamForSpeechRecognition, processor: SeamProcessor, audio) -> Explanation:
    """
    Transcribe one utterance as `generate` does by default, and record how the transcript came about.

    Args:
        model, processor: of one checkpoint.
        audio: what `SeamProcessor.load_audio` takes, at most as long as the encoder's window.

    Raises:
        ValueError: when the audio is too long or cannot be read, or the model's bridge is not the aligner.
    """
    if model.config.bridge != "aligner":
        raise ValueError(f"the bridge {model.config.bridge!r} has no cross-attention to tokens; only the aligner has.")
    waveform = processor.load_audio(audio)
    seconds = len(waveform) / processor.sampling_rate
    if seconds > processor.max_seconds:
        raise ValueError(
            f"{seconds:.1f} s of audio: one utterance of at most {processor.max_seconds} s can be explained."
        )
    inputs = processor(audio=waveform).to(model.device)
    model.eval()
    with torch.no_grad():
        states, mask = model.encode(**inputs)
        output = model.generate(speech_states=states, speech_mask=mask, return_dict_in_generate=True)
        ids = output.alignment_sequences
        labels = torch.nn.functional.pad(ids, (0, 1), value=model.config.eoa_token_id)
        with _eager_attention(model.bridge):
            aligner = model(
                labels=labels, speech_states=states, speech_mask=mask, use_llm=False, output_attentions=True
            )
    ended = ids.shape[1] < model.config.max_alignment_tokens
    if ended:
        ids = labels
    count = ids.shape[1]
    attention = torch.stack([layer[0].float().mean(0).cpu() for layer in aligner.cross_attentions])[:, :count]

    stage1_ids = output.alignment_sequences[0].tolist()
    special = set(processor.tokenizer.all_special_ids)
    transcript_ids = [token_id for token_id in output.sequences[0].tolist() if token_id not in special]
    seconds = len(waveform) / processor.sampling_rate
    state_seconds = processor.max_seconds / model.config.audio_config.max_source_positions
    # The aligner may attend beyond the audio, to a margin or all of the window, where no token can be.
    within = attention.mean(0)[: len(stage1_ids), : math.ceil(seconds / state_seconds)]
    spans = [(start * state_seconds, min(end * state_seconds, seconds)) for start, end in token_spans(within.numpy())]
    spans += [(None, None)] * (count - len(stage1_ids))  # <EOA>
    distances = model.lookup.distances(aligner.aligned_embeds[0, :count])
    changes = [] if model.config.alignment_only else edits(stage1_ids, transcript_ids)
    changes += [Edit(None, index, None) for index in range(len(stage1_ids) if changes else 0, count)]
    return Explanation(
        seconds=seconds,
        stage1=processor.decode(stage1_ids),
        text=processor.decode(transcript_ids),
        stage1_tokens=_stage1_tokens(processor, ids[0], distances, spans),
        tokens=tuple(_token(processor, token_id) for token_id in transcript_ids),
        edits=tuple(changes),
        ended=ended,
        attention=attention.numpy(),
        state_seconds=state_seconds,
        log_mel=inputs.input_features[0, :, : int(inputs.attention_mask.sum())].float().cpu().numpy(),
        frame_seconds=processor.feature_extractor.hop_length / processor.sampling_rate,
    )


def _stage1_tokens(
    processor: SeamProcessor,
    ids: torch.LongTensor,
    distances: torch.FloatTensor,
    spans: Sequence[tuple[float | None, float | None]],
) -> tuple[Stage1Token, ...]:
    """
    Return the tokens of Stage 1 with their distances, runners-up and spans.

    Args:
        processor: its tokenizer gives the tokens' texts.
        ids (`torch.LongTensor` of shape `(tokens,)`): the tokens that Stage 1 chose.
        distances (`torch.FloatTensor` of shape `(tokens, vocabulary)`): from the predictions to all embeddings.
        spans: start and end of each token in seconds.
    """
    chosen = ids[:, None].to(distances.device)
    chosen_distances = distances.gather(-1, chosen)[:, 0]
    runner_up_distances, runners_up = distances.scatter(-1, chosen, torch.inf).min(-1)
    values = (value.tolist() for value in (ids, chosen_distances, runners_up, runner_up_distances))
    return tuple(
        Stage1Token(
            **vars(_token(processor, token_id)),
            distance=distance,
            runner_up=_token(processor, runner_up),
            runner_up_distance=runner_up_distance,
            start=start,
            end=end,
        )
        for token_id, distance, runner_up, runner_up_distance, (start, end) in zip(*values, spans, strict=True)
    )


def token_spans(attention: np.ndarray) -> list[tuple[int, int]]:
    """
    Locate each token in the audio by dynamic time warping, as Whisper's word timestamps do.

    Of all ways to divide the speech states among the tokens in their order, take the one that gathers the most
    attention. A token's centre of mass or highest weight would mislead: part of the attention rests on the first and
    last states of the audio whatever is said.

    Args:
        attention (`np.ndarray` of shape `(tokens, speech)`): averaged over heads and layers.

    Returns:
        For each token its first state and the one after its last. The spans follow each other without a gap; a span is
        empty where a token shares its state with the next one.
    """
    tokens, states = attention.shape
    if not tokens:
        return []
    _, path = librosa.sequence.dtw(C=-attention.astype(np.float64))
    starts = [int(path[path[:, 0] == token, 1].min()) for token in range(tokens)]
    return list(zip(starts, [*starts[1:], states], strict=True))


def edits(stage1_ids: Sequence[int], transcript_ids: Sequence[int]) -> list[Edit]:
    """Return the fewest edits from Stage 1's token ids to the transcript's, of which the first one was given."""
    result, before, after = [], 0, 0
    for old, new in kaldialign.align(list(stage1_ids[1:]), list(transcript_ids[1:]), _NO_TOKEN):
        before, after = before + (old != _NO_TOKEN), after + (new != _NO_TOKEN)
        if old == _NO_TOKEN:
            result.append(Edit(Change.INSERTED, None, after))
        elif new == _NO_TOKEN:
            result.append(Edit(Change.DELETED, before, None))
        else:
            result.append(Edit(Change.KEPT if old == new else Change.SUBSTITUTED, before, after))
    return [Edit(Change.GIVEN, 0, 0), *result] if stage1_ids else []


def _token(processor: SeamProcessor, token_id: int) -> Token:
    return Token(token_id, token_text(processor, token_id))


def token_text(processor: SeamProcessor, token_id: int) -> str:
    """Return a token's text, or the tokenizer's spelling of it if the token is only part of a character."""
    if token_id == processor.eoa_token_id:
        return EOA
    text = processor.decode([token_id])
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return processor.tokenizer.convert_ids_to_tokens(token_id)
    return text


@contextmanager
def _eager_attention(model):
    """Use eager attention, the only implementation that returns its weights, and restore the model's own afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
