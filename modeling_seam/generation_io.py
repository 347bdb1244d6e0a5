"""What `align` and `generate` return, and which arguments of `GenerationMixin.generate` they accept."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig
from transformers.utils import ModelOutput, logging

logger = logging.get_logger(__name__)

# Drafts of another model, or of another part of the model: both loops begin with embeddings that these do not see.
ASSISTANTS = ("assistant_model", "assistant_tokenizer", "assistant_early_exit", "use_mtp")
# Drafts of what the tokens so far repeat: of 5.6 it is known that they lose the embeddings, of 5.23 that they do not.
LOOKUP = ("prompt_lookup_num_tokens",) if Version(transformers.__version__) < Version("5.23") else ()
# How Whisper decides whether to decode a piece of long audio again: here each piece is decoded once.
WITHOUT_EFFECT = (
    "compression_ratio_threshold",
    "condition_on_prev_tokens",
    "is_multilingual",
    "logprob_threshold",
    "no_speech_threshold",
    "prompt_condition_type",
)
# What Whisper can return beside the transcript.
NOT_RETURNED = ("return_timestamps", "return_token_timestamps", "return_segments", "return_language")
# Of these there is at least one.
COUNTS = ("num_beams", "num_return_sequences", "num_beam_groups", "max_new_tokens", "max_length")


def check_arguments(generation_config: GenerationConfig | None, kwargs: dict[str, Any], from_embeddings: bool) -> None:
    """
    Check the arguments of `generate` before anything is computed.

    Args:
        generation_config: the given one, which `kwargs` change.
        kwargs: the given arguments.
        from_embeddings: whether the loop begins with embeddings that no tokens stand for, as the language model's does.

    Raises:
        ValueError: for one with which the stock loops would write something else, or nothing, without a word.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(
            f"generation_config is a {type(generation_config).__name__}; accepted: a GenerationConfig, or its fields "
            "as arguments of their own."
        )

    def given(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(generation_config, name, None)

    for name in (*ASSISTANTS, *LOOKUP) if from_embeddings else ASSISTANTS:
        if given(name):
            raise ValueError(
                f"{name}: an assistant does not see the embeddings that are decoded from, and would change the "
                "transcript; leave it out, for Stage 1 drafts the transcript already (verify=True)."
            )
    for name in COUNTS:
        value = given(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name} is {value!r}; accepted: whole numbers from 1.")


def without_whispers(kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Return the arguments of `generate` without those of Whisper that change nothing here, and say which these are.

    Raises:
        ValueError: for those that ask for something that is not there.
    """
    for name in NOT_RETURNED:
        if kwargs.get(name):
            raise ValueError(f"{name}: SEAM outputs tokens of the transcript, no times and no languages; leave it out.")
    idle = [name for name in WITHOUT_EFFECT if kwargs.get(name) is not None]
    temperature = kwargs.get("temperature")
    if isinstance(temperature, (list, tuple)):
        if kwargs.get("do_sample") or not temperature or temperature[0] != 0:
            raise ValueError(
                f"temperature is {temperature!r}; accepted: one number, or Whisper's list that begins at 0."
            )
        idle.append("temperature")
    if idle:
        logger.warning_once(f"{', '.join(idle)}: without effect, for SEAM decodes every piece of audio once.")
    return {name: value for name, value in kwargs.items() if name not in (*NOT_RETURNED, *WITHOUT_EFFECT, *idle)}


def put_into(generation_config: GenerationConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Put the arguments of `generate` into the config and return those that are none of its fields.

    `max_length` is the length of the output, as for any encoder-decoder; the prompt does not count.
    """
    if "max_length" in kwargs:
        kwargs = {"max_new_tokens": kwargs["max_length"], **kwargs, "max_length": None}
    kwargs = generation_config.update(**kwargs)
    generation_config.max_new_tokens = generation_config.max_new_tokens or generation_config.max_length
    generation_config.max_length = None
    return kwargs


# ---- what is returned ----


@dataclass
class AlignmentOutput(ModelOutput):
    """
    Output of Stage 1.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, tokens)`): ids without `<BOA>` and `<EOA>`, padded at the end.
        mask (`torch.LongTensor` of shape `(batch, tokens)`): 1 for tokens, 0 for padding.
        aligned_embeds (`torch.FloatTensor` of shape `(batch, tokens, d_llm)`, *optional*): predicted embeddings;
            zeros for padding.
        distances (`torch.FloatTensor` of shape `(batch, tokens)`, *optional*): Eq. 7 to the chosen tokens; 0 for
            padding.
        forwards, accepted_tokens, rejected_tokens (`torch.LongTensor` of shape `(batch,)`, *optional*):
            When the draft head's tokens were verified (`verify`): the aligner's passes in which the row took part, and
            the draft tokens that it agreed with and did not. A token that was proposed again counts again.
        sequences_scores, scores, logits, beam_indices, hidden_states, attentions, cross_attentions (*optional*):
            See [`SeamGenerateOutput`].
    """

    sequences: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    aligned_embeds: torch.Tensor | None = None
    distances: torch.Tensor | None = None
    forwards: torch.Tensor | None = None
    accepted_tokens: torch.Tensor | None = None
    rejected_tokens: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    beam_indices: torch.Tensor | None = None
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
    attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    cross_attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None


@dataclass
class SeamGenerateOutput(ModelOutput):
    """
    Output of `generate`: the transcript, and what Stage 1 found.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, tokens)`): transcript ids, padded at the end.
        sequences_scores, scores, logits, beam_indices (*optional*):
            As `GenerationMixin.generate` returns them when asked to (`output_scores`, `output_logits`, beams), of the
            loop that decoded the transcript. The guiding first token was not chosen by it and has none; in rows where
            Stage 1 found no token they are minus infinity.
        hidden_states, attentions, cross_attentions (*optional*):
            As `GenerationMixin.generate` returns them with `output_hidden_states` and `output_attentions`: for each
            step of that loop one tensor for each layer. They are the language model's, with `use_llm=False` the
            aligner's, which alone attends to speech states. In rows where Stage 1 found no token they are zero.
        alignment_sequences, alignment_mask, alignment_distances, aligned_embeds: see [`AlignmentOutput`]. Of a bridge
            without a Stage 1, its embeddings and their mask.
        llm_forwards, accepted_tokens, rejected_tokens (`torch.LongTensor` of shape `(batch,)`, *optional*):
            As those of [`AlignmentOutput`], when the language model verified Stage 1's tokens: of its own forwards.
        alignment_forwards, alignment_accepted_tokens, alignment_rejected_tokens (*optional*): see [`AlignmentOutput`].
    """

    sequences: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    beam_indices: torch.Tensor | None = None
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
    attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    cross_attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    alignment_sequences: torch.Tensor | None = None
    alignment_mask: torch.Tensor | None = None
    alignment_distances: torch.Tensor | None = None
    aligned_embeds: torch.Tensor | None = None
    llm_forwards: torch.Tensor | None = None
    accepted_tokens: torch.Tensor | None = None
    rejected_tokens: torch.Tensor | None = None
    alignment_forwards: torch.Tensor | None = None
    alignment_accepted_tokens: torch.Tensor | None = None
    alignment_rejected_tokens: torch.Tensor | None = None


# What a loop reports about its choices, each with the value where it made none.
REPORTS = {
    "sequences_scores": -torch.inf,
    "scores": -torch.inf,
    "logits": -torch.inf,
    "beam_indices": -1,
    "hidden_states": 0,
    "attentions": 0,
    "cross_attentions": 0,
}
# What verifying a draft reports, of Stage 1 and of the language model.
ALIGNMENT_COUNTS = ("forwards", "accepted_tokens", "rejected_tokens")
LLM_COUNTS = ("llm_forwards", "accepted_tokens", "rejected_tokens")
