"""A save or an export that was killed between two renames is completed when the checkpoint is loaded."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from seam.modeling_seam import SeamConfig, SeamForSpeechRecognition, SeamProcessor, load_checkpoint
from seam.modeling_seam.saving import COMPLETE, LIST, NEW, OLD, export_folder, saved_together
from seam.processing_seam import DEFAULT_INSTRUCTION

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def logits(processor, waveforms):
    inputs = processor(audio=waveforms[:2], text=["one two three", "stop"])

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**inputs).logits

    return logits


def load(folder, **options) -> SeamForSpeechRecognition:
    return SeamForSpeechRecognition.from_pretrained(folder, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(model) -> SeamForSpeechRecognition:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    return model


class Killed(BaseException):
    """What no code is prepared for."""


def die_before(monkeypatch, count: int) -> None:
    """Make the process die before its rename or replacement `count`, from 0."""
    moves = iter(range(10**6))

    def dying(move):
        def moving(*arguments):
            if next(moves) == count:
                raise Killed
            return move(*arguments)

        return moving

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


@pytest.mark.medium
@pytest.mark.parametrize("shards", ["1GB", "100KB"])
def test_killed_between_any_two_renames_all_is_as_before_or_as_after(
    build_model, processor, logits, tmp_path, monkeypatch, shards
):
    model = build_model()
    processor.save_pretrained(tmp_path / "before")
    model.save_pretrained(tmp_path / "before", max_shard_size=shards)
    before = content(tmp_path / "before")
    processor = SeamProcessor.from_pretrained(tmp_path / "before")
    processor.instruction = "Write down what you hear:"
    model.config.prompt_token_ids = processor.prompt_ids()
    new = logits(changed(model))
    with saved_together(tmp_path / "after") as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
    after = content(tmp_path / "after")
    for count in range(1 + len(after)):
        folder = Path(shutil.copytree(tmp_path / "before", tmp_path / f"{count}"))
        with monkeypatch.context() as patched, pytest.raises(Killed), saved_together(folder) as staging:
            shutil.copytree(tmp_path / "after", staging, dirs_exist_ok=True)
            die_before(patched, count)
        if count in (0, 1, len(after)):
            again, fits = load_checkpoint(str(folder))
            assert torch.equal(logits(again), new) == (count > 0)
            assert fits.instruction == (processor.instruction if count else DEFAULT_INSTRUCTION)
        else:
            load(folder)
        assert content(folder) == (after if count else before)  # the older shards are gone, too


def test_a_config_that_was_read_before_its_save_was_completed_is_not_used(build_model, tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    config = SeamConfig.from_pretrained(tmp_path)
    changed(model).save_pretrained(tmp_path / "new")
    (tmp_path / "new" / LIST).write_text('["model.safetensors", "config.json"]')
    (tmp_path / "new").rename(tmp_path / COMPLETE)
    with pytest.raises(OSError, match="held a save that was interrupted, which is completed now: load it again"):
        load(tmp_path, config=config)
    assert torch.equal(load(tmp_path).state_dict()[name := lora(model)], model.state_dict()[name])


def lora(model) -> str:
    return next(name for name in model.state_dict() if "lora_B" in name)


@pytest.mark.parametrize("damage", ["{", "3"])
def test_a_save_that_cannot_be_completed_is_named(build_model, tmp_path, damage):
    build_model().save_pretrained(tmp_path)
    (tmp_path / COMPLETE).mkdir()
    (tmp_path / COMPLETE / LIST).write_text(damage)
    with pytest.raises(OSError, match="holds a save that was interrupted and cannot be completed: "):
        load(tmp_path)


@pytest.mark.parametrize("aside", [(NEW, OLD), (OLD,)])
def test_an_export_killed_between_its_renames_is_completed_at_load(build_model, tmp_path, aside):
    target, model = tmp_path / "exported", build_model()
    for name in aside:
        model.save_pretrained(export_folder(target, name))
        changed(model)
    first = load(export_folder(target, aside[0])).state_dict()
    assert torch.equal(load(target).state_dict()[lora(model)], first[lora(model)])
