"""A training that was interrupted anywhere equals one that was not; which errors end one, and how."""

import json
import logging
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import Trainer

from seam.data import files
from seam.tests.helpers import forked, training_sounds
from seam.tests.helpers.training_sounds import Killed, changed, weights, write_sounds
from seam.train import alignment, draft, instruction, refinement
from seam.train.checkpoints import (
    LOCK,
    RESUME_STATE,
    UNFINISHED,
    is_complete,
    last_checkpoint,
    list_checkpoints,
    read_resume_state,
    remove_old_checkpoints,
    write_resume_state,
)
from seam.train.recipe import RecipeError

pytestmark = pytest.mark.medium

STAGES = {"alignment": alignment, "instruction": instruction, "refinement": refinement, "draft": draft}
# Eight utterances: an epoch has four batches, in steps of three and one. Nothing falls on the same step as all else.
TRAINING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 3,
    "lr_scheduler_type": "cosine",
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 5}
AS_IT_WAS_RUN = ("runtime", "per_second", "hours_per_hour", "utilisation")


def recipe(output_dir, manifest, steps, data=None, **values):
    """Make a recipe that evaluates one utterance, because a model that is hardly trained decodes long outputs."""
    return training_sounds.recipe(output_dir, manifest, steps, data={"validation_limit": 1, **(data or {})}, **values)


@pytest.fixture(scope="module")
def before(tmp_path_factory, backbones, manifest) -> dict[str, dict]:
    """By stage, what it begins with. Dropout everywhere."""
    folder = tmp_path_factory.mktemp("before")
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "dropout": 0.2}
    config = {"lora_rank": 4, "lora_dropout": 0.2, "aligner_config": {**sizes, "max_target_positions": 24}}
    new = {"encoder": backbones[0], "llm": backbones[1], "config": config}
    once = {"training": {"learning_rate": 1e-3}}
    alignment.main(recipe(folder / "1", manifest, 30, **once, **new))
    instruction.main(recipe(folder / "2", manifest, 5, model=str(folder / "1"), llm=backbones[1], **once))
    return {
        "alignment": new,
        "instruction": {"model": str(folder / "1"), "llm": backbones[1]},
        "refinement": {"model": str(folder / "2"), "masking_probability": 0.3, "deletion_probability": 0.3},
        "draft": {"model": str(folder / "1")},
    }


def state(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def history(folder: Path) -> list[dict]:
    """All that was logged, but for the speed."""
    log = state(folder)["log_history"]
    return [{k: v for k, v in row.items() if not k.endswith(AS_IT_WAS_RUN)} for row in log]


def check_same(uninterrupted: Path, resumed: Path):
    assert history(resumed) == history(uninterrupted)
    assert not changed(weights(uninterrupted), weights(resumed))
    names = ("best_metric", "best_global_step", "global_step", "epoch", "total_flos")
    assert [state(resumed)[name] for name in names] == [state(uninterrupted)[name] for name in names]


# Both ends of transformers have to pass it with a trained bridge, and with LoRA and Stage 1's own tokens.
@pytest.mark.parametrize(
    "stage",
    [pytest.param(stage, marks=[pytest.mark.oldest] * (stage in ("alignment", "refinement"))) for stage in STAGES],
)
def test_a_run_killed_anywhere_resumes_exactly(stage, before, manifest, tmp_path, dies_after):
    """In the middle of an epoch, of an accumulation, between two lines of the log; then with workers."""

    def run(name, **workers):
        settings = {"training": {**TRAINING, **EVALUATED, **workers}, "data": {"keep_encoder_states": False}}
        return STAGES[stage].main(recipe(tmp_path / name, manifest, 8, **settings, **before[stage]))

    dies_after(None)
    uninterrupted = run("uninterrupted")
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    for count, kwargs in ((9, workers), (7, {"dataloader_num_workers": 1})):  # in steps 5 and 7
        dies_after(count)
        with pytest.raises(Killed):
            run("resumed", **kwargs)
    dies_after(None)
    resumed = run("resumed")
    assert {k: v for k, v in resumed.items() if not k.endswith((*AS_IT_WAS_RUN, "_dir"))} == {
        k: v for k, v in uninterrupted.items() if not k.endswith((*AS_IT_WAS_RUN, "_dir"))
    }
    check_same(tmp_path / "uninterrupted", tmp_path / "resumed")
    # It could fail: chance has a part in every step, and a step is another one elsewhere.
    assert len({row["loss"] for row in history(tmp_path / "uninterrupted") if "loss" in row}) == 2


@pytest.mark.parametrize(
    ("every", "dies"),
    [
        # The checkpoint of an epoch's last step comes after the evaluation and the line of the log at its end.
        ({"save_strategy": "steps", "save_steps": 2, "eval_strategy": "epoch", "logging_strategy": "epoch"}, 9),
        ({"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}, 9),
        ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}, 10),
    ],
)
def test_the_end_of_an_epoch_is_not_lost(every, dies, before, manifest, tmp_path, dies_after):

    def run(name):
        training = {**TRAINING, **every}
        return alignment.main(recipe(tmp_path / name, manifest, 7, training=training, **before["alignment"]))

    dies_after(None)
    run("uninterrupted")
    for count in (dies, 1):
        dies_after(count)
        with pytest.raises(Killed):
            run("resumed")
    dies_after(None)
    run("resumed")
    check_same(tmp_path / "uninterrupted", tmp_path / "resumed")


def test_what_has_ended_makes_no_step_more(before, manifest, tmp_path, dies_after):
    """Died after the last checkpoint, or started again when all was done."""
    dies_after(None)
    alignment.main(recipe(tmp_path, manifest, 5, training=TRAINING, **before["alignment"]))
    first, trained = history(tmp_path), weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    dies_after(0)
    alignment.main(recipe(tmp_path, manifest, 5, training=TRAINING, **before["alignment"]))
    assert history(tmp_path) == first and not changed(trained, weights(tmp_path))


# ---- which checkpoint ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory, before, manifest) -> Path:
    """Train with three checkpoints; tests that change the folder copy it."""
    folder = tmp_path_factory.mktemp("trained")
    alignment.main(recipe(folder, manifest, 6, training={**TRAINING, "save_steps": 2}, **before["alignment"]))
    return folder


def test_a_checkpoint_is_complete_or_not_there(before, manifest, tmp_path, monkeypatch):
    """The process dies while the third checkpoint is written; what it left is gone when it is started again."""

    def run():
        alignment.main(recipe(tmp_path, manifest, 6, training=TRAINING | {"save_steps": 2}, **before["alignment"]))

    save, written = torch.save, []

    def dying(what, path, *args, **kwargs):
        written.append(Path(path))
        if len(written) == 7:
            raise Killed
        save(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", dying)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # nothing tidies up behind SIGKILL
    with pytest.raises(Killed):
        run()
    monkeypatch.undo()
    assert written[-1].parent.name == "checkpoint-6" and written[-1].parent.parent == tmp_path / UNFINISHED
    assert (written[-1].parent / "model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-6").exists() and last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    run()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize("missing", ["model.safetensors", "optimizer.pt", "trainer_state.json", RESUME_STATE])
def test_a_checkpoint_with_a_part_missing_is_not_taken(missing, trained, tmp_path, caplog):
    folder = shutil.copytree(trained, tmp_path / "copy")
    assert last_checkpoint(folder) == folder / "checkpoint-6"
    (folder / "checkpoint-6" / missing).unlink()
    with (folder / "checkpoint-4" / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(folder) == folder / "checkpoint-2"
    assert caplog.text.count("is not complete") == 2


def test_a_checkpoint_is_on_disk_before_it_has_its_name(trained):
    for step in (2, 4, 6):
        assert is_complete(trained / f"checkpoint-{step}")
    record = json.loads((trained / "checkpoint-4" / RESUME_STATE).read_text())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= set(record["files"])
    assert not (trained / UNFINISHED).exists()


def again(folder, manifest, before, steps=6, data=None, training=None, **values):
    training = {**TRAINING, "save_steps": 2, **(training or {})}
    return recipe(folder, manifest, steps, training=training, data=data or {}, **{**before["alignment"], **values})


def test_another_recipe_is_refused(trained, before, manifest, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "other").mkdir()
    other = write_sounds(tmp_path / "other")
    Path(other).write_text(Path(other).read_text().replace("GOAT", "BOAT"))
    for change, message in (
        ({"training": {"learning_rate": 0.5}}, r"training.learning_rate was 0.003 and is 0.5\): give another"),
        ({"steps": 7, "data": {"casing": "upper"}}, "training.max_steps was 6 and is 7; data.casing was 'lower' and"),
        ({"data": {"train": [other]}}, "utterances was .* and is "),
        ({"config": {**before["alignment"]["config"], "lora_rank": 8}}, "config.lora_rank was 4 and is 8"),
    ):
        with pytest.raises(RecipeError, match=rf"copy holds checkpoints of another recipe \(.*{message}"):
            alignment.main(again(folder, manifest, before, **change))


def test_more_steps_are_another_training_from_its_result(trained, before, manifest, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    with pytest.raises(
        RecipeError, match=rf"a training of 6 steps, not 9: to go on from its result, give model={folder}"
    ):
        alignment.main(again(folder, manifest, before, steps=9))


def test_what_was_trained_on_other_weights_is_refused(before, backbones, manifest, tmp_path):
    shutil.copytree(before["instruction"]["model"], tmp_path / "1")
    settings = {"model": str(tmp_path / "1"), "llm": backbones[1], "training": {"save_strategy": "steps"}}
    instruction.main(recipe(tmp_path / "2", manifest, 2, **settings))
    instruction.main(recipe(tmp_path / "2", manifest, 2, **settings))
    alignment.main(
        recipe(tmp_path / "1", manifest, 2, model=str(tmp_path / "1"))
    )  # the first step has no learning rate
    with pytest.raises(RecipeError, match="another recipe .weights of the model was "):
        instruction.main(recipe(tmp_path / "2", manifest, 2, **settings))


def test_backbones_that_changed_under_their_names_are_refused(before, backbones, manifest, tmp_path):
    encoder = shutil.copytree(backbones[0], tmp_path / "encoder")
    alignment.main(again(tmp_path / "out", manifest, before, steps=2, encoder=str(encoder)))
    alignment.main(again(tmp_path / "out", manifest, before, steps=2, encoder=str(encoder)))
    tensors = load_file(encoder / "model.safetensors")
    next(weight for name, weight in tensors.items() if "encoder.layers.0.fc1.weight" in name)[0, 5] += 1e-6
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="another recipe .weights of the backbones was "):
        alignment.main(again(tmp_path / "out", manifest, before, steps=2, encoder=str(encoder)))


def test_how_it_runs_and_reports_may_change(trained, before, manifest, tmp_path):
    """The manifest and the folder in another place; evaluations, lines of the log and checkpoints at other steps."""
    folder = shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(folder / "checkpoint-6")
    elsewhere = shutil.copytree(Path(manifest).parent, tmp_path / "sounds") / "manifest.jsonl"
    training = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 1,
        "save_steps": 1,
        "per_device_eval_batch_size": 3,
    }
    alignment.main(again(folder, str(elsewhere), before, training=training))
    assert [row["step"] for row in history(folder) if "loss" in row] == [4, 5, 6]
    assert not changed(weights(trained), weights(folder))
    assert (folder / "checkpoint-5").is_dir()


def test_a_checkpoint_with_old_names_of_weights_is_resumed_from(trained, before, manifest, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(folder / "checkpoint-6")
    checkpoint = folder / "checkpoint-4"
    stored, resume_state = load_file(checkpoint / "model.safetensors"), read_resume_state(checkpoint)
    old = {name.replace("bridge.", "aligner.", 1): weight for name, weight in stored.items()}
    assert old.keys() != stored.keys()
    save_file(old, checkpoint / "model.safetensors", metadata={"format": "pt"})
    (checkpoint / RESUME_STATE).unlink()
    write_resume_state(checkpoint, resume_state)
    alignment.main(again(folder, manifest, before))
    check_same(trained, folder)


def test_a_named_checkpoint_is_where_another_training_begins(trained, before, manifest, tmp_path, dies_after):
    """Where that one was interrupted, its own checkpoint comes first."""
    named = {"training": {"resume_from_checkpoint": str(trained / "checkpoint-4"), "learning_rate": 0.0}}
    dies_after(2)  # steps 5 and 6 have three and one
    with pytest.raises(Killed):
        alignment.main(again(tmp_path / "other", manifest, before, steps=8, **named))
    assert not (tmp_path / "other").exists() or last_checkpoint(tmp_path / "other") is None
    dies_after(5)
    with pytest.raises(Killed):
        alignment.main(again(tmp_path / "other", manifest, before, steps=8, **named))
    assert last_checkpoint(tmp_path / "other") == tmp_path / "other" / "checkpoint-6"
    dies_after(4)  # two steps are left
    alignment.main(again(tmp_path / "other", manifest, before, steps=8, **named))
    assert state(tmp_path / "other")["global_step"] == 8
    dies_after(None)
    named["training"]["resume_from_checkpoint"] = str(trained / "checkpoint-6")  # where that training had ended
    alignment.main(again(tmp_path / "longer", manifest, before, steps=8, **named))
    assert state(tmp_path / "longer")["global_step"] == 8
    with pytest.raises(RecipeError, match="resume_from_checkpoint: .*sounds.* is not a checkpoint of a training"):
        wrong = {"training": {"resume_from_checkpoint": str(Path(manifest).parent)}}
        alignment.main(again(tmp_path / "new", manifest, before, **wrong))


def test_old_checkpoints_are_discarded_but_for_the_best(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    remove_old_checkpoints(folder, None, None)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    remove_old_checkpoints(folder, 1, "elsewhere/checkpoint-2")
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-6"]
    remove_old_checkpoints(folder, 1, None)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-6"] and not (folder / UNFINISHED).exists()


# ---- what ends a training ----


def spoil_loss(monkeypatch, batch: int, value: float):
    """Loss `value` in the given micro-batch, from 0."""
    compute, seen = Trainer.compute_loss, iter(range(10**6))

    def spoiled(self, model, *args, **kwargs):
        loss = compute(self, model, *args, **kwargs)
        return loss * value if model.training and next(seen) == batch else loss

    monkeypatch.setattr(Trainer, "compute_loss", spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_training(value, before, manifest, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, 9, value)  # in step 5
    with pytest.raises(
        RecipeError, match=rf"the loss of step 5 is {value}: .* the last checkpoint is .*checkpoint-4\."
    ):
        alignment.main(again(tmp_path, manifest, before))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "checkpoint-4").values())


def test_without_a_checkpoint_it_says_so(before, manifest, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, 2, float("nan"))
    with pytest.raises(RecipeError, match="the loss of step 1 is nan.* ended at step 0; there is no checkpoint yet"):
        alignment.main(again(tmp_path, manifest, before))


def test_no_checkpoint_is_made_of_weights_that_are_no_numbers(before, manifest, tmp_path, monkeypatch):
    """The loss was one, its gradient was not: the next loss would tell, but the checkpoint comes before it."""
    step, seen = Trainer.training_step, iter(range(10**6))

    def spoiled(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if next(seen) == 7:  # the last of step 4
            self.model.bridge.output_projection.weight.grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(Trainer, "training_step", spoiled)
    with pytest.raises(RecipeError, match="after step 4 bridge.* is not finite any more.* checkpoint is .*-2\\."):
        alignment.main(again(tmp_path, manifest, before))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", LOCK}


def test_a_full_disk_ends_the_training(before, manifest, tmp_path, dies_after):
    """A limit on file sizes stands for a full disk. The checkpoint before stays, and the training resumes from it."""
    dies_after(None)
    alignment.main(again(tmp_path / "uninterrupted", manifest, before))
    dies_after(9)
    with pytest.raises(Killed):
        alignment.main(again(tmp_path / "full", manifest, before))
    dies_after(None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint-6 cannot be saved: .*large.* the last checkpoint is .*-4\.$"):
            alignment.main(again(tmp_path / "full", manifest, before))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"checkpoint-2", "checkpoint-4", LOCK}
    alignment.main(again(tmp_path / "full", manifest, before))
    check_same(tmp_path / "uninterrupted", tmp_path / "full")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_audio_file_that_vanishes_ends_the_training(workers, before, tmp_path, monkeypatch):
    manifest = write_sounds(tmp_path)
    step, seen = Trainer.training_step, iter(range(10**6))

    def vanishing(self, *args, **kwargs):
        if next(seen) == 6:  # step 4: the last batch of the epoch
            (tmp_path / "3.wav").unlink()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", vanishing)
    settings = {"training": {"dataloader_num_workers": workers}, "data": {"keep_encoder_states": False}}
    with pytest.raises(OSError) as caught:
        alignment.main(again(tmp_path / "out", manifest, before, steps=20, **settings))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/3.wav: no such audio file. The training has ended at step ")
    assert "the last checkpoint is " in said and "\n" not in said


# ---- killed ----

# `seam`, which kills itself when it is about to compute a micro-batch or to write a part of a checkpoint, after COUNT.
KILLED_AFTER = """
import itertools, os, signal, sys

import torch
from transformers import Trainer

from seam.__main__ import app

count, done = int(sys.argv.pop(1)), itertools.count()

def dying(function):
    def run(*args, **kwargs):
        if next(done) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return run

Trainer.training_step = dying(Trainer.training_step)
torch.save = dying(torch.save)
app()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["alignment", "instruction", "refinement"])
def test_killed_at_random_steps_and_started_again_with_the_same_command(stage, before, manifest, tmp_path):
    """Five times, each time with another number of workers."""
    rng = np.random.default_rng(sorted(STAGES).index(stage))

    def run(name: str, count: int, workers: int) -> int:
        training = {**TRAINING, **EVALUATED, "output_dir": name, "max_steps": 11, "learning_rate": 3e-3}
        training |= {"use_cpu": True, "save_total_limit": 2, "dataloader_num_workers": workers}
        data = {"train": [manifest], "validation": [manifest], "validation_limit": 1}
        values = {**before[stage], "training": training, "data": data}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        command = [sys.executable, "-c", KILLED_AFTER, str(count), "train", stage, "recipe.yaml"]
        return forked.run(command, cwd=tmp_path, timeout=120).returncode

    assert run("uninterrupted", -1, 0) == 0
    counts = rng.permutation([*rng.integers(1, 8, 3), *rng.integers(8, 13, 2)]).tolist()
    for kill, count in enumerate(counts):
        assert run("resumed", count, kill % 3) == -signal.SIGKILL, counts
    assert run("resumed", -1, 1) == 0
    check_same(tmp_path / "uninterrupted", tmp_path / "resumed")
    assert {path.name for path in (tmp_path / "resumed").glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-11"}


def test_an_output_folder_has_one_training(backbones, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0)
    recipe = training_sounds.recipe(tmp_path / "out", manifest, 1, encoder=backbones[0], llm=backbones[1])
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / LOCK),
        pytest.raises(OSError, match="out is being written by another process; wait for it, or give another training"),
    ):
        alignment.main(recipe)
    alignment.main(recipe)
