"""A corpus with every defect that disks and archives bring: each is named, and nothing else is lost."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seam.data.corpora import librispeech
from seam.data.corpora.utterances import NOT_SCORED, CorpusUtterance, Exclusion
from seam.data.manifest import read_manifest
from seam.data.prepare import load_tokenizer, prepare
from seam.tests.helpers.sounds import tone, write


def left_out(summary) -> list[tuple[str, str]]:
    rows = map(json.loads, summary.left_out_file.read_text().splitlines())
    return [(row["name"], row["reason"]) for row in rows]


def set_header_rate(flac: bytes, rate: int) -> bytes:
    """Replace the 20 bits of STREAMINFO that state the sampling rate (they begin 18 bytes into the file)."""
    changed = bytearray(flac)
    changed[18], changed[19] = rate >> 12, (rate >> 4) & 255
    changed[20] = (rate & 15) << 4 | changed[20] & 15
    return bytes(changed)


@pytest.fixture(scope="module")
def broken(shared, tmp_path_factory):
    """Of test-other, 30 good recordings and ten damaged ones: the root, what is wrong with which, and the good ids."""
    root = tmp_path_factory.mktemp("broken")
    texts = {one.audio.stem: one for one in read_manifest(shared / "speech", corpus="librispeech test-other")}
    rows = {}
    for id, one in sorted(texts.items()):
        speaker, chapter, _ = id.split("-")
        folder = root / "LibriSpeech" / "test-other" / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one.audio, folder / f"{id}.flac")
        rows[id] = f"{id} {one.text.upper()}\n".encode()

    def file(id):
        return next(root.rglob(f"{id}.flac"))

    ids = sorted(texts)
    expected = {}

    def damage(reason):
        id = ids.pop(len(ids) // 2)
        expected[id] = reason
        return id

    id = damage("cannot be decoded")  # truncated: the header is whole
    file(id).write_bytes(file(id).read_bytes()[: file(id).stat().st_size // 2])
    assert soundfile.info(file(id)).frames > 0
    id = damage("wrong sampling rate")
    file(id).write_bytes(set_header_rate(file(id).read_bytes(), 8000))
    assert soundfile.info(file(id)).samplerate == 8000
    id = damage("empty text")
    rows[id] = f"{id}\n".encode()
    id = damage("empty file")
    file(id).write_bytes(b"")
    id = damage("too long")
    write(file(id), np.resize(soundfile.read(file(id))[0], 40 * 16000))
    id = damage("not UTF-8")
    rows[id] = f"{id} A CAFÉ\n".encode("latin-1")
    id = damage("silent")
    write(file(id), np.zeros(16000))
    id = damage("characters per second")
    rows[id] = rows[id][:-1] * 20 + b"\n"
    id = damage("duplicate audio")
    shutil.copyfile(file(ids[0]), file(id))
    id = damage("cannot be decoded")  # no audio at all
    file(id).write_bytes(b"<html>404 Not CorpusUtterance</html>")
    twice = ids[3]
    rows[twice] += f"{twice} ANOTHER TEXT FOR IT\n".encode()
    for id, row in rows.items():
        with (file(id).parent / f"{id.rpartition('-')[0]}.trans.txt").open("ab") as transcripts:
            transcripts.write(row)
    return root, sorted([*expected.items(), (twice, "duplicate id")]), ids


def test_each_defect_is_named_and_nothing_else_is_lost(broken, tmp_path):
    root, expected, good = broken
    summary = prepare(librispeech.read(root), tmp_path)
    assert sorted(left_out(summary)) == expected
    kept = read_manifest(summary.manifest)
    assert sorted(one.audio.stem for one in kept) == good and summary.kept == len(good) == 30
    assert sum(summary.left_out.values()) == len(expected) == 11
    by_name = {row["name"]: row for row in map(json.loads, summary.left_out_file.read_text().splitlines())}
    details = {row["reason"]: row["detail"] for row in by_name.values()}
    assert "40.0 s, above 30 s" in details["too long"]
    assert "8000 Hz; the corpus has 16000 Hz" in details["wrong sampling rate"]
    assert "ANOTHER TEXT" in details["duplicate id"]
    assert good[0] in details["duplicate audio"]


def test_the_number_of_workers_changes_nothing(broken, tmp_path):
    root = broken[0]
    one, three = (prepare(librispeech.read(root), tmp_path / str(n), workers=n) for n in (1, 3))
    assert one.manifest.read_bytes() == three.manifest.read_bytes()
    assert one.left_out_file.read_bytes() == three.left_out_file.read_bytes()


def stated(path, text="good text", **fields) -> CorpusUtterance:
    labels = {"id": path.stem, "speaker": "anna", "corpus": "tones", "split": "train"}
    return CorpusUtterance(**{**labels, "audio": path, "text": text, **fields})


def recordings(folder, count) -> list:
    return [write(folder / "corpus" / f"{number}.wav", tone(1.0, 200 + 10 * number)) for number in range(count)]


def test_the_manifest_is_relative_and_moves_with_the_corpus(tmp_path):
    paths = recordings(tmp_path / "here", 2)
    prepare([stated(path, f" {path.stem} words ") for path in paths], tmp_path / "here" / "out")
    (tmp_path / "here").rename(tmp_path / "there")
    kept = read_manifest(tmp_path / "there" / "out" / "manifest.jsonl")
    assert [(one.text, one.duration, one.speaker) for one in kept] == [
        ("0 words", 1.0, "anna"),
        ("1 words", 1.0, "anna"),
    ]
    assert all(one.audio.is_file() for one in kept)


def test_the_first_of_an_id_that_can_be_used_stays(tmp_path):
    a, b, c = recordings(tmp_path, 3)
    summary = prepare(
        [stated(a, " ", id="x"), stated(b, "second", id="x"), stated(c, "third", id="x")], tmp_path / "out"
    )
    assert [one.text for one in read_manifest(summary.manifest)] == ["second"]
    assert left_out(summary) == [("x", "empty text"), ("x", "duplicate id")]


def test_names_and_labels_that_no_file_can_hold_are_left_out(tmp_path):
    (path,) = recordings(tmp_path, 1)
    bad = b"caf\xe9".decode(errors="surrogateescape")
    utterances = [stated(path, id=bad), *(stated(path, **{name: bad}) for name in ("speaker", "corpus", "split"))]
    summary = prepare([*utterances, stated(path)], tmp_path / "out")
    assert left_out(summary) == [(bad, "not UTF-8"), *[("0", "not UTF-8")] * 3] and summary.kept == 1


def test_bytes_and_segments_become_files_below_audio(tmp_path):
    (path,) = recordings(tmp_path, 1)
    contents = path.read_bytes()
    utterances = [
        stated(path, id="../up", contents=contents, split="..", speaker="a/b"),
        stated(path, id="..", segment=(0.25, 0.75), speaker=""),
    ]
    summary = prepare(utterances, tmp_path / "out")
    kept = read_manifest(summary.manifest)
    assert [str(one.audio.relative_to(tmp_path / "out")) for one in kept] == [
        "audio/%2E./a%2Fb/%2E.%2Fup.wav",
        "audio/train/%2E..flac",
    ]
    assert kept[0].audio.read_bytes() == contents and kept[1].duration == 0.5


@pytest.mark.parametrize(
    ("format", "rate"), [("MP3", 8000), ("MP3", 16000), ("MP3", 44100), ("FLAC", 8000), ("OGG", 8000)]
)
def test_bytes_are_named_by_what_they_are(tmp_path, format, rate):
    path = tmp_path / "recording"
    soundfile.write(path, tone(1.0, rate=rate), rate, format=format)
    summary = prepare([stated(path, audio=path, contents=path.read_bytes())], tmp_path / "out", workers=1)
    assert read_manifest(summary.manifest)[0].audio.suffix == f".{format.lower()}"


def test_what_is_not_scored_is_counted_and_not_listed(tmp_path):
    (path,) = recordings(tmp_path, 1)
    summary = prepare([Exclusion("gap", NOT_SCORED), stated(path), Exclusion("b", "bad line", "why")], tmp_path / "out")
    assert summary.not_scored == 1 and summary.left_out == {"bad line": 1} and left_out(summary) == [("b", "bad line")]


def test_nothing_left_is_an_error_and_an_older_manifest_stays(tmp_path):
    (path,) = recordings(tmp_path, 1)
    before = prepare([stated(path)], tmp_path / "out").manifest.read_bytes()
    with pytest.raises(ValueError, match="nothing is left to write a manifest of: 2 empty text, 1 bad line"):
        prepare([stated(path, ""), Exclusion("b", "bad line"), stated(path, "")], tmp_path / "out")
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == before
    assert (tmp_path / "out" / "left_out.jsonl").read_text().count("\n") == 3
    with pytest.raises(ValueError, match="no utterance was found"):
        prepare([], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_reader_that_refuses_its_folder_leaves_nothing_behind(tmp_path):
    with pytest.raises(FileNotFoundError):
        prepare(librispeech.read(tmp_path / "nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_that_the_tokenizer_does_not_give_back(tmp_path, processor):
    """Qwen's tokenizer composes characters (NFC): an accent of its own does not come back."""
    tokenizer = load_tokenizer(str(save_tokenizer(processor, tmp_path / "tokenizer")))
    paths = recordings(tmp_path, 4)
    texts = ["turn on the light", "cafe\u0301", "caf\u00e9 <|im_end|>", "TURN"]
    utterances = [stated(path, text) for path, text in zip(paths, texts, strict=True)]
    summary = prepare(utterances, tmp_path / "out", tokenizer=tokenizer)
    assert left_out(summary) == [("1", "tokenizer changes the text")]
    kept = [one.text for one in read_manifest(summary.manifest)]
    assert kept == [texts[0], texts[2], texts[3]]
    assert summary.tokens == {
        "lower": sum(len(processor.transcript_ids(text.lower())) for text in kept),
        "upper": sum(len(processor.transcript_ids(text.upper())) for text in kept),
        "keep": sum(len(processor.transcript_ids(text)) for text in kept),
    }
    assert summary.tokens["keep"] > summary.tokens["lower"]  # "turn" is one token of this vocabulary
    assert prepare(utterances, tmp_path / "without").kept == 4


def save_tokenizer(processor, folder):
    """Return the tiny model's tokenizer with the normaliser of Qwen's."""
    processor.tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_no_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer can be loaded from"):
        load_tokenizer(str(tmp_path))


def audio_below(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "audio").rglob("*.*")}


def test_a_run_in_which_nothing_is_left_leaves_the_audio_of_the_run_before(tmp_path):
    (path,) = recordings(tmp_path, 1)
    contents = path.read_bytes()
    utterances = [
        stated(path, id="cut", segment=(0.0, 0.5)),
        stated(path, id="bytes", contents=contents),
    ]
    before = prepare(utterances, tmp_path / "out").manifest.read_bytes()
    audio = audio_below(tmp_path / "out")
    assert len(audio) == 2
    for other in (
        [stated(path, "a" * 900, id="cut", segment=(0.0, 0.5)), stated(path, "b" * 900, id="bytes", contents=contents)],
        [stated(path, id="bytes", contents=b"nothing"), stated(path, id="cut", segment=(3.0, 4.0))],
    ):
        with pytest.raises(ValueError, match="nothing is left"):
            prepare(other, tmp_path / "out")
        assert audio_below(tmp_path / "out") == audio and not (tmp_path / "out" / "audio.tmp").exists()
        assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == before


def test_a_run_that_is_ended_by_an_error_leaves_the_run_before(tmp_path):
    (path,) = recordings(tmp_path, 1)
    prepare([stated(path, id="x", segment=(0.0, 0.5))], tmp_path / "out")
    audio = audio_below(tmp_path / "out")

    def corpus():
        yield stated(path, id="x", segment=(0.5, 1.0))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        prepare(corpus(), tmp_path / "out")
    assert audio_below(tmp_path / "out") == audio and not (tmp_path / "out" / "audio.tmp").exists()


def test_audio_that_the_new_manifest_does_not_name_goes_last(tmp_path):
    paths = recordings(tmp_path, 2)
    path = paths[0]
    kept, gone = (stated(one, id=name, segment=(0, 0.5)) for one, name in zip(paths, ("kept", "gone"), strict=True))
    (tmp_path / "out" / "audio").mkdir(parents=True)
    (tmp_path / "out" / "audio" / "mine.txt").write_text("not of a run")
    prepare([kept, gone], tmp_path / "out")
    assert len(audio_below(tmp_path / "out")) == 3
    prepare([kept], tmp_path / "out")
    assert sorted(audio_below(tmp_path / "out")) == ["audio/mine.txt", "audio/train/anna/kept.flac"]
    assert path.exists()  # what is the corpus' own stays in any case
    prepare([stated(path)], tmp_path / "out")
    assert path.exists() and sorted(audio_below(tmp_path / "out")) == ["audio/mine.txt"]


def test_names_longer_than_file_names_may_be(tmp_path):
    paths = recordings(tmp_path, 3)
    names = ["\u8a9e" * 40 + end for end in "ab"] + ["long" * 60]
    utterances = [
        stated(paths[0], id=names[0], speaker=names[0], segment=(0.0, 0.5)),
        stated(paths[1], id=names[1], speaker=names[1], segment=(0.5, 1.0)),
        stated(paths[2], id=names[2], split=names[2], contents=paths[2].read_bytes()),
    ]
    kept = read_manifest(prepare(utterances, tmp_path / "out").manifest)
    assert len({one.audio for one in kept}) == 3 and all(one.audio.is_file() for one in kept)
    assert [one.speaker for one in kept] == [*names[:2], "anna"]


def test_audio_outside_the_corpus_is_named(tmp_path):
    inside, *_ = recordings(tmp_path, 1)
    other = write(tmp_path / "elsewhere.wav", tone(1.0, 500))
    root = tmp_path / "corpus"
    utterances = [
        stated(inside),
        stated(other, id="absolute"),
        stated(root / ".." / "elsewhere.wav", id="up"),
        stated(root / "." / "0.wav", "again", id="again"),
        stated(other, id="contents", contents=other.read_bytes()),
    ]
    summary = prepare(utterances, tmp_path / "out", root=root)
    found = [("absolute", "outside the corpus"), ("up", "outside the corpus"), ("again", "duplicate audio")]
    assert left_out(summary) == found and summary.kept == 2
    assert prepare(utterances, tmp_path / "all").left_out == {"duplicate audio": 3}


DYING = """
import os, sys, time
from pathlib import Path
from seam.data import prepare as module
from seam.data.checks import CheckResult, check_recording

def check(recording):
    if "dies" in recording.path.name:
        os._exit(9)
    if "waits" in recording.path.name and recording.path.exists():
        Path(sys.argv[0]).with_suffix(".pid").write_text(str(os.getpid()))
        time.sleep(100)
    return check_recording(recording)

module.check_recording = check

if __name__ == "__main__":
    from seam.data.corpora import audiofolder
    print(dict(module.prepare(audiofolder.read(sys.argv[1]), sys.argv[2], workers=2).left_out))
"""


def corpus_and_script(tmp_path, *names):
    folder = tmp_path / "folder"
    rows = []
    for number, name in enumerate(names):
        write(folder / f"{name}.wav", tone(1.0, 200 + 10 * number))
        rows.append(json.dumps({"file_name": f"{name}.wav", "text": f"words {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "script.py").write_text(DYING)
    return [sys.executable, str(tmp_path / "script.py"), str(folder), str(tmp_path / "out")]


@pytest.mark.medium
def test_a_recording_with_which_a_worker_dies_costs_itself(tmp_path):
    done = subprocess.run(
        corpus_and_script(tmp_path, "a", "dies", "b", "dies-too", "c"), capture_output=True, text=True
    )
    assert done.returncode == 0 and "{'cannot be decoded': 2}" in done.stdout, done.stderr
    assert [one.text for one in read_manifest(tmp_path / "out" / "manifest.jsonl")] == ["words 0", "words 2", "words 4"]


@pytest.mark.medium
def test_a_run_that_is_killed_leaves_no_worker_and_can_be_repeated(tmp_path):
    command = corpus_and_script(tmp_path, "a", "waits")
    running = subprocess.Popen(command)
    pid = tmp_path / "script.pid"
    deadline = time.monotonic() + 100
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(pid.read_text())
    running.kill()
    running.wait()

    def is_running() -> bool:
        status = Path(f"/proc/{worker}/status")  # a process that ended may not be waited for by anybody in a container
        return status.exists() and "State:\tZ" not in status.read_text()

    while is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running()
    (tmp_path / "folder" / "waits.wav").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "no audio file" in done.stdout, done.stderr
