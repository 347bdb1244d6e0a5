"""The manifest format, and the errors of damaged manifests."""

import json
import re

import numpy as np
import pytest
import soundfile

from seam.data.manifest import Utterance, check_duration, read_manifest, write_manifest
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


def refusal(tmp_path, line: str | bytes) -> str:
    """Return the message about a manifest whose second line is `line`."""
    path = tmp_path / "manifest.jsonl"
    good = b'{"audio": "a.wav", "text": "one", "duration": 1}\n'
    path.write_bytes(good + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ValueError) as raised:
        read_manifest(path)
    assert str(raised.value).startswith(f"{path}, line 2: ")
    return str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1, 2]", r"\[1, 2\] is no JSON object"),
        ("7", "7 is no JSON object"),
        ("[" * 100000, "nested too deeply"),
        ('{"audio": "a.wav", "text": "one", "duration": ' + "1" * 5000 + "}", "digits"),
        ('{"audio": "a.wav", "text": "café", "duration": 1}'.encode("latin-1"), "byte 32 is not UTF-8"),
        ('{"audio": "a.wav"}'.encode("utf-16"), "byte 1 is not UTF-8"),
        ('{"audio": "a.wav", "duration": 1}', "lacks the field 'text'"),
        ('{"text": "one", "duration": 1}', r"lacks the field 'audio' \(or 'audio_filepath', 'file_name'\)"),
        ('{"audio": "missing.wav", "text": "one"}', ".*missing.wav"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    assert re.search(message, refusal(tmp_path, line))


HALF = chr(0xD800)


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        *(("text", value, "a string, empty where nothing is said") for value in (None, 12, 0.5, True, ["a"], {"a": 1})),
        *((name, value, "a string") for name in ("speaker", "corpus", "split") for value in (["a"], {}, 1.5, False)),
        *(("audio", value, "the path of a recording") for value in (5, ["a.wav", "b.wav"], "", " ", "a\0.wav")),
        *(
            ("duration", value, "a number of seconds above 0")
            for value in (float("nan"), float("inf"), -1, 0, 0.0, -0.0, "1.5", "long", True, [1], 10**400)
        ),
        *((name, f"a{HALF}", "whole characters") for name in ("text", "speaker", "corpus", "split", "audio")),
    ],
)
def test_a_field_that_is_not_what_it_must_be_is_named(tmp_path, field, value, accepted):
    row = {"audio": "a.wav", "text": "one", "duration": 1, field: value}
    message = refusal(tmp_path, json.dumps(row))
    assert f"line 2: {field} " in message and f"accepted: {accepted}" in message
    assert len(message) < 300 and "\n" not in message


@pytest.mark.parametrize(("field", "other"), [("audio", "audio_filepath"), ("duration", "seconds")])
def test_two_names_of_a_field_must_not_differ(tmp_path, field, other):
    row = {"audio": "a.wav", "text": "one", "duration": 1}
    assert f"{field} and {other} are" in refusal(tmp_path, json.dumps({**row, other: row[field] * 2}))
    (tmp_path / "manifest.jsonl").write_text(json.dumps({**row, other: row[field]}))
    assert read_manifest(tmp_path / "manifest.jsonl") == [Utterance(tmp_path / "a.wav", "one", 1.0)]


def test_a_manifest_of_nemo(tmp_path):
    row = {"audio_filepath": "a.wav", "text": "one", "duration": 1.5, "offset": 0.0}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    assert read_manifest(tmp_path / "manifest.jsonl") == [Utterance(tmp_path / "a.wav", "one", 1.5)]
    assert "offset is 3.5; accepted: 0" in refusal(tmp_path, json.dumps({**row, "offset": 3.5}))


def test_labels_may_be_whole_numbers_or_unknown(tmp_path):
    row = {"audio": "a.wav", "text": "one", "duration": 1, "speaker": 0, "corpus": 7, "split": None}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    assert read_manifest(tmp_path / "manifest.jsonl") == [Utterance(tmp_path / "a.wav", "one", 1.0, "0", "7", "")]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"audio": "a.wav", "text": "é", "duration": 1}', encoding="utf-8-sig")
    assert read_manifest(tmp_path / "manifest.jsonl")[0].text == "é"


@pytest.mark.parametrize(("stated", "actual"), [(2.0, 60.0), (60.0, 2.0), (1.0, 2.2), (30.0, 26.0)])
def test_an_untrue_duration_is_refused(tmp_path, stated, actual):
    with pytest.raises(ValueError, match=rf"has {actual:.2f} s, but its duration is stated as {stated:.2f} s"):
        check_duration(Utterance(tmp_path / "a.wav", "one", stated), actual)


@pytest.mark.parametrize(("stated", "actual"), [(2.0, 2.4), (1.0, 0.3), (0.0, 9.0), (30.0, 28.0)])
def test_a_rounded_or_unknown_duration_is_accepted(tmp_path, stated, actual):
    check_duration(Utterance(tmp_path / "a.wav", "one", stated), actual)


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
