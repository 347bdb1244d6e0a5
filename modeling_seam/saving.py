"""Saving a checkpoint: whole or light, with its code; and LoRA by itself, as PEFT loads it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import get_peft_model_state_dict
from safetensors import SafetensorError
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
# Beside the files that are replaced, so that moving is a rename: files being written; all of them written, with a list.
STAGING, COMPLETE, LIST = ".saving", ".saved", ".files.json"
NEW, OLD = ".new", ".old"  # see `export_folder`

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
        self.config.auto_map = dict.fromkeys(AUTO_CLASSES, MODEL_CLASS)
        self.config.custom_pipelines = PIPELINES
        if not is_main_process:
            return super().save_pretrained(target / STAGING, is_main_process=False, **kwargs)
        with saved_together(target) as staging:
            super().save_pretrained(staging, **kwargs)
            follow_umask(staging)
            _save_fingerprint(staging, light)
            shutil.copytree(
                CODE,
                staging / CODE.name,
                ignore=lambda _, names: [n for n in names if not n.endswith(".py") or n == "__init__.py"],
            )
        if push_to_hub:
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


@contextmanager
def saved_together(target: Path) -> Iterator[Path]:
    """
    Yield a folder to write files to, such as model and processor, that replace those of `target` all together.

    Until all are written `target` is as it was. From then on they are found there whatever happens: what a killed
    process has not moved, `complete_save` moves.

    Raises:
        OSError: when they cannot be written, naming `target`.
    """
    target = Path(target)
    staging = target / STAGING
    shutil.rmtree(staging, ignore_errors=True)  # of a save that was interrupted
    complete_save(target)
    try:
        staging.mkdir(parents=True)
        yield staging
        names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        (staging / LIST).write_text(json.dumps(names), encoding="utf-8")
        os.rename(staging, target / COMPLETE)
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{target} cannot be saved: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    complete_save(target)


def complete_save(folder: Path) -> bool:
    """
    Finish a save, or an export, that was killed when all was written but not all moved to its place.

    Weight files of the older save that have no successor are removed.

    Args:
        folder: of the checkpoint; nothing happens where no save was interrupted.

    Returns:
        Whether there was one.

    Raises:
        OSError: when the files cannot be moved.
    """
    complete, aside = folder / COMPLETE, {name: export_folder(folder, name) for name in (NEW, OLD)}
    try:
        if not folder.exists() and aside[OLD].is_dir():  # an export stopped between its two renames
            os.rename(aside[NEW] if aside[NEW].is_dir() else aside[OLD], folder)
            return True
        if not (complete / LIST).is_file():
            return False
        kept = set(json.loads((complete / LIST).read_text(encoding="utf-8")))
        if (folder / CODE.name).is_symlink():  # to the code of others, which is not to be written to
            (folder / CODE.name).unlink()
        for path in [path for path in complete.rglob("*") if path.is_file() and path != complete / LIST]:
            place = folder / path.relative_to(complete)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        for path in folder.glob(WEIGHT_FILES):
            if path.name not in kept:
                path.unlink()
        shutil.rmtree(complete)
    except FileNotFoundError:  # another process finishes it, too
        return True
    except (OSError, ValueError, TypeError) as error:
        raise OSError(f"{folder} holds a save that was interrupted and cannot be completed: {error}") from error
    return True


def export_folder(target: Path, ending: str) -> Path:
    """Return where an export lays down what is to replace the target (`NEW`), and what it replaces (`OLD`)."""
    target = Path(os.path.abspath(target))  # `.` has no name
    return target.with_name(f".{target.name}{ending}")
