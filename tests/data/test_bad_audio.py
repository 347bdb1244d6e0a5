"""Recordings that cannot be read: named, counted once, left out."""

import json
import logging

import pytest
import soundfile
from torch.utils.data import DataLoader

from seam.data.bad_audio import SkippedAudio
from seam.data.dataset import SpeechDataset
from seam.data.manifest import Utterance

TEXTS = ["one", "two", "stop", "the light", "hay"]


@pytest.fixture
def utterances(tmp_path, waveforms):
    made = []
    for index, text in enumerate(TEXTS):
        soundfile.write(tmp_path / f"{index}.wav", waveforms[0], 16000)
        made.append(Utterance(tmp_path / f"{index}.wav", text, 0.4))
    return made


def texts(dataset, processor, batch_size, workers=0):
    loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=list)
    return [[processor.decode(item["token_ids"]) for item in batch] for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_leaves_its_batch(utterances, processor, tmp_path, workers):
    utterances[1].audio.write_bytes(b"nothing")
    utterances[3].audio.unlink()
    skipped = SkippedAudio(tmp_path / "out" / "skipped.jsonl")
    dataset = SpeechDataset(utterances, processor, skipped=skipped)
    for _ in range(2):
        assert texts(dataset, processor, 2, workers) == [["one"], ["stop"], ["hay"]]
    rows = [json.loads(line) for line in skipped.path.read_text().splitlines()]
    assert sorted(row["audio"] for row in rows) == [str(utterances[1].audio), str(utterances[3].audio)]
    assert {row["reason"].split(": ")[-1] for row in rows} >= {"no such audio file."}
    assert len(skipped) == 2


def test_it_is_logged_by_name(utterances, processor, tmp_path, caplog):
    utterances[2].audio.write_bytes(b"nothing")
    dataset = SpeechDataset(utterances, processor, skipped=SkippedAudio(tmp_path / "skipped.jsonl"))
    with caplog.at_level(logging.WARNING):
        texts(dataset, processor, 5)
        texts(dataset, processor, 5)
    (record,) = caplog.records
    assert "2.wav cannot be read as audio" in record.message and "skipped; 1 so far" in record.message


def test_an_empty_batch_has_the_next_that_can_be_read(utterances, processor, tmp_path):
    for bad in (0, 3, 4):
        utterances[bad].audio.write_bytes(b"nothing")
    dataset = SpeechDataset(utterances, processor, skipped=SkippedAudio(tmp_path / "skipped.jsonl"))
    assert texts(dataset, processor, 1) == [["two"], ["two"], ["stop"], ["two"], ["two"]]
    for one in utterances:
        one.audio.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of 5 recordings can be read; see .*skipped.jsonl"):
        texts(dataset, processor, 2)


def test_without_a_list_of_skipped_audio_they_are_errors(utterances, processor):
    utterances[1].audio.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="1.wav cannot be read as audio"):
        texts(SpeechDataset(utterances, processor), processor, 2)
