"""The pretrained parts, every weight of them accounted for: the whole LLM, or the little that Stage 1 needs."""

import re

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .weights import weight_files


class EmbeddingTable(nn.Module):
    """
    Stands in for the LLM in Stage 1, which needs its token embeddings and nothing else ("Only embeddings", Table 2).

    Args:
        config: of the whole LLM.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.embed_tokens = value

    def get_output_embeddings(self) -> None:
        return None


def load_embedding_table(name: str, dtype: torch.dtype) -> EmbeddingTable:
    """
    Read one tensor of a causal language model: of its weight files, no more than that is brought into memory.

    Args:
        name: Hub id or folder.
        dtype: of the table.

    Raises:
        ValueError: when no weight file holds the table in the shape that the config states.
    """
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):  # only to learn what the architecture calls its table
        language_model = AutoModelForCausalLM.from_config(config)
        table = EmbeddingTable(config.get_text_config())
    weight = language_model.get_input_embeddings().weight
    key = next(key for key, parameter in language_model.named_parameters() if parameter is weight)
    names = (key, key.removeprefix(f"{language_model.base_model_prefix}."))  # the latter: saved without its head
    for file in weight_files(name):
        with safe_open(file, framework="pt") as opened:
            found = next((one for one in names if one in opened.keys()), None)
            if found is None:
                continue
            loaded = opened.get_tensor(found)
        if loaded.shape != weight.shape:
            raise ValueError(f"{file}: {found} has shape {tuple(loaded.shape)}, its config says {tuple(weight.shape)}.")
        # A copy: the tensor from the file is mapped, and a write to the file would change it.
        table.embed_tokens.weight = nn.Parameter(loaded.to(dtype, copy=True))
        try:
            table.generation_config = GenerationConfig.from_pretrained(name)
        except OSError:
            pass  # none there: the ids are those of the config, as transformers has it
        return table
    raise ValueError(f"{name} holds no tensor {key}, the embedding table of {type(language_model).__name__}.")


def load_backbone(auto_class, name: str, dtype: torch.dtype, expected: str, **options) -> PreTrainedModel:
    """
    Load a backbone with `auto_class`.

    Args:
        name: Hub id or folder.
        expected: pattern of the weights that must be in its weight files; others may be missing there.
        options: of `from_pretrained`.

    Raises:
        ValueError: naming the weights that were not there, or not in the right shape.
    """
    model, info = auto_class.from_pretrained(
        name, dtype=dtype, output_loading_info=True, use_safetensors=True, **options
    )
    lost = [key for key in (*info["missing_keys"], *info["mismatched_keys"]) if re.search(expected, str(key))]
    if lost:
        raise ValueError(
            f"{name} lacks {len(lost)} of the weights of {type(model).__name__}: {sorted(map(str, lost))[:5]}"
        )
    return model
