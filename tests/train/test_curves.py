"""The picture of a training: what is drawn of the log, and what is not."""

import json

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from seam.tests.train.sounds import recipe
from seam.train import alignment
from seam.train.curves import write_curves

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
    write_curves(LOG, tmp_path / "curves.png", "a title")
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
    write_curves(LOG, tmp_path / "curves.png", "a title", best_step=5)
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
