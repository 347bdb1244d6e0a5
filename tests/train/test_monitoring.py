"""Throughput, the bar and the curves of a training."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from matplotlib import image
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import Trainer

from seam.data.dataset import SpeechReader
from seam.tests.helpers.training_sounds import TEXTS, recipe
from seam.train import alignment, instruction, monitoring, refinement, resumable_trainer
from seam.train.monitoring import Progress, Throughput, plot_training_curves
from seam.train.recipe import RecipeError
from seam.train.trainer import StageTrainer

pytestmark = pytest.mark.medium

KEYS = ("audio_hours_per_hour", "tokens_per_second", "utilisation")


@pytest.fixture
def clock(monkeypatch):
    """Stands still but for what is added to its `now`."""

    class Clock:
        now = 1000.0

        def takes(self, seconds: float, owner, name: str):
            """From now on, each call of `owner.name` takes so long."""
            function = getattr(owner, name)

            def slow(*args, **kwargs):
                self.now += seconds
                return function(*args, **kwargs)

            monkeypatch.setattr(owner, name, slow)

    clock = Clock()
    monkeypatch.setattr(monitoring, "perf_counter", lambda: clock.now)
    return clock


def batch(frames: list[int], tokens: int) -> dict[str, torch.Tensor]:
    """Make a batch of audio with these numbers of frames, and labels with these numbers of tokens, padded."""
    mask = torch.zeros(len(frames), 200, dtype=torch.long)
    for row, length in enumerate(frames):
        mask[row, :length] = 1
    return {"attention_mask": mask, "labels": torch.tensor([[7] * tokens + [-100] * 3])}


def test_a_line_tells_of_what_came_since_the_line_before(clock):
    speed = Throughput(0.01)

    def loader():
        for one in (batch([100, 50], 8), batch([150], 2), batch([100], 5)):
            clock.now += 3  # it takes so long to read
            yield one

    batches = speed.batches(loader())
    for _ in range(2):
        next(batches)
        clock.now += 7  # to learn from
    # 3 s of audio and 10 tokens in 20 s, of which 6 were waiting.
    assert speed.measured() == pytest.approx(
        {"audio_hours_per_hour": 0.15, "tokens_per_second": 0.5, "utilisation": 70}
    )
    with speed.paused():
        clock.now += 500
    assert len(list(batches)) == 1
    clock.now += 1
    assert speed.measured() == pytest.approx(
        {"audio_hours_per_hour": 0.25, "tokens_per_second": 1.25, "utilisation": 25}
    )


def test_starting_the_workers_is_waiting(clock):
    speed = Throughput(0.01)
    speed.on_epoch_begin(None, None, None)
    clock.now += 6
    list(speed.batches(iter([batch([100], 4)])))
    clock.now += 2
    assert speed.measured()["utilisation"] == pytest.approx(25)


def test_ranks_are_added_and_the_one_that_waited_longest_counts(clock, monkeypatch):
    speed = Throughput(0.01)
    monkeypatch.setattr(monitoring, "all_gather", lambda mine: [mine, (300.0, 10.0, 8.0, 6.0)])
    list(speed.batches(iter([batch([500], 30)])))
    clock.now += 10
    assert speed.measured() == pytest.approx({"audio_hours_per_hour": 0.5, "tokens_per_second": 4.0, "utilisation": 40})


def lines(folder: Path) -> list[dict]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in log if "loss" in row]


def seconds(manifest: str, hop: int) -> float:
    """Of all sounds, in whole hops."""
    sounds = [soundfile.info(Path(manifest).parent / f"{index}.wav").frames for index in range(len(TEXTS))]
    return sum(math.ceil(frames / hop) * hop for frames in sounds) / 16000


READ, STEP = 1.0, 2.0  # seconds of an utterance, and of a batch


@pytest.mark.parametrize(
    ("data", "steps", "hop"),
    [
        ({}, {}, 160),
        ({"batch_seconds": 4.0}, {}, 160),
        ({"streaming": True}, {"max_steps": 8}, 160),
        ({"keep_encoder_states": True}, {}, 320),
    ],
)
def test_an_epoch_counts_the_audio_and_the_tokens_of_the_data_set(
    data, steps, hop, clock, processor, backbones, manifest, tmp_path, monkeypatch
):
    clock.takes(READ, SpeechReader, "__call__")
    clock.takes(STEP, Trainer, "training_step")
    clock.takes(100, resumable_trainer, "write_resume_state")
    clock.takes(100, StageTrainer, "word_error_rates")
    training = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2, **steps}
    training |= {"logging_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 1}
    training |= {"save_strategy": "steps", "save_steps": 1}
    if "streaming" in data:
        training |= {"logging_strategy": "steps", "logging_steps": 4}
    settings = {"encoder": backbones[0], "llm": backbones[1], "training": training}
    alignment.main(recipe(tmp_path, manifest, -1, data={"keep_encoder_states": False, **data}, **settings))
    rows = lines(tmp_path)
    batches = rows[0]["step"]
    reading = 0 if "keep_encoder_states" in data else len(TEXTS) * READ
    took = batches * STEP + reading
    tokens = sum(len(processor.transcript_ids(text)) + 1 for text in TEXTS)
    expected = (seconds(manifest, hop) / took, tokens / took, 100 * batches * STEP / took)
    assert len(rows) == 2
    for row in rows:
        assert [row[key] for key in KEYS] == pytest.approx(expected)


def test_stage_3_counts_no_audio_where_it_reads_none(clock, backbones, manifest, tmp_path):
    clock.takes(STEP, Trainer, "training_step")
    config = {"lora_rank": 4, "llm_inputs": "nearest"}
    alignment.main(recipe(tmp_path / "1", manifest, 20, encoder=backbones[0], llm=backbones[1], config=config))
    instruction.main(recipe(tmp_path / "2", manifest, 1, model=str(tmp_path / "1"), llm=backbones[1]))
    refinement.main(recipe(tmp_path / "3", manifest, 1, model=str(tmp_path / "2"), training={"logging_steps": 1}))
    (row,) = lines(tmp_path / "3")
    assert "audio_hours_per_hour" not in row
    assert row["tokens_per_second"] > 0 and row["utilisation"] == 100


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


LOG = [
    {"loss": 8.0, "learning_rate": 1e-4, "tokens_per_second": 90.0, "utilisation": 80.0, "grad_norm": 1.0, "step": 5},
    {"eval_loss": 6.0, "eval_stage1_wer": 250.0, "eval_runtime": 3.0, "step": 5},
    {"loss": 0.5, "learning_rate": 5e-4, "tokens_per_second": 100.0, "utilisation": 90.0, "grad_norm": 2.0, "step": 10},
    {"eval_loss": 7.0, "eval_stage1_wer": 50.0, "eval_runtime": 3.0, "step": 10},
    {"train_loss": 4.0, "train_runtime": 9.0, "step": 10},
    {"eval_loss": 6.0, "eval_stage1_wer": 20.0, "eval_runtime": 3.0, "step": 10},  # of the best weights
]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Those that are saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: saved.append(self) or save(self, *args, **kwargs)
    )
    return saved


def test_a_panel_for_each_number_that_there_is(figures, tmp_path):
    plot_training_curves(LOG, tmp_path / "curves.png", "a title")
    (figure,) = figures
    assert figure.get_suptitle() == "a title"
    drawn = {
        axes.get_title(): {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
        for axes in figure.axes
    }
    assert list(drawn) == [
        "loss",
        "word error rate on the validation set",
        "learning rate",
        "throughput: transcripts",
        "utilisation: not waiting for data",
    ]
    assert drawn["loss"] == {"training": [(5, 8.0), (10, 0.5)], "validation": [(5, 6.0), (10, 7.0)]}
    assert drawn["word error rate on the validation set"] == {"Stage 1": [(5, 250.0), (10, 50.0)]}
    assert [axes.get_ylabel() for axes in figure.axes] == ["", "%", "", "tokens per second", "% of the time"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] + 4 * ["linear"]
    assert figure.axes[1].get_ylim() == (0, 105)
    assert image.imread(tmp_path / "curves.png").shape[1] > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_the_best_step_is_marked(figures, tmp_path):
    plot_training_curves(LOG, tmp_path / "curves.png", "a title", best_step=5)
    assert figures[0].get_suptitle() == "a title\nbest, and kept: step 5 (dashed)"
    for axes in figures[0].axes:
        assert list(axes.lines[-1].get_xdata()) == [5, 5] and axes.lines[-1].get_linestyle() == "--"


def test_a_training_leaves_its_curves(backbones, manifest, tmp_path, figures):
    """Those of all its steps, where it was resumed; and of the last evaluation alone, where it ends soon."""
    settings = {"encoder": backbones[0], "llm": backbones[1]}
    training = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    alignment.main(recipe(tmp_path / "begun", manifest, 3, training=training, **settings))
    training["resume_from_checkpoint"] = str(tmp_path / "begun" / "checkpoint-2")
    alignment.main(recipe(tmp_path / "other", manifest, 4, training=training, **settings))
    alignment.main(recipe(tmp_path / "short", manifest, 1, **settings))
    assert [list(figure.axes[0].lines[0].get_xdata()) for figure in figures] == [[1, 2, 3], [1, 2, 3, 4], [1]]
    assert len(figures[2].axes) == 2  # loss and word error rate
    log = json.loads((tmp_path / "other" / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in log if "loss" in row]
    assert list(figures[1].axes[0].lines[0].get_ydata()) == losses
    for name in ("begun", "other", "short"):
        assert (tmp_path / name / "curves.png").is_file()
