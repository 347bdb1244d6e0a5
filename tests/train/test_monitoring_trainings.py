"""The best model, early stopping and trackers, also of a run that resumes."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import TrainerCallback

from seam.modeling_seam import SeamProcessor
from seam.tests.helpers import training_sounds
from seam.tests.helpers.training_sounds import Killed, changed, weights
from seam.train import alignment, draft, instruction
from seam.train.checkpoints import list_checkpoints
from seam.train.recipe import RecipeError, StageRecipe, build, check_stage
from seam.train.trainer import StageTrainer

pytestmark = pytest.mark.medium

STAGES = {"alignment": alignment, "instruction": instruction, "draft": draft}
BEST = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "stage1_wer",
    "warmup_steps": 0,
}
# By step the word error rate that evaluations report: step 4 is the best of the first even ones.
RATES = {2: 50.0, 4: 20.0, 6: 30.0, 7: 15.0, 8: 40.0, 10: 10.0}


@pytest.fixture(scope="module")
def before(tmp_path_factory, backbones, manifest) -> dict[str, dict]:
    """By stage, what it begins with."""
    folder = str(tmp_path_factory.mktemp("before"))
    new = {"encoder": backbones[0], "llm": backbones[1], "config": {"lora_rank": 4, "lora_dropout": 0.2}}
    alignment.main(training_sounds.recipe(folder, manifest, 20, **new))
    return {
        "alignment": new,
        "instruction": {"model": folder, "llm": backbones[1]},
        "draft": {"model": folder},
    }


@pytest.fixture
def scripted_rates(monkeypatch):
    """Make evaluations report `RATES`."""

    def rates(self) -> dict[str, float]:
        return {"stage1_wer": RATES.get(self.state.global_step, 60.0)}

    for cls in (StageTrainer, draft.DraftTrainer):
        monkeypatch.setattr(cls, "word_error_rates", rates)


def run(folder, manifest, steps, before, stage="alignment", **training):
    values = {key: training.pop(key) for key in ("early_stopping_patience",) if key in training}
    training = {**BEST, **training}
    return STAGES[stage].main(
        training_sounds.recipe(folder, manifest, steps, training=training, **values, **before[stage])
    )


def state(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def evaluated(folder: Path, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in state(folder)["log_history"] if key in row]


@pytest.mark.oldest
@pytest.mark.parametrize("stage", STAGES)
def test_the_best_weights_are_kept_and_reported(stage, scripted_rates, before, manifest, tmp_path):
    metrics = run(tmp_path, manifest, 8, before, stage)
    assert state(tmp_path)["best_global_step"] == 4 and state(tmp_path)["best_metric"] == 20.0
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8"]
    last, best, kept = (weights(tmp_path / name) for name in ("checkpoint-8", "checkpoint-4", "."))
    assert changed(last, best) and not changed(best, kept)
    assert SeamProcessor.from_pretrained(tmp_path / "checkpoint-4").prompt_ids()
    losses = evaluated(tmp_path, "eval_loss")
    assert [step for step, _ in losses] == [2, 4, 6, 8, 8]
    assert metrics["eval_loss"] == dict(losses[:4])[4] != dict(losses[:4])[8]
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]


def test_the_best_is_remembered_where_it_died(scripted_rates, before, manifest, tmp_path, dies_after):
    """Before the best; after it, and then its folder is moved; and when all was done but for the last evaluation."""
    dies_after(None)
    uninterrupted = run(tmp_path / "uninterrupted", manifest, 8, before)
    for count in (3, 4):  # in step 4; then in step 7
        dies_after(count)
        with pytest.raises(Killed):
            run(tmp_path / "begun", manifest, 8, before)
    dies_after(None)
    (tmp_path / "begun").rename(tmp_path / "resumed")
    assert [path.name for path in list_checkpoints(tmp_path / "resumed")] == ["checkpoint-4", "checkpoint-6"]
    for _ in range(2):
        resumed = run(tmp_path / "resumed", manifest, 8, before)
        assert resumed["eval_loss"] == uninterrupted["eval_loss"]
        assert not changed(weights(tmp_path / "uninterrupted"), weights(tmp_path / "resumed"))
        assert state(tmp_path / "resumed")["best_model_checkpoint"] == str(tmp_path / "resumed" / "checkpoint-4")
        for key in ("loss", "eval_loss", "eval_stage1_wer"):
            assert evaluated(tmp_path / "resumed", key)[:8] == evaluated(tmp_path / "uninterrupted", key)[:8]
        dies_after(0)  # nothing is left to be done


def test_the_last_weights_have_their_chance(scripted_rates, before, manifest, tmp_path):
    """Though the step is none of those at which evaluations are due."""
    run(tmp_path, manifest, 7, before)
    assert [step for step, _ in evaluated(tmp_path, "eval_stage1_wer")] == [2, 4, 6, 7, 7]
    assert state(tmp_path)["best_global_step"] == 7
    assert not changed(weights(tmp_path / "checkpoint-7"), weights(tmp_path))


def test_patience_ends_with_the_word_error_rate_also_after_a_resume(
    scripted_rates, before, manifest, tmp_path, dies_after
):
    dies_after(None)
    run(tmp_path / "uninterrupted", manifest, 40, before, early_stopping_patience=2)
    dies_after(7)  # in step 8, with one evaluation in which nothing was better
    with pytest.raises(Killed):
        run(tmp_path / "resumed", manifest, 40, before, early_stopping_patience=2)
    dies_after(2)  # two steps are left
    run(tmp_path / "resumed", manifest, 40, before, early_stopping_patience=2)
    for name in ("uninterrupted", "resumed"):
        assert state(tmp_path / name)["global_step"] == 8 and state(tmp_path / name)["best_global_step"] == 4
        assert not changed(weights(tmp_path / name / "checkpoint-4"), weights(tmp_path / name))
    assert evaluated(tmp_path / "resumed", "loss") == evaluated(tmp_path / "uninterrupted", "loss")
    with pytest.raises(RecipeError, match="early_stopping_patience was 2 and is 3"):
        run(tmp_path / "resumed", manifest, 40, before, early_stopping_patience=3)


def test_a_training_that_begins_with_the_checkpoint_of_another_has_its_own_patience(
    scripted_rates, before, manifest, tmp_path
):
    run(tmp_path / "1", manifest, 6, before)
    begun = {"resume_from_checkpoint": str(tmp_path / "1" / "checkpoint-6"), "max_steps": 10}
    run(tmp_path / "2", manifest, 10, before, early_stopping_patience=2, **begun)
    assert state(tmp_path / "2")["global_step"] == 10
    begun = {"resume_from_checkpoint": str(tmp_path / "2" / "checkpoint-10"), "learning_rate": 1e-4}
    run(tmp_path / "3", manifest, 20, before, early_stopping_patience=1, **begun)
    assert state(tmp_path / "3")["global_step"] == 12


def test_callbacks_get_all_metrics(scripted_rates, before, manifest, tmp_path, monkeypatch):
    told = {"log": [], "evaluate": []}

    class Watcher(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told["log"].append((state.global_step, dict(logs)))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            told["evaluate"].append((state.global_step, dict(metrics)))

    start = StageTrainer.__init__

    def watched(self, **kwargs):
        start(self, **kwargs)
        self.add_callback(Watcher)

    monkeypatch.setattr(StageTrainer, "__init__", watched)
    run(tmp_path, manifest, 4, before)
    rates = [(2, 50.0), (4, 20.0), (4, 20.0)]
    assert [(step, metrics["eval_stage1_wer"]) for step, metrics in told["evaluate"]] == rates
    assert [(step, logs["eval_stage1_wer"]) for step, logs in told["log"] if "eval_loss" in logs] == rates
    speeds = [logs.keys() & {"tokens_per_second", "utilisation"} for _, logs in told["log"] if "loss" in logs]
    assert [len(one) for one in speeds] == [2, 2, 2, 2]


# ---- settings ----


def settings(**training) -> StageRecipe:
    values = {key: training.pop(key) for key in ("early_stopping_patience",) if key in training}
    return build(
        StageRecipe, {"training": {"output_dir": "nowhere", "use_cpu": True, **training}, "data": {}, **values}
    )


@pytest.mark.parametrize(
    ("metric", "is_greater"),
    [
        ("stage1_wer", False),
        ("eval_wer", False),
        ("draft_wer", False),
        ("loss", False),
        ("draft_agreement", True),
    ],
)
def test_less_errors_are_better(metric, is_greater):
    assert settings(metric_for_best_model=metric).training.greater_is_better is is_greater
    assert settings(metric_for_best_model=metric, greater_is_better=True).training.greater_is_better is True


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0; accepted: 1 and above"),
        ({"early_stopping_patience": 2}, "early_stopping_patience .* set training.load_best_model_at_end=true"),
        (
            {"early_stopping_patience": 2, "save_strategy": "best", "load_best_model_at_end": True},
            "set .* training.eval_strategy and training.metric_for_best_model",
        ),
    ],
)
def test_patience_needs_something_to_wait_for(training, message):
    with pytest.raises(RecipeError, match=message):
        settings(**training)


@pytest.mark.parametrize(
    ("stage", "training", "message"),
    [
        ("alignment", {"metric_for_best_model": "wer"}, "'wer'; this stage reports: loss, stage1_wer"),
        ("instruction", {"metric_for_best_model": "cer"}, "'cer'; this stage reports: loss, stage1_wer, wer"),
        ("draft", {"metric_for_best_model": "wer"}, "this stage reports: loss, stage1_wer, draft_wer, draft_agreement"),
        (
            "alignment",
            {"metric_for_best_model": None, "load_best_model_at_end": False, "save_strategy": "best"},
            "save_strategy is 'best', by training.metric_for_best_model; accepted: loss, stage1_wer",
        ),
    ],
)
def test_a_best_that_no_evaluation_tells_is_refused(stage, training, message, before, manifest, tmp_path):
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, manifest, 4, before, stage, **training)


# ---- trackers ----


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_read(monkeypatch):
    for name in ("trackio", "tensorboard", "wandb"):
        monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{name}_available", lambda: False)
        for stage in STAGES:
            with pytest.raises(RecipeError, match=f"report_to: {name} is not installed: pip install {name}$"):
                STAGES[stage].main(settings(report_to=[name]))
    with pytest.raises(RecipeError, match="report_to: 'tensorbord'; accepted: none, .*tensorboard.*"):
        check_stage(settings(report_to="tensorbord"), "alignment")
    assert settings().training.report_to == []


def test_a_resumed_training_continues_its_log(scripted_rates, before, manifest, tmp_path, dies_after, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, log_dir):
            self.log_dir = log_dir

        def add_scalar(self, name, value, step):
            written.append((self.log_dir, name, step))

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    times = iter(range(10))
    monkeypatch.setattr("seam.train.resumable_trainer.time.strftime", lambda _: f"time{next(times)}")
    dies_after(3)
    with pytest.raises(Killed):
        run(tmp_path / "begun", manifest, 4, before, report_to="tensorboard")
    (tmp_path / "begun").rename(tmp_path / "moved")
    dies_after(None)
    first = set(written)
    written.clear()
    run(tmp_path / "moved", manifest, 4, before, report_to="tensorboard")
    assert {Path(folder).relative_to(tmp_path).as_posix() for folder, _, _ in first} == {"begun/runs/begun-time0"}
    assert {Path(folder).relative_to(tmp_path).as_posix() for folder, _, _ in written} == {"moved/runs/begun-time0"}
    assert {step for _, name, step in first if name == "train/loss"} == {1, 2, 3}
    assert {step for _, name, step in written if name == "train/loss"} == {3, 4}
    assert {step for _, name, step in written if name == "eval/stage1_wer"} == {4}
    assert {step for _, name, step in written if name == "train/tokens_per_second"} == {3, 4}
    written.clear()
    run(tmp_path / "new", manifest, 2, before, report_to="tensorboard", run_name="mine")
    assert {Path(folder).name for folder, _, _ in written} == {"mine"}
