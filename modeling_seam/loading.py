"""Loading a checkpoint, every weight accounted for: whole, light, or with its LLM in less precision than its files."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from .backbones import LLM, check_nothing_lost, llm_options, load_backbone, load_embedding_table, load_llm_of
from .building import SeamBuildingMixin
from .saving import complete_save
from .size_check import check_sizes
from .weights import (
    HUB_ARGUMENTS,
    OLD_NAMES,
    StoredTensor,
    backbone_folder,
    check_finite,
    check_generation_config,
    have_fingerprint,
    is_trained_by_seam,
    read_stored,
    weight_files,
)

# Left in full precision when the language model is quantized.
KEPT_IN_FULL = ("encoder", "bridge", "draft_head", "lm_head", r".*\.lora_[AB]\.default")


@dataclass
class Checkpoint:
    """
    A checkpoint as it lies in its files.

    Args:
        name: folder or Hub id.
        hub: `HUB_ARGUMENTS` that were given.
        config ([`SeamConfig`]): the one given, or the saved one.
        stored: where each weight lies, by its name in the model.
    """

    name: str
    hub: dict[str, Any]
    config: Any
    stored: dict[str, StoredTensor]

    def check_fingerprint(self) -> None:
        """Raise `ValueError` when the weight files are not those that the config was saved with."""
        expected, files = self.config.weights_fingerprint, sorted({tensor.file for tensor in self.stored.values()})
        if expected is not None and not have_fingerprint(files, expected):
            names = ", ".join(file.name for file in files)
            raise ValueError(
                f"{self.name}: {names} is not the weight file that config.json was saved with (another fingerprint); "
                "it was swapped or changed."
            )


class SeamLoadingMixin(SeamBuildingMixin):
    """Loading of [`SeamForSpeechRecognition`]."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        config=None,
        encoder: str | None = None,
        llm: str | None = None,
        llm_dtype: str | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ) -> Self:
        """
        Load as transformers does, but stricter: every weight is accounted for.

        Args:
            encoder, llm: folders or Hub ids to take a light checkpoint's backbones from, instead of those in its
                config.
            llm_dtype: `"bfloat16"` or `"4bit"`: precision of the frozen LLM, to train LoRA (in `dtype`, as everything
                else) on it with less memory. `save_pretrained` writes the LLM as it lies in the files that it was read
                from. Stage 1 alone has no LLM: `add_llm` takes the same argument.

        Raises:
            ValueError: when a weight is missing, unexpected, of another shape, or not finite, or when a weight file is
                damaged or belongs to another checkpoint.
            OSError: when a file is missing or cannot be reached.
        """
        name = pretrained_model_name_or_path
        kwargs.pop("ignore_mismatched_sizes", None)
        if name is None:  # weights given as `state_dict`
            loaded: Any = super().from_pretrained(
                name, *args, config=config, output_loading_info=output_loading_info, **kwargs
            )
            (loaded[0] if output_loading_info else loaded).freeze()
            return loaded
        if complete_save(Path(name)) and isinstance(config, PreTrainedConfig):  # read before
            raise OSError(f"{name} held a save that was interrupted, which is completed now: load it again.")
        if kwargs.get("quantization_config") is not None:
            if llm_dtype is not None:
                raise ValueError("llm_dtype and quantization_config: give one of the two.")
            kwargs["quantization_config"] = _for_the_llm_only(kwargs["quantization_config"])
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        saved = config if isinstance(config, PreTrainedConfig) else cls.config_class.from_pretrained(name, **hub)
        check_generation_config(name, **hub)
        stored = read_stored(weight_files(name, **hub))
        checkpoint = Checkpoint(name, hub, saved, stored)
        if kwargs.get("key_mapping") is None and getattr(saved, "quantization_config", None) is None:
            check_sizes(cls, checkpoint)
        info: dict[str, Any] = {}
        if saved.light_checkpoint:
            model = cls._load_light(checkpoint, {"encoder": encoder, "llm": llm}, llm_dtype, kwargs)
        elif encoder is not None or llm is not None:
            raise ValueError(f"{name} is no light checkpoint: it holds its own encoder and LLM.")
        else:
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
            if llm_dtype is None or saved.alignment_only:
                model, info = cls._load_whole(checkpoint, args, {"config": config, **kwargs})
            else:
                model, info = cls._load_with_llm_in(llm_dtype, checkpoint, kwargs)
            check_nothing_lost(info, f"{name} does not fit its config")
        check_finite(model, stored)
        checkpoint.check_fingerprint()
        model.freeze()  # transformers puts parameters of its own in the place of those that were frozen
        # As in transformers, whose signature, too, says nothing of the pair.
        return (model, info) if output_loading_info else model  # type: ignore[return-value]

    @classmethod
    def _load_whole(cls, checkpoint: Checkpoint, args: tuple, kwargs: dict[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Load all weights from the checkpoint's own files, as transformers does."""
        kwargs["key_mapping"] = OLD_NAMES | (kwargs.get("key_mapping") or {})
        loaded: Any = super().from_pretrained(checkpoint.name, *args, **kwargs)
        model, info = loaded
        # transformers would save under the names that it has read.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if OLD_NAMES.keys().isdisjoint(conversion.source_patterns)
        ]
        return model, info

    @classmethod
    def _load_with_llm_in(
        cls, llm_dtype: str, checkpoint: Checkpoint, kwargs: dict[str, Any]
    ) -> tuple[Self, dict[str, Any]]:
        """Load a whole checkpoint as if it were Stage 1 alone; then its LLM, straight into `llm_dtype`."""
        device = kwargs.get("device_map") or "cpu"
        if isinstance(device, dict) and len(device) > 1:
            raise ValueError("llm_dtype: a model with its LLM in less precision is loaded to one device.")
        options = llm_options(llm_dtype, torch.float32, device[""] if isinstance(device, dict) else device)
        if kwargs.get("attn_implementation") is not None:
            options["attn_implementation"] = kwargs["attn_implementation"]
        stored, text_config = checkpoint.stored, checkpoint.config.get_text_config()
        language_model, table = load_llm_of(text_config, stored, **options)
        weights = {name: tensor.read() for name, tensor in stored.items() if not name.startswith(LLM)}
        weights[f"{LLM}embed_tokens.weight"] = table
        config = copy.deepcopy(checkpoint.config)
        config.alignment_only = True
        loaded: Any = super().from_pretrained(None, config=config, state_dict=weights, **kwargs)
        model, info = loaded
        table = model.get_input_embeddings().weight
        model.config.alignment_only = False
        model._put_in(language_model)
        language_model.generation_config = GenerationConfig.from_model_config(model.config.get_text_config())
        model._keep_stored_llm(weight_files(checkpoint.name, **checkpoint.hub), table)
        adapters = {name: tensor.read() for name, tensor in stored.items() if ".lora_" in name}
        own = {name for name in model.state_dict() if ".lora_" in name}
        info["missing_keys"] = {*info["missing_keys"], *(own - set(adapters))}
        info["unexpected_keys"] = {*info["unexpected_keys"], *(set(adapters) - own)}
        model.load_state_dict(adapters, strict=False)
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.name, **checkpoint.hub)
        return model.to(table.device).eval(), info

    @classmethod
    def _load_light(
        cls,
        checkpoint: Checkpoint,
        given: dict[str, str | None],
        llm_dtype: str | None,
        kwargs: dict[str, Any],
    ) -> Self:
        """Load a light checkpoint's backbones, and from its weight file what SEAM trained."""
        name, config, hub = checkpoint.name, checkpoint.config, checkpoint.hub
        if isinstance(kwargs.get("device_map"), dict):
            raise ValueError("a light checkpoint is loaded to one device; save it whole to spread it over several.")
        cache = {key: hub[key] for key in ("cache_dir", "local_files_only", "token") if key in hub}
        folders = {
            role: backbone_folder(role, (config.backbones or {}).get(role) or {}, given[role], **cache)
            for role in ("encoder", "llm")
        }
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        dtype = config.dtype if dtype in (None, "auto") else dtype
        config.dtype = dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        options = {key: kwargs[key] for key in ("attn_implementation", "device_map") if kwargs.get(key) is not None}
        is_rewritten = config.token_projection == "table" and not config.token_table_trained
        needed = r"^(encoder|decoder\.embed_tokens)\." if is_rewritten else r"^encoder\."
        whisper = load_backbone(AutoModel, folders["encoder"], dtype, needed, **options)
        if kwargs.get("quantization_config") is not None:
            options["quantization_config"] = kwargs["quantization_config"]
        language_model: torch.nn.Module
        if config.alignment_only:
            language_model = load_embedding_table(folders["llm"], dtype)
        else:
            options |= llm_options(llm_dtype, dtype, whisper.device)
            language_model = load_backbone(AutoModelForCausalLM, folders["llm"], expected="", **options)
        config.light_checkpoint = False
        model = cls._assemble(config, whisper, language_model, dtype)
        if llm_dtype is not None and not config.alignment_only:
            table = load_embedding_table(folders["llm"], dtype).embed_tokens.weight
            model._keep_stored_llm(weight_files(folders["llm"]), table.to(whisper.device))
        weights = {key: tensor.read() for key, tensor in checkpoint.stored.items()}
        own = {key for key in model.state_dict() if is_trained_by_seam(key, config)}
        if set(weights) != own:
            odd = sorted(set(weights) ^ own)
            raise ValueError(f"{name} does not fit its config: {len(odd)} missing or unexpected keys ({odd[0]}).")
        model.load_state_dict(weights, strict=False)
        if is_rewritten:
            model._rewrite_token_table(whisper, folders["encoder"], folders["llm"])
        model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        device: Any = whisper.device
        return model.to(device).eval()


def _for_the_llm_only(quantization_config):
    """Return a copy that leaves out the encoder and what SEAM trained, unless the user chose otherwise."""
    quantization_config = copy.deepcopy(quantization_config)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if getattr(quantization_config, name, ()) is None:
            setattr(quantization_config, name, list(KEPT_IN_FULL))
    return quantization_config
