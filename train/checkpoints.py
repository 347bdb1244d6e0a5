"""
Checkpoints from which a training goes on exactly: found by themselves, whole or not there, and refused to another
recipe.

A folder `checkpoint-STEP` appears by a rename, when all of it is on disk. It holds `resume.json`, which says from what
settings, data and weights the training comes, what the Trainer leaves out of its own state, and the size of each file.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME

from seam.data.files import write_text
from seam.data.manifest import Utterance
from seam.modeling_seam.weights import weight_files
from seam.train.recipe import RecipeError, StageRecipe

logger = logging.getLogger(__name__)

RECORD = "resume.json"
# The Trainer takes it for none of its checkpoints, and leaves it out when it uploads the folder.
UNFINISHED = "checkpoint-unfinished"

# Settings of where and how a training runs and what it reports; what it learns does not depend on them. The manifests
# stand for their utterances, which are compared themselves.
FREE = re.compile(
    r"data\.(train|validation|eval_batch_size|keep_encoder_states|encoder_states)$|(alignment_cache|aligned_embeds)$|training\.("
    r"output_dir|resume_from_checkpoint|restore_callback_states_from_checkpoint|remove_unused_columns|do_\w+"
    r"|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|multiprocessing_context)"
    r"|(log|logging|eval|save|hub|push|trackio)_\w+|per_device_eval_batch_size|load_best_model_at_end|report_to"
    r"|(gradient|activation)_checkpointing(_kwargs)?|run_name|project|disable_tqdm|enable_jit_checkpoint|skip_memory_metrics|local_rank|ddp_\w+)$"
)


def origin(recipe: StageRecipe, model: torch.nn.Module, *data: Iterable[Utterance]) -> dict[str, Any]:
    """
    All that a training depends on, by name, as JSON gives it back.

    Args:
        model: at the beginning of the training.
        data: training and validation utterances.
    """
    values = {**vars(recipe), "training": recipe.training.to_dict(), "data": asdict(recipe.data)}
    values["processor"] = asdict(recipe.processor)
    settings = {name: value for name, value in _flat(values) if not FREE.match(name)}
    settings["processes"] = recipe.training.world_size
    if recipe.data.streaming:  # its utterances are not known, but where they are read from
        settings["data.train"] = recipe.data.train
    settings["utterances"] = [_utterances_digest(utterances) for utterances in data]
    if recipe.model is not None:
        settings["weights of the model"] = _weights_digest(model)
    return json.loads(json.dumps(settings, default=str))


def find_checkpoint(recipe: StageRecipe, begun: dict[str, Any]) -> Path | None:
    """
    Where the training goes on: the last whole checkpoint in `training.output_dir`, else the one that
    `training.resume_from_checkpoint` names.

    Args:
        begun: see `origin`.

    Raises:
        RecipeError: the folder's checkpoints are of another recipe, or the named one is none.
    """
    folder, named = Path(recipe.training.output_dir), recipe.training.resume_from_checkpoint
    last = last_checkpoint(folder)
    if last is not None:
        _check_same(read_record(last)["origin"], begun, folder)
    elif named is not None:
        last = Path(named)
        if not (last / TRAINER_STATE_NAME).is_file():
            raise RecipeError(f"training.resume_from_checkpoint: {named} is no checkpoint that can be gone on from.")
    if last is not None:
        logger.warning("The training goes on from %s.", last)
    return last


def last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a training's output folder; others are left alone, and named in the log."""
    for checkpoint in reversed(numbered(folder)):
        if is_whole(checkpoint):
            return checkpoint
        logger.warning("%s is not whole, or was not written to be gone on from: ignored.", checkpoint)
    return None


def numbered(folder: Path) -> list[Path]:
    """The folders `checkpoint-STEP`, whole or not, by step."""
    steps = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()}
    return [steps[step] for step in sorted(steps)]


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of it is there, at the size that it was written with."""
    try:
        files = read_record(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What `seal` wrote; empty where there is nothing."""
    path = checkpoint / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a checkpoint whose other files are written, and wait until all are on disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_text(folder / RECORD, json.dumps({**record, "files": sizes}, indent=1) + "\n")
    # A process that dies loses nothing of what it wrote; a machine that is switched off would.
    for path in (*files, folder / RECORD):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def read_trained(model: torch.nn.Module, checkpoint: Path) -> None:
    """
    Put the trained parameters of a checkpoint, and no others, into the model. Raises `RecipeError` when it lacks one.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for file in weight_files(checkpoint):
        with safe_open(file, framework="pt") as opened:
            for name in trained.keys() & set(opened.keys()):
                trained.pop(name).data.copy_(opened.get_tensor(name))
    if trained:
        raise RecipeError(f"{checkpoint} does not hold {next(iter(trained))}, which this recipe trains.")


def discard(folder: Path) -> None:
    """Remove a folder; where that is interrupted, what is left of it looks like no checkpoint."""
    aside = folder.with_name(UNFINISHED)
    if folder != aside:
        shutil.rmtree(aside, ignore_errors=True)
        folder.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def discard_old(folder: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints (all by default), the last and the `best` one in any case, as the Trainer does."""
    checkpoints = numbered(folder)
    kept = {checkpoints[-1].name, Path(best).name if best else checkpoints[-1].name}
    too_many = len(checkpoints) - max(limit, len(kept)) if limit else 0
    for checkpoint in [path for path in checkpoints if path.name not in kept][: max(too_many, 0)]:
        discard(checkpoint)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write files to, which are moved to `folder` at the end, each of them as a whole."""
    aside = folder / UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        for path in aside.iterdir():
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two origins differ. What only one of two versions of a library has is no difference."""
    return [name for name in before if name in now and before[name] != now[name]]


def _check_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    if differ := differences(before, now):
        changes = "; ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in differ[:3])
        more = f"; {len(differ) - 3} more" * (len(differ) > 3)
        raise RecipeError(
            f"{folder} holds checkpoints of another recipe ({changes}{more}): give another training.output_dir, or "
            "remove the folder."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _utterances_digest(utterances: Iterable[Utterance]) -> str:
    """Of names and texts in their order: a corpus may lie elsewhere on another machine."""
    digest = hashlib.sha256()
    for utterance in utterances:
        digest.update(json.dumps([utterance.audio.name, utterance.text]).encode())
    return digest.hexdigest()[:12]


def _weights_digest(model: torch.nn.Module) -> str:
    """Of what earlier stages have trained, aligner and LoRA; the backbones are known by their names."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name.startswith("aligner.") or "lora_" in name:
            digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
