"""One utterance from the inside: where Stage 1 listened, how sure it was of each token, and what the LLM changed."""

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
_NOTHING = -1  # no token id


class Change(StrEnum):
    """What the LLM did with a token of Stage 1; the first one is given to it (First Token Guidance, Eq. 6)."""

    GIVEN = "given"
    KEPT = "kept"
    SUBSTITUTED = "substituted"
    INSERTED = "inserted"
    DELETED = "deleted"


@dataclass(frozen=True)
class Token:
    """A token and its own text, with the space that it may begin with; `<EOA>` is written so."""

    id: int
    text: str


@dataclass(frozen=True)
class HeardToken(Token):
    """
    A token of Stage 1.

    Args:
        distance: from the predicted embedding to this token's (Eq. 7).
        runner_up, runner_up_distance: the token that would have been next nearest (Eq. 8).
        start, end: its place in the audio in seconds (see `places`); None for `<EOA>`, which has none.
    """

    distance: float
    runner_up: Token
    runner_up_distance: float
    start: float | None
    end: float | None


@dataclass(frozen=True)
class Edit:
    """
    One step from Stage 1's tokens to the transcript's.

    Args:
        change: None for `<EOA>`, which the LLM is not shown, and for every token where there is no LLM.
        heard: index of Stage 1's token, None for an insertion.
        written: index of the transcript's token, None for a deletion and where `change` is None.
    """

    change: Change | None
    heard: int | None
    written: int | None


@dataclass(frozen=True, eq=False)
class Explanation:
    """
    Args:
        seconds: length of the audio.
        stage1: what Stage 1 heard.
        text: the transcript, with First Token Guidance.
        heard: Stage 1's tokens, with `<EOA>` as the last one; without it where the aligner's positions ran out.
        written: the transcript's tokens.
        edits: from `heard` to `written`, in order.
        ended: whether Stage 1 ended with `<EOA>`, and not because the aligner has no more positions.
        attention (`np.ndarray` of shape `(layers, tokens, speech)`): the aligner's cross-attention, averaged over the
            heads: the weights with which each token of `heard` was predicted. Every row sums to 1.
        state_seconds: how much audio a speech state stands for.
        log_mel (`np.ndarray` of shape `(n_mels, frames)`): what the encoder was given, up to the audio's end.
        frame_seconds: how much audio a frame stands for.
    """

    seconds: float
    stage1: str
    text: str
    heard: tuple[HeardToken, ...]
    written: tuple[Token, ...]
    edits: tuple[Edit, ...]
    ended: bool
    attention: np.ndarray
    state_seconds: float
    log_mel: np.ndarray
    frame_seconds: float


def explain(model: SeamForSpeechRecognition, processor: SeamProcessor, audio) -> Explanation:
    """
    Transcribe one utterance, as `generate` does by default, and look at how it came about.

    Args:
        model, processor: of one checkpoint.
        audio: what `SeamProcessor.load_audio` takes, at most as long as the encoder's window.

    Raises:
        ValueError: when the audio is longer, or is none, or the model's bridge is not the aligner.
    """
    if model.config.bridge != "aligner":
        raise ValueError(f"the bridge {model.config.bridge!r} has no cross-attention to tokens; only the aligner has.")
    waveform = processor.load_audio(audio)
    inputs = processor(audio=waveform).to(model.device)
    model.eval()
    with torch.no_grad():
        states, mask = model.encode(**inputs)
        output = model.generate(speech_states=states, speech_mask=mask, return_dict_in_generate=True)
        heard_ids = output.alignment_sequences
        labels = torch.nn.functional.pad(heard_ids, (0, 1), value=model.config.eoa_token_id)
        with _eager_attention(model.bridge):
            aligner = model(
                labels=labels, speech_states=states, speech_mask=mask, use_llm=False, output_attentions=True
            )
    ended = heard_ids.shape[1] < model.config.aligner_config.max_target_positions - 1
    if ended:
        heard_ids = labels
    count = heard_ids.shape[1]
    attention = torch.stack([layer[0].float().mean(0).cpu() for layer in aligner.cross_attentions])[:, :count]

    distances = model.lookup.distances(aligner.aligned_embeds[0, :count])
    chosen = heard_ids[0, :, None].to(distances.device)
    chosen_distances = distances.gather(-1, chosen)[:, 0]
    runner_up_distances, runners_up = distances.scatter(-1, chosen, torch.inf).min(-1)

    spoken = output.alignment_sequences[0].tolist()
    special = set(processor.tokenizer.all_special_ids)
    written = [token_id for token_id in output.sequences[0].tolist() if token_id not in special]
    seconds = len(waveform) / processor.sampling_rate
    state_seconds = processor.max_seconds / model.config.audio_config.max_source_positions
    # An aligner that is not kept from listening past the audio's end (`mask_speech_padding`) still hears no word there.
    within = attention.mean(0)[: len(spoken), : math.ceil(seconds / state_seconds)]
    where = [(start * state_seconds, min(end * state_seconds, seconds)) for start, end in places(within.numpy())]
    where += [(None, None)] * (count - len(spoken))  # <EOA>

    def token(token_id: int) -> Token:
        return Token(token_id, own_text(processor, token_id))

    steps = [] if model.config.alignment_only else edits(spoken, written)
    steps += [Edit(None, index, None) for index in range(len(spoken) if steps else 0, count)]
    values = (heard_ids[0], chosen_distances, runners_up, runner_up_distances)
    return Explanation(
        seconds=seconds,
        stage1=processor.decode(spoken),
        text=processor.decode(written),
        heard=tuple(
            HeardToken(**vars(token(one)), distance=d, runner_up=token(other), runner_up_distance=r, start=s, end=e)
            for one, d, other, r, (s, e) in zip(*(value.tolist() for value in values), where, strict=True)
        ),
        written=tuple(token(one) for one in written),
        edits=tuple(steps),
        ended=ended,
        attention=attention.numpy(),
        state_seconds=state_seconds,
        log_mel=inputs.input_features[0, :, : int(inputs.attention_mask.sum())].float().cpu().numpy(),
        frame_seconds=processor.feature_extractor.hop_length / processor.sampling_rate,
    )


def places(attention: np.ndarray) -> list[tuple[int, int]]:
    """
    Where in the audio each token is: of all ways to divide the speech states among the tokens in their order, the one
    that gathers the most attention (dynamic time warping, as in Whisper's word times). A token's centre of mass or
    highest weight is no good guide: part of the attention rests on the audio's first and last states whatever is said.

    Args:
        attention (`np.ndarray` of shape `(tokens, speech)`): averaged over heads and layers.

    Returns:
        For each token its first state and the one after its last. They follow upon each other without a gap; both are
        the same where a token shares its state with the next one and has none of its own.
    """
    tokens, states = attention.shape
    if not tokens:
        return []
    _, path = librosa.sequence.dtw(C=-attention.astype(np.float64))
    starts = [int(path[path[:, 0] == token, 1].min()) for token in range(tokens)]
    return list(zip(starts, [*starts[1:], states], strict=True))


def edits(heard: Sequence[int], written: Sequence[int]) -> list[Edit]:
    """
    The fewest insertions, deletions and substitutions that make Stage 1's token ids the transcript's, of which the
    first one was given.
    """
    steps, h, w = [], 0, 0
    for one, other in kaldialign.align(list(heard[1:]), list(written[1:]), _NOTHING):
        h, w = h + (one != _NOTHING), w + (other != _NOTHING)
        if one == _NOTHING:
            steps.append(Edit(Change.INSERTED, None, w))
        elif other == _NOTHING:
            steps.append(Edit(Change.DELETED, h, None))
        else:
            steps.append(Edit(Change.KEPT if one == other else Change.SUBSTITUTED, h, w))
    return [Edit(Change.GIVEN, 0, 0), *steps] if heard else []


def own_text(processor: SeamProcessor, token_id: int) -> str:
    """A token's own text; the tokenizer's spelling of it where it is only part of a character."""
    if token_id == processor.eoa_token_id:
        return EOA
    text = processor.decode([token_id])
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return processor.tokenizer.convert_ids_to_tokens(token_id)
    return text


@contextmanager
def _eager_attention(model):
    """The only implementation that gives out its weights; the one that the model had comes back afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
