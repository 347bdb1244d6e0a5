"""What a stream reads: shards and manifests, one utterance after the other."""

import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seam.data.bad_audio import SkippedAudio
from seam.data.manifest import write_manifest
from seam.data.streaming import expand_paths, iter_dataset, iter_utterances
from seam.tests.helpers.tar_shards import add, flac, tone, write_shard

TEXTS = {0: "one", 1: "two – zwei", 2: "three", 3: "four"}


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "a.tar", TEXTS)


def test_a_shard_is_utterances(shard, processor):
    read = list(iter_utterances(shard))
    assert [one.text for one in read] == list(TEXTS.values())
    assert [one.duration for one in read] == pytest.approx([0.30, 0.31, 0.32, 0.33], abs=1e-4)
    assert [(one.speaker, one.split) for one in read] == [("", ""), ("s1", "train"), ("", ""), ("s0", "dev")]
    assert str(read[1].audio) == f"{shard}/some/00001.flac"
    for index, one in enumerate(read):
        waveform = processor.load_audio(one.audio.read())
        np.testing.assert_allclose(waveform, tone(index, 0.3 + 0.01 * index), atol=1e-4)
    assert [one.text for one in iter_utterances(shard, "train")] == ["two – zwei"]


def test_a_manifest_is_read_line_by_line(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "text": "one", "duration": 1}\nbroken\n')
    lines = iter_utterances(tmp_path / "m.jsonl")
    assert next(lines).text == "one"
    with pytest.raises(ValueError, match="m.jsonl, line 2: not JSON"):
        next(lines)


def test_an_unreadable_header_is_left_to_the_reader(tmp_path):
    read = list(iter_utterances(write_shard(tmp_path / "a.tar", TEXTS, broken=(2,))))
    assert [one.duration for one in read] == pytest.approx([0.30, 0.31, 0, 0.33], abs=1e-4)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.flac": flac(tone(0))}, "bad.tar/a has neither a .txt nor a .json"),
        ({"a.txt": b"one"}, "bad.tar/a has no audio"),
        ({"a.flac": flac(tone(0)), "b.txt": b"one"}, "bad.tar/a has neither"),
        ({"a.flac": flac(tone(0)), "a.json": b"{"}, "bad.tar/a.json: "),
        ({"a.flac": flac(tone(0)), "a.json": b"[1]"}, "bad.tar/a.json: "),
        ({"a.flac": flac(tone(0)), "a.json": b'{"duration": 1}'}, "bad.tar/a.json: it lacks the field 'text'"),
        ({"a.flac": flac(tone(0)), "a.json": b'{"text": null}'}, "bad.tar/a.json: text is null; accepted: a string"),
        ({"a.flac": flac(tone(0)), "a.json": b'{"text": "", "duration": NaN}'}, "bad.tar/a.json: duration is NaN"),
        ({"a.flac": flac(tone(0)), "a.json": b'{"text": "", "split": ["a"]}'}, "bad.tar/a.json: split is"),
        (
            {"a.flac": flac(tone(0)), "a.json": b'{"text": "two"}', "a.txt": b"one"},
            "bad.tar/a.json: its text is another",
        ),
        ({"a.flac": flac(tone(0)), "a.txt": b"\xff"}, "bad.tar/a.txt is not UTF-8"),
    ],
)
def test_what_is_wrong_in_a_shard_is_named(tmp_path, members, message):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name, content in members.items():
            add(tar, name, content)
    with pytest.raises(ValueError, match=message):
        list(iter_utterances(tmp_path / "bad.tar"))


def test_a_damaged_shard_is_named(shard):
    content = shard.read_bytes()
    no_tar = "a.tar cannot be read as an uncompressed tar file"
    half = content[: len(content) // 2]
    for damaged, message in ((half, "a.tar.* is cut"), (gzip.compress(content), no_tar), (b"nothing", no_tar)):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            list(iter_utterances(shard))


def test_patterns(tmp_path, shard):
    write_shard(tmp_path / "b.tar", {9: "nine"})
    soundfile.write(tmp_path / "a.wav", tone(0), 16000)
    manifest = write_manifest(tmp_path / "metadata.jsonl", [])
    assert expand_paths([str(tmp_path / "*.tar"), str(tmp_path)]) == [shard, tmp_path / "b.tar", tmp_path]
    assert expand_paths([str(manifest)]) == [manifest]
    with pytest.raises(FileNotFoundError, match=r"x\*.tar: no such manifest or shard"):
        expand_paths([str(tmp_path / "x*.tar")])


CARD = """---
dataset_info:
  features:
  - {name: audio, dtype: audio}
  - {name: text, dtype: string}
---
"""


def test_audio_outside_a_dataset_is_not_read(tmp_path, monkeypatch):
    """Its rows may name any file of this machine."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    for path in (tmp_path / "secret.wav", folder / "a.wav"):
        soundfile.write(path, tone(0), 16000)
    for path in (tmp_path / "secret.wav", f"file://{tmp_path}/secret.wav", folder / ".." / "secret.wav"):
        (folder / "rows.jsonl").write_text(json.dumps({"audio": str(path), "text": "one"}))
        with pytest.raises(ValueError, match="secret.wav is not in the dataset: it is not read"):
            list(iter_dataset(f"datasets:{folder}", "train", 0, 1))
    (folder / "rows.jsonl").write_text(json.dumps({"audio": str(folder / "a.wav"), "text": "one"}))
    (read,) = iter_dataset(f"datasets:{folder}", "train", 0, 1)
    assert read.audio.read() == (folder / "a.wav").read_bytes() and read.text == "one"


def test_a_row_of_a_dataset_that_cannot_be_read_is_named_or_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    soundfile.write(folder / "a.wav", tone(0), 16000)
    soundfile.write(tmp_path / "secret.wav", tone(0), 16000)
    audio = str(folder / "a.wav")
    rows = [
        {"audio": audio, "text": None},
        {"audio": str(tmp_path / "secret.wav"), "text": "two"},
        {"audio": str(folder / "missing.wav"), "text": "three"},
        {"audio": audio, "text": "four"},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="a.wav: text is null; accepted: a string"):
        list(iter_dataset(f"datasets:{folder}", "train", 0, 1))
    skipped = SkippedAudio(tmp_path / "skipped.jsonl")
    assert [one.text for one in iter_dataset(f"datasets:{folder}", "train", 0, 1, skipped)] == ["four"]
    assert [Path(name).name for name in skipped.names()] == ["a.wav", "secret.wav", "missing.wav"]
