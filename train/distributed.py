"""Several processes (ranks) at one training: what each does its share of, and a model that is spread over them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from seam.modeling_seam import SeamForSpeechRecognition
from seam.train.recipe import RecipeError

T = TypeVar("T")


def of_all_ranks(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks; all ranks must come here. A single process is its only rank."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of the items, of n ranks: together they have each item once."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return items
    return items[distributed.get_rank() :: distributed.get_world_size()]


def shared_out(work: Callable[[Sequence], Sequence[T]], items: Sequence) -> list[T]:
    """
    What `work` makes of the items, in their order, on every rank; each does only its share of it.

    Args:
        work: returns one result for each item that it is given. Tensors among them must be on the CPU.
    """
    shares = of_all_ranks(list(work(own_share(items))))
    results: list[Any] = [None] * len(items)
    for rank, share in enumerate(shares):
        results[rank :: len(shares)] = share
    return results


def whole(model: SeamForSpeechRecognition) -> SeamForSpeechRecognition:
    """
    A model that this rank can run by itself, as often as it likes: the given one or, of one that FSDP2 has spread over
    the ranks, a copy with all weights. All ranks must come here.
    """
    if not isinstance(model, FSDPModule):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.device("meta"):  # the shell only
        copy = SeamForSpeechRecognition(model.config)
    copy.load_state_dict(weights, assign=True)
    copy.tie_weights()
    for name, buffer in model.named_buffers():  # some are not saved with the weights
        module, _, last = name.rpartition(".")
        copy.get_submodule(module).register_buffer(last, buffer, persistent=False)
    copy.generation_config = model.generation_config
    copy.language_model.generation_config = model.language_model.generation_config
    return copy


def prepare_for_fsdp(plugin: FullyShardedDataParallelPlugin, model: SeamForSpeechRecognition) -> None:
    """What FSDP2 must know of the model. Raises `RecipeError` for settings with which it cannot be trained."""
    if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        raise RecipeError(
            "FSDP: accepted are fsdp_version 2 and fsdp_cpu_ram_efficient_loading false, as in recipes/accelerate."
        )
    # Stage 1 looks into the frozen table from outside of its own forward pass, where FSDP2 would show a share of it.
    plugin.ignored_modules = [model.get_input_embeddings()]
    if plugin.transformer_cls_names_to_wrap is None:
        kinds = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(kinds.intersection(model._no_split_modules))
