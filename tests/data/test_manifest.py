"""The manifest format, and the errors of damaged manifests."""

import json

import numpy as np
import pytest
import soundfile

from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.data.streaming import AudioInMemory


def test_round_trip_with_relative_paths(tmp_path):
    utterances = [
        Utterance(tmp_path / "audio" / "a.wav", "one", 0.5, "anna", "digits", "train"),
        Utterance(tmp_path / "audio" / "b.wav", "zwei – drei", 1.25, "bert", "digits", "dev"),
    ]
    path = write_manifest(tmp_path / "manifest.jsonl", utterances)
    assert read_manifest(path) == utterances
    assert json.loads(path.read_text().splitlines()[0])["audio"] == "audio/a.wav"
    assert read_manifest(path, split="dev") == utterances[1:]
    assert not list(tmp_path.glob("*.tmp"))


def test_an_audiofolder_is_a_manifest(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.flac", "text": "one", "seconds": 0.5}\n')
    assert read_manifest(tmp_path) == [Utterance(tmp_path / "a.flac", "one", 0.5)]


def test_a_missing_duration_is_read_from_the_recording(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(4000), 8000)
    (tmp_path / "manifest.jsonl").write_text('{"audio": "a.wav", "text": "one"}\n')
    assert read_manifest(tmp_path / "manifest.jsonl")[0].duration == 0.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"audio": "a.wav", "duration": 1}', "line 2 lacks the field 'text'"),
        ('{"text": "one", "duration": 1}', "line 2 lacks the field 'file_name'"),
        ('{"audio": "a.wav", "text": "one", "duration": "long"}', "line 2: could not convert"),
        ('{"audio": "missing.wav", "text": "one"}', "line 2: .*missing.wav"),
        ("[1, 2]", "line 2: list indices"),
        ('{"audio": "a.wav", "text": null, "duration": 1}', "line 2: text is null; accepted: a string, empty where"),
        ('{"audio": "a.wav", "text": 12, "duration": 1}', "line 2: text is 12; accepted: a string"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"audio": "a.wav", "text": "one", "duration": 1}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_manifest(path)


def test_where_nothing_is_said_the_text_is_empty(tmp_path):
    silence = Utterance(tmp_path / "a.wav", "", 1.0)
    assert read_manifest(write_manifest(tmp_path / "manifest.jsonl", [silence])) == [silence]


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such manifest"):
        read_manifest(tmp_path / "manifest.jsonl")
    path = write_manifest(tmp_path / "manifest.jsonl", [Utterance(tmp_path / "a.wav", "one", 1.0, split="train")])
    with pytest.raises(ValueError, match="no utterance of split 'test'"):
        read_manifest(path, "test")


def test_reads_the_shared_recordings(shared):
    digits = read_manifest(shared / "speech", "dev", "fsdd")
    assert len(digits) == 500 and all(one.audio.is_file() for one in digits)


def test_audio_that_is_no_file_cannot_be_in_a_manifest(tmp_path):
    streamed = Utterance(AudioInMemory("datasets:corpus/a.wav", b""), "a", 1.0)
    with pytest.raises(ValueError, match="datasets:corpus/a.wav cannot be in a manifest: it is not a file"):
        write_manifest(tmp_path / "manifest.jsonl", [streamed])
    assert list(tmp_path.iterdir()) == []
