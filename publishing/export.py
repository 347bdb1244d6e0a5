"""Export a checkpoint as a publishable folder: weights, code, configuration, processor, results and card."""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers.utils import cached_file

from seam.modeling_seam import SeamForSpeechRecognition, load_checkpoint
from seam.modeling_seam.saving import NEW, OLD, complete_save, export_folder, save_lora
from seam.modeling_seam.weights import backbone_record
from seam.publishing.card import write_card

# What training and evaluation leave beside the weights, from which the card is made.
RESULT_FILES = ("card.json", "table.json", "table.png", "results.json", "results.png")


def export(
    model: str,
    target: Path,
    light: bool = False,
    adapter: bool = False,
    merge: bool = False,
    encoder: str | None = None,
    llm: str | None = None,
    model_id: str | None = None,
) -> Path:
    """
    Export a checkpoint as a folder that loads without this package.

    An existing checkpoint at `target` is replaced once the new one is complete.

    Args:
        model: folder or Hub id.
        target: the folder to write.
        light: save only what was trained; the backbones are named by Hub id and commit.
        adapter: also save LoRA as `adapter/`, a folder that `peft` loads onto the language model.
        merge: fold LoRA into the language model.
        encoder, llm: Hub ids of the backbones, for a light folder of a checkpoint that was trained from folders.
        model_id: name in the card's snippets; by default the folder's.

    Returns:
        `target`.

    Raises:
        ValueError: when `target` is anything but a SEAM checkpoint, or a light folder is impossible because no
            backbones are named or their weights are not this checkpoint's.
    """
    if light and merge:
        raise ValueError("a light folder holds LoRA, and a merged one has none: choose one of the two.")
    complete_save(target)
    if target.exists() and not _is_replaceable(target):
        raise ValueError(f"{target} exists and is not a SEAM checkpoint; choose another folder.")
    seam, processor = load_checkpoint(model)
    if encoder is not None or llm is not None:
        if encoder is None or llm is None:
            raise ValueError(f"name both backbones, encoder (is {encoder}) and llm (is {llm}), or neither.")
        seam.config.backbones = {role: _record(role, name) for role, name in (("encoder", encoder), ("llm", llm))}
    elif light and not seam.config.backbones:
        raise ValueError(
            f"{model} was trained from folders, which others do not have: name its backbones by --encoder ID and "
            "--llm ID."
        )
    if adapter and (seam.config.alignment_only or not seam.config.lora_rank):
        raise ValueError(f"{model} has no LoRA to write as an adapter folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging, old = export_folder(target, NEW), export_folder(target, OLD)
    shutil.rmtree(staging, ignore_errors=True)  # left by an interrupted export
    shutil.rmtree(old, ignore_errors=True)
    try:
        if merge:
            seam.merge_lora()
        seam.save_pretrained(staging, light=light)
        processor.save_pretrained(staging)
        for name in RESULT_FILES:
            found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                shutil.copyfile(found, staging / name)
        if adapter:
            save_lora(seam.language_model, staging / "adapter")
        write_card(seam, processor, staging, model_id or target.name)
        if light:
            _check_reloaded(seam, staging)
        if target.exists():
            os.rename(target, old)
        os.rename(staging, target)
    finally:
        if old.exists() and not target.exists():  # the second rename failed
            os.rename(old, target)
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _is_replaceable(folder: Path) -> bool:
    """Return whether a folder is empty or holds a SEAM checkpoint."""
    if folder.is_dir() and not any(folder.iterdir()):
        return True
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "seam"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _record(role: str, name: str) -> dict[str, str]:
    """Return the Hub id and commit of a backbone."""
    record = backbone_record(name)
    if record is None:
        raise ValueError(f"{role} {name} is a folder, which others do not have; give the id of a Hub repository.")
    return record


def _check_reloaded(model: SeamForSpeechRecognition, folder: Path) -> None:
    """Raise `ValueError` unless a light folder with its backbones has the weights of the model it was saved from."""
    reloaded = SeamForSpeechRecognition.from_pretrained(folder, dtype=model.dtype).state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor.cpu(), reloaded[name].cpu()):
            raise ValueError(
                f"{name} differs from the named backbones ({model.config.backbones}), which were trained further or "
                "are not this checkpoint's. Save a full checkpoint instead."
            )
