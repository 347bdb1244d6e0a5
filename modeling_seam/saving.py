"""Saving a checkpoint: whole or light, with its code; and LoRA by itself, as PEFT loads it."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .backbones import StoredLLM
from .weights import WEIGHT_FILES, is_trained_by_seam, read_fingerprint, weight_files

CODE = Path(__file__).parent
MODEL_CLASS = "modeling_seam/modeling_seam.SeamForSpeechRecognition"
AUTO_CLASSES = ("AutoModel", "AutoModelForMultimodalLM", "AutoModelForSpeechSeq2Seq")
PIPELINES = {
    "automatic-speech-recognition": {
        "impl": "modeling_seam/pipeline.SeamPipeline",
        "pt": ["AutoModelForSpeechSeq2Seq"],
    }
}
PUSH_ARGUMENTS = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size")
STAGING = ".saving"  # beside the files that it replaces, so that moving them is a rename

if TYPE_CHECKING:
    MixedInto = PreTrainedModel
else:
    MixedInto = object


class SeamSavingMixin(MixedInto):
    """Saving of [`SeamForSpeechRecognition`]."""

    if TYPE_CHECKING:  # what that class has
        config: Any
        stored_llm: StoredLLM | None

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Do nothing: transformers would copy the code into one flat folder; `save_pretrained` keeps its own."""

    def save_pretrained(  # type: ignore[override]  # what else transformers' takes is passed on
        self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, light: bool = False, **kwargs
    ):
        """
        Save as transformers does, with the code, so that the folder loads where this package is not installed.

        Everything is written to a folder aside and then moved, so that an interrupted save leaves the old files usable.

        Args:
            light (`bool`, *optional*, defaults to `False`):
                Save the bridge, draft head, LoRA and learned mask only; the backbones stay where `config.backbones`
                says.

        Raises:
            ValueError: when `light` and the config does not say where the backbones are, or for a `variant`.
        """
        if kwargs.get("variant") is not None:
            raise ValueError("variant: a folder holds one set of weights; save the other to a folder of its own.")
        if kwargs.get("distributed_checkpoint"):  # every process writes its own shard
            return super().save_pretrained(
                save_directory, is_main_process=is_main_process, push_to_hub=push_to_hub, **kwargs
            )
        if self.stored_llm is not None:
            kwargs["state_dict"] = self.stored_llm.put_into(kwargs.get("state_dict") or self.state_dict())
        if light:
            if self.config.backbones is None or not (self.config.lora_rank or self.config.alignment_only):
                raise ValueError(
                    "a light checkpoint needs LoRA (lora_rank above 0) and backbones of the Hub (config.backbones)."
                )
            state_dict = kwargs.get("state_dict") or self.state_dict()
            kwargs["state_dict"] = {
                name: value for name, value in state_dict.items() if is_trained_by_seam(name, self.config)
            }
        target = Path(save_directory)
        staging = target / STAGING
        if is_main_process:
            shutil.rmtree(staging, ignore_errors=True)  # of a save that was interrupted
        self.config.auto_map = dict.fromkeys(AUTO_CLASSES, MODEL_CLASS)
        self.config.custom_pipelines = PIPELINES
        super().save_pretrained(staging, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            follow_umask(staging)
            _save_fingerprint(staging, light)
            shutil.copytree(
                CODE,
                staging / CODE.name,
                ignore=lambda _, names: [n for n in names if not n.endswith(".py") or n == "__init__.py"],
            )
            _move_over(staging, target)
        if push_to_hub and is_main_process:
            given = {name: kwargs[name] for name in PUSH_ARGUMENTS if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id", target.name), **given)


def save_lora(language_model: PreTrainedModel, folder: Path) -> None:
    """Write the LoRA adapters as a folder that `peft` loads onto the language model."""
    folder.mkdir(parents=True)
    weights = get_peft_model_state_dict(language_model)
    weights = {f"base_model.model.{key}": weight.contiguous() for key, weight in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    language_model.peft_config["default"].save_pretrained(folder)
    language_model.generation_config.save_pretrained(folder)
    follow_umask(folder)


def follow_umask(folder: Path) -> None:
    """Give weight files, which safetensors writes for their owner alone, the mode of the config.json beside them."""
    for config in folder.glob("*config.json"):
        for file in folder.glob("*.safetensors"):
            file.chmod(config.stat().st_mode)


def _save_fingerprint(folder: Path, light: bool) -> None:
    """Write into the saved config which weights lie beside it."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["weights_fingerprint"] = read_fingerprint(weight_files(folder))
    config["light_checkpoint"] = light
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_over(staging: Path, target: Path) -> None:
    """Move finished files over older ones, and remove weight files of the older save that have no successor."""
    new = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    if (target / CODE.name).is_symlink():  # to the code of others, which is not to be written to
        (target / CODE.name).unlink()
    stale = {path.name for path in target.glob(WEIGHT_FILES)} - {path.name for path in new}
    for path in new:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / path, target / path)
    for name in stale:
        (target / name).unlink()
    shutil.rmtree(staging)
