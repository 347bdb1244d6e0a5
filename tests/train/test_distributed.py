"""Two processes train as one does with a batch twice as large, see each utterance once, and leave one checkpoint."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from seam.tests.helpers import forked, rank_stages
from seam.tests.helpers.training_sounds import TEXTS, changed, weights
from seam.train.distributed import all_gather, map_over_ranks, shard, unsharded

pytestmark = pytest.mark.medium

RANK_STAGES = Path(rank_stages.__file__)
RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = ["alignment", "draft", "instruction", "refinement"]


@pytest.fixture(scope="module")
def one_process(once, manifest, backbones) -> Path:
    return once("one_process", lambda folder: rank_stages.train_all(folder, manifest, *backbones))


def run_two(folder: Path, launcher: list[str], *arguments: str) -> None:
    command = [sys.executable, "-m", *launcher, str(RANK_STAGES), str(folder), *arguments]
    done = forked.run(command)
    assert done.returncode == 0, done.stderr[-14000:]
    assert "find_unused_parameters" not in done.stderr  # what torch warns of when it looks for them in vain


@pytest.fixture(scope="module")
def two_processes(once, manifest, backbones) -> Path:
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return once("two_processes", lambda folder: run_two(folder, launcher, manifest, *backbones))


@pytest.fixture(scope="module")
def two_that_share(once, manifest, backbones) -> Path:
    launcher = ["accelerate.commands.launch", "--config_file", str(RECIPES / "accelerate" / "fsdp.yaml")]
    launcher += ["--num_processes", "2", "--main_process_port", "0"]
    return once("two_that_share", lambda folder: run_two(folder, launcher, manifest, *backbones))


def history(folder: Path, key: str) -> list[float]:
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in entries if key in entry]


def assert_same(one: Path, two: Path):
    """Compare two trainings that add in different orders, which changes a loss in fp32 by far less than 1e-4 of it."""
    steps = 1 if one.name in rank_stages.ACCUMULATED else 2
    for key, count in {"loss": rank_stages.EPOCHS * steps, "grad_norm": rank_stages.EPOCHS * steps}.items():
        losses = history(one, key)
        assert len(losses) == count and len(set(losses)) == count
        np.testing.assert_allclose(history(two, key), losses, rtol=1e-4)
    np.testing.assert_allclose(history(two, "eval_loss"), history(one, "eval_loss"), rtol=1e-4)
    for rate in ("eval_stage1_wer", "eval_wer", "eval_draft_wer", "eval_draft_agreement"):
        assert history(two, rate) == history(one, rate)
    before, after = weights(one), weights(two)
    assert changed(before, after) != set(before)  # what is frozen is bit-equal
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_learn_what_one_learns(stage, one_process, two_processes):
    assert_same(one_process / stage, two_processes / stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_that_share_the_model_learn_what_one_learns(stage, one_process, two_that_share):
    assert_same(one_process / stage, two_that_share / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_an_epoch_is_the_data_set_once(stage, two_processes):
    given = [
        [json.loads(line) for line in (two_processes / stage / f"given-{rank}.jsonl").read_text().splitlines()]
        for rank in (0, 1)
    ]
    assert [len(rows) for rows in given] == [2 * rank_stages.EPOCHS] * 2
    for epoch in range(rank_stages.EPOCHS):
        batches = [rows[2 * epoch + position] for position in (0, 1) for rows in given]
        assert sorted(map(len, batches)) == [1, 2, 2, 2]
        rows = [tuple(label for label in row if label != -100) for batch in batches for row in batch]
        assert len(set(rows)) == len(rows) == rank_stages.UTTERANCES < len(TEXTS)


def test_the_encoder_reads_for_both(one_process, two_processes):
    shards = [sorted(path.name for path in (folder / "states").glob("*")) for folder in (one_process, two_processes)]
    assert shards[0] == shards[1] != []


@pytest.mark.parametrize("stage", STAGES)
def test_the_speed_is_that_of_all_ranks(stage, one_process, two_processes):
    """The ratio of audio to tokens does not depend on the time that a step took."""

    def seconds_per_token(folder):
        return np.divide(history(folder, "audio_hours_per_hour"), history(folder, "tokens_per_second"))

    one = seconds_per_token(one_process / stage)
    assert len(set(one)) > 1 or stage in rank_stages.ACCUMULATED  # in which a step is the data set
    np.testing.assert_allclose(seconds_per_token(two_processes / stage), one)
    assert all(0 < share <= 100 for share in history(two_processes / stage, "utilisation"))


def test_all_ranks_end_with_the_best_weights(two_processes):
    first, second, kept = history(two_processes / "alignment", "eval_loss")
    assert first > second
    np.testing.assert_allclose(kept, first, rtol=1e-6)


def test_one_rank_saves_and_nothing_is_left_over(two_processes):
    for stage in STAGES:
        assert not (two_processes / stage / ".saving").exists()
        assert (two_processes / stage / "model.safetensors").is_file()


def test_a_single_process_is_its_only_rank(model):
    assert all_gather("mine") == ["mine"]
    assert shard([1, 2, 3]) == [1, 2, 3]
    assert map_over_ranks(lambda items: [2 * item for item in items], range(3)) == [0, 2, 4]
    assert unsharded(model) is model
