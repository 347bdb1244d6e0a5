"""Batches: padding, end tokens, and what is kept in memory equals what is computed."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from seam.data.dataset import SpeechCollator, SpeechDataset, keep_encoder_states, keep_in_memory
from seam.data.manifest import CASINGS, Utterance


@pytest.fixture
def utterances(tmp_path, waveforms):
    made = []
    for index, (waveform, text) in enumerate(
        zip(waveforms, ["ONE two", "stop", "turn on the light", "one"], strict=True)
    ):
        soundfile.write(tmp_path / f"{index}.wav", waveform, 16000)
        made.append(Utterance(tmp_path / f"{index}.wav", text, len(waveform) / 16000))
    return made


def test_items_and_batches(utterances, processor):
    dataset = SpeechDataset(utterances, processor)
    assert processor.decode(dataset[0]["token_ids"]) == "one two"
    batch = SpeechCollator(processor)([dataset[i] for i in range(4)])
    assert batch["input_features"].shape == (4, 16, 200) and batch["attention_mask"].shape == (4, 200)
    for row, utterance in zip(batch["labels"], utterances, strict=True):
        assert row[row != -100].tolist() == [
            *processor.transcript_ids(utterance.text.lower()),
            processor.end_of_turn_id,
        ]


def test_where_nothing_is_said_the_labels_are_the_end_alone(utterances, processor):
    silence = replace(utterances[1], text="")
    dataset = SpeechDataset([silence, utterances[0]], processor)
    batch = SpeechCollator(processor)([dataset[0], dataset[1]])
    assert batch["labels"][0].unique().tolist() == [-100, processor.end_of_turn_id]
    for ids in (dataset[0]["token_ids"], dataset.token_ids(0)):
        assert ids.dtype == torch.long and ids.shape == (0,)
    joined = dataset.reader.token_ids([utterances[0], silence, utterances[1]])
    assert processor.decode(joined) == "one two stop"


def test_casing_is_a_choice(utterances, processor):
    for name, text in (("keep", "ONE two"), ("lower", "one two"), ("upper", "ONE TWO")):
        dataset = SpeechDataset(utterances, processor, casing=CASINGS[name])
        assert processor.decode(dataset[0]["token_ids"]) == text


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_features_equal_computed_ones(utterances, processor, workers):
    dataset = SpeechDataset(utterances, processor)
    kept = keep_in_memory(dataset, workers)
    for one, other in zip(kept, dataset, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_kept_states_give_the_same_loss(utterances, processor, model):
    dataset = SpeechDataset(utterances, processor)
    kept = keep_encoder_states(model, dataset, batch_size=3, workers=0)
    collate = SpeechCollator(processor)
    losses = [model(**collate([d[i] for i in range(4)]), use_llm=False).loss for d in (dataset, kept)]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_bad_file_is_named(utterances, processor, tmp_path):
    (tmp_path / "2.wav").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="2.wav cannot be read as audio"):
        SpeechDataset(utterances, processor)[2]
    soundfile.write(tmp_path / "3.wav", np.zeros(50000), 16000)
    with pytest.raises(ValueError, match="3.wav: audio of 3.1 s is longer"):
        SpeechDataset(utterances, processor)[3]
    untrue = replace(utterances[0], duration=20.0)  # as of a row that means another file, or a part of one
    with pytest.raises(ValueError, match=r"0.wav: the recording has .* but its duration is stated as 20.00 s"):
        SpeechDataset([untrue], processor)[0]
