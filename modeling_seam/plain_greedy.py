"""What `GenerationMixin.generate` would do: which of its searches the loops of this package may stand for."""

from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

# Fields of a generation config that change nothing in greedy search but its ends, and values that mean "off" (so do
# `None` and, but for the cache, `False`).
FREE_FIELDS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_new_tokens", "max_length"),
    *("temperature", "top_k", "top_p", "return_dict_in_generate"),
    *("transformers_version", "_from_model_config", "_commit_hash"),
}
OFF = {
    **{"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
    **{"use_cache": True},
}
# A matter of memory, for the loop to decide; others change the keys and values.
CACHES = (None, "dynamic", "static")


def merged_settings(generation_config: GenerationConfig, model: PreTrainedModel) -> dict[str, Any]:
    """The settings of `model.generate` with this config: the model's own stand where it says nothing."""
    settings = generation_config.to_dict()
    for name, value in model.generation_config.to_dict().items():
        settings[name] = value if settings.get(name) is None else settings[name]
    return settings


def is_plain_greedy(settings: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """
    Whether they ask for greedy search and nothing else: no processors, criteria, scores, or anything unknown.

    Args:
        settings: of `generate` (`merged_settings`).
        arguments: of `generate`, that are no fields of the config.
    """

    def is_off(name: str, value: Any) -> bool:
        if name == "cache_implementation":
            return value in CACHES
        return value is None or (name in OFF and value == OFF[name]) or (value is False and name != "use_cache")

    return all(value is None or value is False for value in arguments.values()) and all(
        name in FREE_FIELDS or is_off(name, value) for name, value in settings.items()
    )


def is_shared(model: nn.Module) -> bool:
    """Whether several processes share the weights, and must therefore make the same number of forwards."""
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
