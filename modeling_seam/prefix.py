"""Keys and values of what every prompt begins with, computed once."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DynamicCache, PreTrainedModel

from .prompt import last_positions


class PromptPrefix:
    """
    Keys and values of the last prefix that was asked for.

    They are computed anew when the ids, the weights, or LoRA have changed. What changes a weight behind torch's back,
    as some optimizers do, is not seen: the model forgets the prefix when it is put into training or evaluation mode.
    """

    def __init__(self):
        self._state, self._states = None, []

    def states(
        self, language_model: PreTrainedModel, ids: list[int]
    ) -> list[tuple[torch.FloatTensor, torch.FloatTensor]]:
        """Per layer the keys and values `(1, heads, tokens, d_head)` of `ids`; empty for no ids."""
        state = (ids, *_state(language_model))
        if state != self._state:
            self._states = []
            if ids:
                cache = DynamicCache()
                embeds = language_model.get_input_embeddings()(torch.tensor([ids], device=language_model.device))
                last = last_positions(1, embeds.device)
                language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=last)
                self._states = [(layer.keys, layer.values) for layer in cache.layers]
            self._state = state
        return self._states


def _state(language_model: PreTrainedModel) -> tuple:
    """What the keys and values depend on beside the ids: where each weight lies and how often it was written to."""
    weights = tuple((weight.data_ptr(), weight._version, weight.dtype) for weight in language_model.parameters())
    # LoRA is switched, scaled and merged in all layers together.
    adapter = next((module for module in language_model.modules() if isinstance(module, BaseTunerLayer)), None)
    if adapter is not None:
        lora = (list(adapter.active_adapters), adapter.disable_adapters, list(adapter.merged_adapters))
        lora = (*lora, dict(adapter.scaling))
    else:
        lora = ()
    kind = language_model.device.type
    return (
        weights,
        language_model.device,
        lora,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
    )
