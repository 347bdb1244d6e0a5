"""Folders with metadata, as `datasets` reads them, and manifests."""

import csv
import json

import numpy as np
import pytest

from seam.data.corpora import audiofolder
from seam.data.corpora.utterances import CorpusUtterance, Exclusion
from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.data.prepare import prepare
from seam.tests.helpers.sounds import tone, write


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_jsonl_at_the_root_with_splits_by_folder(tmp_path):
    for name in ("train/a.wav", "dev/b.wav", "elsewhere/c.wav"):
        write(tmp_path / name, tone(1.0))
    write_lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "train/a.wav", "transcription": "one two", "speaker_id": 7},
        {"file_name": "dev/b.wav", "transcription": "three", "corpus": "numbers"},
        {"file_name": "elsewhere/c.wav", "transcription": "four", "split": "test-other"},
    )
    assert list(audiofolder.read(tmp_path)) == [
        CorpusUtterance("train/a.wav", tmp_path / "train/a.wav", "one two", "7", tmp_path.name, "train"),
        CorpusUtterance("dev/b.wav", tmp_path / "dev/b.wav", "three", "", "numbers", "validation"),
        CorpusUtterance("elsewhere/c.wav", tmp_path / "elsewhere/c.wav", "four", "", tmp_path.name, "test-other"),
    ]
    assert [one.text for one in audiofolder.read(tmp_path, ["train"])] == ["one two"]


def test_csv_in_each_split(tmp_path):
    for split, text in (("train", 'he said "yes",\ntwice'), ("test", "so, no")):
        write(tmp_path / split / "1.wav", tone(1.0))
        with (tmp_path / split / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["file_name", "sentence"], ["1.wav", text]])
    found = [(one.id, one.text, one.split) for one in audiofolder.read(tmp_path)]
    assert found == [("test/1.wav", "so, no", "test"), ("train/1.wav", 'he said "yes",\ntwice', "train")]


def test_what_is_wrong_is_named_and_the_rest_stays(tmp_path):
    write(tmp_path / "a.wav", tone(1.0))
    write(tmp_path / "sub" / "unnamed.flac", tone(1.0, 300))
    write_lines(
        tmp_path / "metadata.jsonl",
        "{",
        '["a.wav", "one"]',
        '"a.wav"',
        {"file_name": "a.wav"},
        {"file_name": 3, "text": "three"},
        {"file_name": "a.wav", "text": "good one"},
        {"file_name": "missing.wav", "text": "nowhere"},
    )
    with (tmp_path / "metadata.jsonl").open("ab") as file:
        file.write(b'{"file_name": "b.wav", "text": "caf\xe9"}\n')
    summary = prepare(audiofolder.read(tmp_path), tmp_path / "out")
    rows = [json.loads(line) for line in summary.left_out_file.read_text().splitlines()]
    assert [(row["name"], row["reason"]) for row in rows] == [
        *((f"metadata.jsonl, line {number}", "bad line") for number in (1, 2, 3, 4, 5)),
        ("missing.wav", "no audio file"),
        ("b.wav", "not UTF-8"),
        ("sub/unnamed.flac", "no transcript"),
    ]
    assert [one.text for one in read_manifest(summary.manifest)] == ["good one"]


def test_csv_rows_of_another_length_are_named(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,one\nb.wav\nc.wav,two,three\n")
    rows = list(audiofolder.read(tmp_path))
    assert rows[0].text == "one"
    assert rows[1:] == [
        Exclusion("metadata.csv, line 3", "bad line", "1 columns instead of 2"),
        Exclusion("metadata.csv, line 4", "bad line", "3 columns instead of 2"),
    ]


def test_a_bad_line_costs_that_line(tmp_path):
    for number in range(5):
        write(tmp_path / f"{number}.wav", tone(1.0, 200 + 10 * number))
    lines = [
        '{"file_name": "0.wav", "text": "good zero"}',
        "[" * 100000,
        '{"file_name": "1.wav", "text": "x", "n": ' + "9" * 5000 + "}",
        '{"file_name": "a\\u0000.wav", "text": "odd path"}',
        json.dumps({"file_name": "n" * 5000 + ".wav", "text": "long name"}),
        '{"file_name": "", "text": "no name"}',
        '{"file_name": "2.wav", "text": "good two", "n": 1e999}',
        '{"file_name": "3.wav", "text": "good three"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    summary = prepare(audiofolder.read(tmp_path), tmp_path / "out", root=tmp_path)
    assert [one.text for one in read_manifest(summary.manifest)] == ["good zero", "good two", "good three"]
    assert summary.left_out.total() == 7  # and the recordings that no line names


def test_a_manifest_of_nemo_whose_rows_are_parts_is_cut(tmp_path):
    write(tmp_path / "long.wav", np.concatenate([tone(1.0, 200), tone(1.0, 300), tone(1.0, 400)]))
    row = {"audio_filepath": "long.wav", "duration": 1.0}
    rows = [{**row, "offset": start, "text": f"part {start}"} for start in (0.5, 2.0)]
    rows += [{**row, "offset": bad, "text": "bad"} for bad in (-1, "1", float("nan"), True)]
    rows += [{**row, "offset": 2.5, "text": "after the end"}, {**row, "duration": 3, "text": "whole"}]
    write_lines(tmp_path / "nemo.jsonl", *rows)
    summary = prepare(audiofolder.read(tmp_path / "nemo.jsonl"), tmp_path / "out", root=tmp_path)
    kept = read_manifest(summary.manifest)
    assert [(one.text, one.duration) for one in kept] == [("part 0.5", 1.0), ("part 2.0", 1.0), ("whole", 3.0)]
    assert summary.left_out == {"bad line": 4, "segment after the end": 1}


@pytest.mark.parametrize(
    "bad",
    [
        'b.wav,"not closed',
        'b.wav,"closed" too early',
        f"b.wav,{'x' * 200000}",
        f'b.wav,"{"x" * 200000}"',
        'b.wav,"not closed\nb.wav,"nor this',
    ],
)
def test_a_bad_row_of_csv_costs_that_row(tmp_path, bad):
    good = ["c.wav,three", 'd.wav,"four, ""quoted"""', 'e.wav,"five\nlines"', "f.wav,six"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", "a.wav,one", bad, *good]) + "\n")
    rows = list(audiofolder.read(tmp_path))
    texts = [one.text for one in rows if isinstance(one, CorpusUtterance)]
    assert texts == ["one", "three", 'four, "quoted"', "five\nlines", "six"]
    left_out = [one for one in rows if isinstance(one, Exclusion)]
    assert [one.name for one in left_out] == [f"metadata.csv, line {3 + i}" for i in range(bad.count("\n") + 1)]
    assert all(one.reason == "bad line" for one in left_out)


def test_a_manifest_is_checked_again(tmp_path):
    paths = [write(tmp_path / "audio" / f"{name}.wav", tone(1.0, 200 + 9 * len(name))) for name in ("a", "bb")]
    utterances = [
        Utterance(paths[0], "one", 1.0, "anna", "digits", "train"),
        Utterance(paths[1], "two\u2028lines", 1.0, "bert", "digits", "dev"),
    ]
    write_manifest(tmp_path / "manifest.jsonl", utterances)
    summary = prepare(audiofolder.read(tmp_path / "manifest.jsonl"), tmp_path / "out")
    assert [(one.text, one.speaker, one.split) for one in read_manifest(summary.manifest)] == [
        ("one", "anna", "train"),
        ("two\u2028lines", "bert", "dev"),
    ]


def test_other_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder or manifest"):
        next(audiofolder.read(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="looked for metadata.jsonl or metadata.csv"):
        next(audiofolder.read(tmp_path))
    with pytest.raises(ValueError, match="metadata are read from .jsonl and .csv"):
        next(audiofolder.read(write(tmp_path / "a.wav", tone(1.0))))


def test_the_shared_recordings(shared, tmp_path):
    summary = prepare((one for one in audiofolder.read(shared / "speech", ["dev"]) if "fsdd" not in one.id), tmp_path)
    published = [one for one in read_manifest(shared / "speech", "dev") if one.corpus != "fsdd"]
    long = {one.audio.name for one in published if one.duration > 30}
    assert len(long) == 3 and summary.left_out == {"too long": 3}
    kept = {one.audio.name: one for one in read_manifest(summary.manifest)}
    for one in published:
        if one.audio.name not in long:
            assert kept.pop(one.audio.name).text == one.text
    assert not kept
