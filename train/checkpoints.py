"""
Find, check, complete and remove the checkpoints that a training resumes from.

A folder `checkpoint-STEP` appears by a rename, when all of it is on disk. Its `resume.json` holds the record of the
run (settings, data, and weights that it began with), which a run that resumes must share; what the `Trainer` leaves out
of its own state; and the size of each file, by which an incomplete checkpoint is told from a complete one.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from seam.data.files import locked, sha256_of, write_text
from seam.data.manifest import Utterance
from seam.modeling_seam.weights import fingerprint, read_stored, weight_files
from seam.train.recipe import RecipeError, StageRecipe

logger = logging.getLogger(__name__)

RESUME_STATE = "resume.json"
# A name that the Trainer neither takes for a checkpoint of its own nor uploads with the folder.
UNFINISHED = "checkpoint-unfinished"
LOCK = "_lock"  # which it does not upload either

# Settings that may change when a run resumes: where it runs, what it reports and keeps. They do not change what it
# learns. Manifests may change their names because their utterances are compared.
FREE_SETTINGS = {
    "aligned_embeds",
    "alignment_cache",
    "data.encoder_states",
    "data.eval_batch_size",
    "data.keep_encoder_states",
    "data.train",
    "data.validation",
    "training.activation_checkpointing",
    "training.activation_checkpointing_kwargs",
    "training.dataloader_multiprocessing_context",
    "training.dataloader_num_workers",
    "training.dataloader_persistent_workers",
    "training.dataloader_pin_memory",
    "training.dataloader_prefetch_factor",
    "training.disable_tqdm",
    "training.enable_jit_checkpoint",
    "training.gradient_checkpointing",
    "training.gradient_checkpointing_kwargs",
    "training.load_best_model_at_end",
    "training.local_rank",
    "training.output_dir",
    "training.per_device_eval_batch_size",
    "training.project",
    "training.remove_unused_columns",
    "training.report_to",
    "training.restore_callback_states_from_checkpoint",
    "training.resume_from_checkpoint",
    "training.run_name",
    "training.skip_memory_metrics",
}
FREE_PREFIXES = tuple(
    f"training.{group}_" for group in ("ddp", "do", "eval", "hub", "log", "logging", "push", "save", "trackio")
)


def run_record(recipe: StageRecipe, model: torch.nn.Module, *data: Iterable[Utterance]) -> dict[str, Any]:
    """
    Return everything that decides what a run learns, by name: its settings, and digests of data and weights.

    Args:
        recipe: of the run.
        model: at the beginning of the run.
        data: training and validation utterances.

    Returns:
        Values as they are read back from JSON.
    """
    values = {**vars(recipe), "training": recipe.training.to_dict(), "data": asdict(recipe.data)}
    values["processor"] = asdict(recipe.processor)
    settings = {
        name: value
        for name, value in _flatten(values)
        if name not in FREE_SETTINGS and not name.startswith(FREE_PREFIXES)
    }
    settings["processes"] = recipe.training.world_size
    if recipe.data.streaming:  # utterances that are not read yet are known by the names of their files
        settings["data.train"] = recipe.data.train
    settings["utterances"] = [_utterances_digest(utterances) for utterances in data]
    if recipe.model is not None:
        settings["weights of the model"] = _weights_digest(model)
    settings["weights of the backbones"] = _backbones_digest(model)
    return json.loads(json.dumps(settings, default=str))


def only_training_in(training: TrainingArguments) -> AbstractContextManager[None]:
    """Keep other trainings out of the output folder, on behalf of all ranks; see `seam.data.files.locked`."""
    if training.process_index != 0:
        return nullcontext()
    folder = Path(training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return locked(folder / LOCK, str(folder), "wait for it, or give another training.output_dir")


def find_checkpoint(recipe: StageRecipe, record: dict[str, Any]) -> Path | None:
    """
    Return the checkpoint to resume from, or `None` for a run that begins.

    It is the last complete one in `training.output_dir`, else the one that `training.resume_from_checkpoint` names.

    Args:
        recipe: of the run.
        record: see `run_record`.

    Raises:
        RecipeError: when the output folder's checkpoints are of another recipe, or the named folder is no checkpoint.
    """
    folder, named = Path(recipe.training.output_dir), recipe.training.resume_from_checkpoint
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        _check_same_run(read_resume_state(checkpoint)["origin"], record, folder)
    elif named is not None:
        checkpoint = Path(named)
        if not (checkpoint / TRAINER_STATE_NAME).is_file():
            raise RecipeError(
                f"training.resume_from_checkpoint: {named} is not a checkpoint of a training: it has no "
                f"{TRAINER_STATE_NAME}."
            )
    if checkpoint is not None:
        logger.warning("The training resumes from %s.", checkpoint)
    return checkpoint


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint of an output folder; log a warning for later ones that are not complete."""
    for checkpoint in reversed(list_checkpoints(folder)):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is not complete, or has no %s to resume with: ignored.", checkpoint, RESUME_STATE)
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders `checkpoint-STEP`, complete or not, by step."""
    steps = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()}
    return [steps[step] for step in sorted(steps)]


def is_complete(checkpoint: Path) -> bool:
    """Return whether every file of a checkpoint is there, at the size that it was written with."""
    try:
        files = read_resume_state(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def read_resume_state(checkpoint: Path) -> dict[str, Any]:
    """Return what `write_resume_state` wrote; empty where there is none."""
    path = checkpoint / RESUME_STATE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_resume_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Complete a checkpoint, whose other files are written, by its `resume.json`, and wait until all is on disk."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    write_text(checkpoint / RESUME_STATE, json.dumps({**state, "files": sizes}, indent=1) + "\n")
    # What was written survives the end of the process, but not that of the machine before it is on disk.
    for path in (*files, checkpoint / RESUME_STATE):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def load_trained_parameters(model: torch.nn.Module, checkpoint: Path) -> None:
    """
    Load the trained parameters of a checkpoint, and no others, into the model.

    Raises:
        RecipeError: when the checkpoint lacks one of them.
    """
    stored = read_stored(weight_files(checkpoint))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if name not in stored:
                raise RecipeError(f"{checkpoint} does not hold {name}, which this recipe trains.")
            parameter.data.copy_(stored[name].read())


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint so that nothing looks like a checkpoint where the removal is interrupted."""
    unfinished = checkpoint.with_name(UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    checkpoint.replace(unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)


def remove_old_checkpoints(folder: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints (`None`: all), among them the last and the `best` one, as the `Trainer` does."""
    checkpoints = list_checkpoints(folder)
    kept = {checkpoints[-1].name, Path(best).name if best else checkpoints[-1].name}
    too_many = len(checkpoints) - max(limit, len(kept)) if limit else 0
    for checkpoint in [path for path in checkpoints if path.name not in kept][: max(too_many, 0)]:
        remove_checkpoint(checkpoint)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """
    Return the names under which two records differ.

    A name that only one of them has is no difference: another version of transformers has other settings.
    """
    return [name for name in before if name in now and before[name] != now[name]]


def _check_same_run(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    if differ := differences(before, now):
        changes = "; ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in differ[:3])
        more = f"; {len(differ) - 3} more" * (len(differ) > 3)
        if differ == ["training.max_steps"]:  # the schedule of the learning rate depends on it
            raise RecipeError(
                f"{folder} holds checkpoints of a training of {before[differ[0]]} steps, not {now[differ[0]]}: to go "
                f"on from its result, give model={folder} and another training.output_dir."
            )
        raise RecipeError(
            f"{folder} holds checkpoints of another recipe ({changes}{more}): give another training.output_dir, or "
            "remove the folder."
        )


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries under their names with dots."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _utterances_digest(utterances: Iterable[Utterance]) -> str:
    """Return a digest of file names and transcripts, in order; another machine may keep the files in another folder."""
    return sha256_of([utterance.audio.name, utterance.text] for utterance in utterances)[:12]


def _weights_digest(model: torch.nn.Module) -> str:
    """Return a digest of what earlier stages have trained, aligner and LoRA."""
    return sha256_of(
        parameter.detach().cpu().flatten().view(torch.uint8).numpy()
        for name, parameter in model.named_parameters()
        if name.startswith("bridge.") or "lora_" in name
    )[:12]


def _backbones_digest(model: torch.nn.Module) -> str:
    """Return a digest of encoder and LLM: another folder may hold the same, and the same folder may hold others."""
    return fingerprint(
        {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.startswith(("encoder.", "language_model.")) and "lora_" not in name
        }
    )
