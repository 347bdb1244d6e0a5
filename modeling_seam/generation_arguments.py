"""What `align` and `generate` accept of the arguments of `GenerationMixin.generate`, and what they refuse."""

from numbers import Integral
from typing import Any

from transformers import GenerationConfig

# Drafts of another model, or of another part of the model: both loops begin with embeddings that these do not see.
ASSISTANTS = ("assistant_model", "assistant_tokenizer", "assistant_early_exit", "use_mtp")
# Of these there is at least one.
COUNTS = ("num_beams", "num_return_sequences", "num_beam_groups", "max_new_tokens", "max_length")


def check_arguments(generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    """
    Check the arguments of `generate` before anything is computed.

    Args:
        generation_config: the given one, which `kwargs` change.
        kwargs: the given arguments.

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

    for name in ASSISTANTS:
        if given(name):
            raise ValueError(
                f"{name}: an assistant does not see the embeddings that are decoded from, and would change the "
                "transcript; leave it out, for Stage 1 drafts the transcript already (verify=True)."
            )
    for name in COUNTS:
        value = given(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name} is {value!r}; accepted: whole numbers from 1.")


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
