"""Loading the pretrained parts, every weight accounted for: in less precision than their files, or only in part."""

import copy
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from .weights import StoredTensor, fingerprint, read_stored, weight_files


class EmbeddingTable(nn.Module):
    """
    Stand in for the LLM in Stage 1, which needs its token embeddings and nothing else ("Only embeddings", Table 2).

    Args:
        config: of the whole LLM.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table, as any language model does."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the table."""
        self.embed_tokens = value

    def get_output_embeddings(self) -> None:
        """Return nothing: there is no head."""
        return None


def load_embedding_table(name: str, dtype: torch.dtype) -> EmbeddingTable:
    """
    Read the embedding table of a causal language model, and nothing else of its weight files.

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
    Load a backbone with `auto_class`, such as `AutoModel`.

    Args:
        name: Hub id or folder.
        dtype: of its weights.
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


LLM_DTYPES = ("bfloat16", "4bit")
LLM = "language_model."


def llm_options(llm_dtype: str | None, dtype: torch.dtype, device: torch.device | str) -> dict:
    """
    Return the arguments of `from_pretrained` that load a language model in `llm_dtype`.

    `"4bit"` is QLoRA's (Dettmers et al. 2023, arXiv 2305.14314): NF4 with double quantization, computed in bf16;
    embedding table, head and norms are in bf16.

    Args:
        llm_dtype: one of `LLM_DTYPES`, or `None`: as everything else.
        dtype: of everything else.
        device: where a quantized LLM is put.

    Raises:
        ValueError: for any other `llm_dtype`, or when bitsandbytes is missing.
    """
    if llm_dtype is None:
        return {"dtype": dtype}
    if llm_dtype not in LLM_DTYPES:
        raise ValueError(f"llm_dtype is {llm_dtype!r}; accepted: {', '.join(LLM_DTYPES)}.")
    if llm_dtype == "bfloat16":
        return {"dtype": torch.bfloat16}
    if find_spec("bitsandbytes") is None:
        raise ValueError("llm_dtype is '4bit', which needs bitsandbytes: pip install bitsandbytes")
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    return {"dtype": torch.bfloat16, "quantization_config": quantization_config, "device_map": {"": device}}


def keep_layout(language_model: PreTrainedModel) -> None:
    """
    Keep the layout of a quantized LLM's weights.

    On CPUs with bf16 instructions bitsandbytes changes it for good at the first inference, and training after it would
    go on without gradients, with only a warning.
    """
    module: Any
    for module in language_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def in_full(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    """Return the config that a language model would have in `dtype`, not quantized."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_llm_of(
    config: PreTrainedConfig, stored: dict[str, StoredTensor], **options
) -> tuple[PreTrainedModel, torch.Tensor]:
    """
    Load the language model from the weight files of a whole checkpoint.

    Args:
        config: of the language model.
        stored: every weight of the checkpoint (`read_stored`).
        options: see `llm_options`.

    Returns:
        The language model, without adapters, and its embedding table as it is in the file.

    Raises:
        ValueError: when a weight is missing, unexpected or of another shape.
    """
    weights = {
        name.removeprefix(LLM).replace(".base_layer.", "."): tensor.read()
        for name, tensor in stored.items()
        if name.startswith(LLM) and ".lora_" not in name
    }
    with torch.device("meta"):  # only to learn its class, and what that calls its table
        shell = AutoModelForCausalLM.from_config(config)
    table = shell.get_input_embeddings().weight
    table = weights[next(key for key, parameter in shell.named_parameters() if parameter is table)]
    language_model, info = type(shell).from_pretrained(
        None, config=copy.deepcopy(config), state_dict=weights, output_loading_info=True, **options
    )
    check_nothing_lost(info, "the LLM does not fit its config")
    return language_model, table


def check_nothing_lost(info: dict[str, Any], what: str) -> None:
    """Raise `ValueError`, which begins with `what`, for a missing, unexpected or mismatched key in the loading info."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = ", ".join(sorted(str(key) for key in info[problem])[:3])
            raise ValueError(f"{what}: {len(info[problem])} {problem.replace('_', ' ')} ({names}).")


class StoredLLM:
    """
    The frozen weights of a language model as they lie in weight files.

    Args:
        language_model: the one in less precision, with its adapters.
        files: of the language model, or of a whole checkpoint that has it.

    Raises:
        ValueError: when they have a weight under another name.
    """

    def __init__(self, language_model: PreTrainedModel, files: list[Path]):
        stored = read_stored(files)
        self.folder = files[0].parent
        self.stored = {}
        for name, _ in language_model.named_parameters():
            if ".lora_" in name:
                continue
            plain = name.replace(".base_layer.", ".")
            # In a checkpoint of ours, in one of the LLM, and in one that was saved without its head.
            names = (LLM + name, plain, plain.removeprefix(f"{language_model.base_model_prefix}."))
            found = next((one for one in names if one in stored), None)
            if found is None:
                raise ValueError(
                    f"llm_dtype: {self.folder} has {plain} under another name, so that it could not be saved as "
                    "it was; accepted here: full precision."
                )
            self.stored[LLM + name] = stored[found]
        self.fingerprint = fingerprint(self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.read() for name, tensor in self.stored.items()}

    def put_into(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Return a state dict of the whole model with these weights in the place of those in less precision.

        Raises:
            OSError: when the files are no longer there, or others.
        """
        try:
            full = self._tensors()
        except (OSError, SafetensorError) as error:
            raise OSError(f"the LLM, to be saved as it was in {self.folder}, cannot be read there: {error}") from error
        if fingerprint(full) != self.fingerprint:
            raise OSError(f"{self.folder}: the weights of the LLM have changed since it was loaded.")
        kept = {key: value for key, value in state_dict.items() if not key.startswith(LLM) or ".lora_" in key}
        return kept | full
