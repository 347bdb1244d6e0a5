"""That both sides are of equal size and read as much."""

from unittest.mock import patch

import pytest
import torch

from seam.bench.training import training_measurements
from seam.bench.training.baselines import ChatData, WhisperData
from seam.bench.training.step_timing import Training
from seam.bench.training.trainer_builders import BUILDERS, speech
from seam.bench.training.training_setup import Setting, sizes_of, write_speech


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("systems")
    return Setting("tiny", "cpu", 2, 3, write_speech(folder / "speech", 6, 2.0), folder)


def trained(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_recordings_fill_the_window(setting):
    assert len(setting.utterances) == 6
    # The shortest recording that is shipped has 0.59 s: less is left.
    assert all(2 - 0.6 < utterance.duration <= 2 for utterance in setting.utterances)


def test_both_sides_hear_and_learn_the_same(setting):
    own, baseline = speech(setting), WhisperData(setting)
    for place in range(len(own)):
        torch.testing.assert_close(own[place]["input_features"], baseline[place]["input_features"], rtol=0, atol=0)
        assert [*own[place]["token_ids"].tolist(), 2] == baseline[place]["labels"].tolist()  # 2: <|im_end|>


def test_stage_1_and_its_baseline_train_as_much(setting):
    stage_1, baseline, with_table = (
        BUILDERS[name](setting)().model for name in ("stage_1", "whisper", "whisper_with_table")
    )
    projections = 2 * 64 * 128  # of the aligner, to and from the embeddings of the language model
    assert trained(stage_1) == trained(baseline) + projections
    assert trained(with_table) == trained(baseline) + 1000 * 64
    size = sum(parameter.numel() for parameter in baseline.model.encoder.parameters())
    assert size == sum(parameter.numel() for parameter in stage_1.encoder.parameters())


def test_stage_2_and_its_baseline_train_and_read_as_much(setting):
    stage_2, baseline = BUILDERS["stage_2"](setting)(), BUILDERS["peft"](setting)()
    # Of two layers the seven matrices, in and out, at rank 32.
    sides = {"q": (128, 64), "k": (128, 32), "v": (128, 32), "o": (64, 128), "up": (128, 128)}
    assert trained(baseline.model) == 2 * 32 * (sum(map(sum, sides.values())) + 2 * sum(sides["up"]))
    assert trained(stage_2.model) == trained(baseline.model)
    item = speech(setting)[0]
    inputs = stage_2.data_collator([item])
    with patch.object(stage_2.model.language_model, "forward", side_effect=RuntimeError) as read:
        with pytest.raises(RuntimeError):
            stage_2.model(**inputs, use_llm=True)
    positions = read.call_args.kwargs["inputs_embeds"].shape[1]
    chat = ChatData(setting)[0]
    assert len(chat["input_ids"]) == positions + 1  # the end, from which nothing is predicted
    assert chat["labels"][-len(item["token_ids"]) - 1 :] == inputs["labels"][0].tolist()
    assert set(chat["labels"][: -len(item["token_ids"]) - 1]) == {-100}


def test_other_batches_are_no_comparison(setting, monkeypatch):
    given = {"stage_1": [[[1, 2]]], "whisper": [[[1, 3]]]}
    monkeypatch.setattr(training_measurements, "BUILDERS", dict.fromkeys(given, lambda setting: None))
    monkeypatch.setattr(
        training_measurements,
        "train_in_turn",
        lambda *_: {name: [Training(1.0, batches, 1)] for name, batches in given.items()},
    )
    with pytest.raises(RuntimeError, match="whisper was given other batches than stage_1"):
        training_measurements.compare_trainings(
            setting, training_measurements.Findings(), "stage_1", ["stage_1", "whisper"], 1
        )


def test_the_sizes_of_the_recipes():
    small, paper = sizes_of("small"), sizes_of("paper")
    assert (small.whisper.d_model, small.whisper.decoder_layers, small.llm.hidden_size) == (1024, 24, 1024)
    assert (paper.whisper.d_model, paper.whisper.decoder_layers, paper.llm.hidden_size) == (1280, 32, 2560)
    assert small.window == paper.window == 30 and paper.fields["lora_rank"] == 32
