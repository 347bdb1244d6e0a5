"""What is counted between two lines of the log, and what of the time is not; by a clock that goes as it is told."""

import json
import math
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import Trainer

from seam.data.dataset import SpeechReader
from seam.tests.train.sounds import TEXTS, recipe
from seam.train import alignment, instruction, refinement, resuming, throughput
from seam.train.stage import StageTrainer
from seam.train.throughput import Throughput

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
    monkeypatch.setattr(throughput, "perf_counter", lambda: clock.now)
    return clock


def batch(frames: list[int], tokens: int) -> dict[str, torch.Tensor]:
    """Audio of so many frames each, and labels of so many tokens beside padding."""
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
    monkeypatch.setattr(throughput, "of_all_ranks", lambda mine: [mine, (300.0, 10.0, 8.0, 6.0)])
    list(speed.batches(iter([batch([500], 30)])))
    clock.now += 10
    assert speed.measured() == pytest.approx({"audio_hours_per_hour": 0.5, "tokens_per_second": 4.0, "utilisation": 40})


def lines(folder: Path) -> list[dict]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in log if "loss" in row]


def seconds(manifest: str, hop: int) -> float:
    """Of all sounds, in whole hops."""
    sounds = [soundfile.info(Path(manifest).parent / f"{place}.wav").frames for place in range(len(TEXTS))]
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
    clock.takes(100, resuming, "seal")
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
