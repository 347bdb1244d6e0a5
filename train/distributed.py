"""Share the work of a training among several processes (ranks), and gather what they make or hold."""

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


def all_gather(value: T) -> list[T]:
    """Return every rank's value, in the order of the ranks; every rank must call this. Alone, a process is rank 0."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def shard(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's share: of n ranks every n-th item, so that together they have each item once."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return items
    return items[distributed.get_rank() :: distributed.get_world_size()]


def map_over_ranks(function: Callable[[Sequence], Sequence[T]], items: Sequence) -> list[T]:
    """
    Apply a function to items, of which each rank takes its share, and return all results in order on every rank.

    Args:
        function: returns one result for each item that it is given. Tensors among them must be on the CPU.
        items: the same on all ranks.
    """
    shards = all_gather(list(function(shard(items))))
    results: list[Any] = [None] * len(items)
    for rank, results_of_rank in enumerate(shards):
        results[rank :: len(shards)] = results_of_rank
    return results


def unsharded(model: SeamForSpeechRecognition) -> SeamForSpeechRecognition:
    """
    Return a model that this rank can run without the others.

    It is the given one, or, where FSDP2 has sharded that over the ranks, a copy that holds all weights. Every rank must
    call this.
    """
    if not isinstance(model, FSDPModule):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.device("meta"):  # without weights, which follow
        copy = SeamForSpeechRecognition(model.config)
    copy.load_state_dict(weights, assign=True)
    copy.tie_weights()
    for name, buffer in model.named_buffers():  # the state dict leaves some of them out
        module, _, last = name.rpartition(".")
        copy.get_submodule(module).register_buffer(last, buffer, persistent=False)
    copy.generation_config = model.generation_config
    copy.language_model.generation_config = model.language_model.generation_config
    return copy


def prepare_for_fsdp(plugin: FullyShardedDataParallelPlugin, model: SeamForSpeechRecognition) -> None:
    """
    Tell FSDP2 which parts of the model to wrap, and which to leave alone.

    Raises:
        RecipeError: for settings of FSDP with which the model cannot be trained.
    """
    if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        raise RecipeError(
            "FSDP: accepted are fsdp_version 2 and fsdp_cpu_ram_efficient_loading false, as in recipes/accelerate."
        )
    # The lookup reads the frozen table outside the table's own forward pass, where FSDP2 would show one shard of it.
    plugin.ignored_modules = [model.get_input_embeddings()]
    if plugin.transformer_cls_names_to_wrap is None:
        kinds = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(kinds.intersection(model._no_split_modules))
