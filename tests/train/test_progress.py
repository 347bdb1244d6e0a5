"""What the bar of a training shows."""

from types import SimpleNamespace

import pytest
from tqdm.auto import tqdm

from seam.tests.train.sounds import recipe
from seam.train import alignment
from seam.train.progress import Progress
from seam.train.recipe import RecipeError


def state(step: int, is_first: bool = True):
    return SimpleNamespace(global_step=step, max_steps=20, is_world_process_zero=is_first)


def test_the_time_left_counts_the_steps_of_this_run():
    """Resumed at step 10. Two steps in 8 s, an evaluation among them: 32 s for the eight that are left."""
    progress = Progress()
    progress.on_train_begin(None, state(10), None)
    for step in (11, 12):
        progress.on_step_end(None, state(step), None)
    shown = {**progress.training_bar.format_dict, "elapsed": 8}
    progress.on_train_end(None, state(12), None)
    assert "12/20 [00:08<00:32" in tqdm.format_meter(**shown)


def test_other_ranks_show_nothing(capsys):
    progress = Progress()
    for event in (progress.on_train_begin, progress.on_step_end, progress.on_train_end):
        event(None, state(10, is_first=False), None)
    assert progress.training_bar is None and capsys.readouterr().err == ""


@pytest.mark.parametrize("disabled", [True, False])
def test_a_training_shows_it_unless_it_is_disabled(disabled, backbones, manifest, tmp_path, capsys):
    training = {"disable_tqdm": disabled, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    settings = {"encoder": backbones[0], "llm": backbones[1]}
    alignment.main(recipe(tmp_path / "begun", manifest, 3, training=training, **settings))
    capsys.readouterr()
    training["resume_from_checkpoint"] = str(tmp_path / "begun" / "checkpoint-2")
    alignment.main(recipe(tmp_path / "other", manifest, 5, training=training, **settings))
    shown = capsys.readouterr().err
    bars = [part for part in shown.replace("\r", "\n").splitlines() if "step/s" in part]
    assert bool(bars) != disabled
    if not disabled:
        assert "2/5" in bars[0] and "5/5" in bars[-1] and "0/5" not in shown


def test_an_error_has_a_line_of_its_own(backbones, manifest, tmp_path, capsys):
    settings = {"encoder": backbones[0], "llm": backbones[1]}
    training = {"disable_tqdm": False, "learning_rate": 1e30, "warmup_steps": 0}
    with pytest.raises(RecipeError, match="lower the learning rate"):
        alignment.main(recipe(tmp_path, manifest, 5, training=training, **settings))
    shown = capsys.readouterr().err
    assert "step/s]" in shown and shown.endswith("\n")
