"""Raw hypotheses: every utterance once, whatever interrupts the run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from filelock import FileLock
from transformers import WhisperForConditionalGeneration

from seam.data import files
from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.evaluation import decoding
from seam.evaluation.decoding import decode_test_sets
from seam.evaluation.hypotheses import read_hypotheses
from seam.evaluation.report import write_report
from seam.evaluation.transcription import transcribe
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor, load_checkpoint
from seam.tests.helpers.shipped import RECORDINGS, TINY

MANIFEST = RECORDINGS / "manifest.jsonl"


def write(folder, manifests=(MANIFEST,), **options):
    decode_test_sets(str(TINY), manifests, folder, **{"batch_size": 3, **options})


def without_times(path) -> list[dict]:
    return [{**json.loads(line), "wall_seconds": None} for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def manifest_of_tones(waveforms, tmp_path):
    tones = []
    for index, waveform in enumerate(waveforms):
        soundfile.write(tmp_path / f"{index}.wav", waveform, 16000)
        tones.append(Utterance(tmp_path / f"{index}.wav", "one two", len(waveform) / 16000, corpus="tones"))
    return write_manifest(tmp_path / "tones.jsonl", tones)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return an uninterrupted run, to be read only."""
    folder = tmp_path_factory.mktemp("finished")
    write(folder)
    return folder


def test_rows_are_the_output_of_the_model(finished):
    utterances = read_manifest(MANIFEST)
    seam, processor = load_checkpoint(str(TINY))
    run, systems = read_hypotheses(finished)
    assert list(systems) == run["systems"] == ["stage1", "full", "full-noftg"]
    ablation = {"stage1": {"use_llm": False}, "full": {}, "full-noftg": {"first_token_guidance": False}}
    for system, arguments in ablation.items():
        rows = systems[system]
        results = transcribe(seam, processor, [one.audio for one in utterances], batch_size=1, **arguments)
        assert [row["text"] for row in rows] == [result.text for result in results]
        assert [row["stage1"] for row in rows] == [result.stage1 for result in results]
        assert [tuple(row["tokens"]) for row in rows] == [result.tokens for result in results]
        assert [row["seconds"] for row in rows] == [result.seconds for result in results]
    for row, utterance in zip(systems["full"], utterances, strict=True):
        assert row["reference"] == utterance.text and row["speaker"] == utterance.speaker
        assert row["test_set"] == "recordings" and (MANIFEST.parent / row["audio"]).samefile(utterance.audio)
        assert processor.decode(row["reference_tokens"]) == utterance.text
        assert row["wall_seconds"] > 0 and "error" not in row
    assert run["model"]["name"] == "tiny" and run["data"][0]["manifest"] == "recordings/manifest.jsonl"
    assert run["casing"] == "lower" and run["batch_size"] == 3 and run["dtype"] == "float32"


def test_batches_are_of_one_test_set_and_the_longest_comes_first(finished, tmp_path, monkeypatch):
    shutil.copytree(RECORDINGS, tmp_path / "other")
    (tmp_path / "other" / "manifest.jsonl").write_text(MANIFEST.read_text().replace('"corpus": "rec', '"corpus": "Rec'))
    batches = []
    monkeypatch.setattr(
        decoding, "transcribe", lambda *a, **k: batches.append([len(w) for w in a[2]]) or transcribe(*a, **k)
    )
    write(tmp_path / "out", (MANIFEST, tmp_path / "other" / "manifest.jsonl"), systems=["stage1"], batch_size=4)
    warm_up, *batches = batches
    assert warm_up == batches[0] and [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    lengths = sum(batches[:3], [])
    assert lengths == sorted(lengths, reverse=True) == sum(batches[3:], []) and len(set(lengths)) > 5
    _, systems = read_hypotheses(tmp_path / "out")
    assert [row["id"] for row in systems["stage1"]] == list(range(20))
    names = [row["test_set"] for row in systems["stage1"]]
    assert names == ["recordings"] * 10 + ["Recordings recordings"] * 10


@pytest.mark.medium
@pytest.mark.parametrize("cut", [0, 1, 200])
def test_an_interrupted_run_goes_on_where_it_stopped(finished, tmp_path, monkeypatch, cut):
    calls = []

    def fail_later(*arguments, **options):
        calls.append(len(arguments[2]))
        if len(calls) == 8:  # warm-up and four batches of Stage 1, warm-up and one batch of the full model
            raise KeyboardInterrupt
        return transcribe(*arguments, **options)

    monkeypatch.setattr(decoding, "transcribe", fail_later)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    rows = tmp_path / "hypotheses" / "full.jsonl"
    assert len(without_times(rows)) == 3 and not (tmp_path / "hypotheses" / "full-noftg.jsonl").exists()
    with pytest.raises(ValueError, match="full.jsonl holds 3 of 10 utterances; the same `seam evaluate`"):
        read_hypotheses(tmp_path)
    if cut:  # the machine went down while a line was being written
        rows.write_bytes(rows.read_bytes()[:-cut])
    calls.clear()
    calls.extend([0] * 8)
    write(tmp_path)
    rest = [3, 3, 1] if not cut else [1, 3, 3, 1]
    assert calls[8:] == [rest[0], *rest] + [3, 3, 3, 3, 1]  # warm-up and batches; Stage 1 was finished
    for system in ("stage1", "full", "full-noftg"):
        again, once = (folder / "hypotheses" / f"{system}.jsonl" for folder in (tmp_path, finished))
        assert without_times(again) == without_times(once)
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads((finished / "run.json").read_text())


def test_a_checkpoint_may_be_moved_between_two_runs(tmp_path):
    write(tmp_path / "out", systems=["stage1"])
    shutil.copytree(TINY, tmp_path / "elsewhere")
    decode_test_sets(str(tmp_path / "elsewhere"), [MANIFEST], tmp_path / "out", ["full"], batch_size=3)
    assert list(read_hypotheses(tmp_path / "out")[1]) == ["stage1", "full"]


def test_a_finished_run_loads_nothing_and_takes_more_systems(finished, tmp_path, monkeypatch):
    write(tmp_path, systems=["full"])
    assert list(read_hypotheses(tmp_path)[1]) == ["full"]
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "load_checkpoint", lambda *a, **k: pytest.fail("loaded"))
        write(tmp_path, systems=["full"])
    write(tmp_path, systems=["stage1"])
    assert list(read_hypotheses(tmp_path)[1]) == ["stage1", "full"]


def test_unreadable_audio_is_named_and_the_rest_is_decoded(finished, tmp_path, capsys):
    shutil.copytree(RECORDINGS, tmp_path / "data")
    names = [json.loads(line)["audio"] for line in MANIFEST.read_text().splitlines()]
    (tmp_path / "data" / names[2]).unlink()
    (tmp_path / "data" / names[5]).write_bytes(b"no audio at all")
    soundfile.write(tmp_path / "data" / names[7], np.zeros(0), 16000)
    write(tmp_path / "out", [tmp_path / "data" / "manifest.jsonl"], systems=["full"], batch_size=1)
    rows = read_hypotheses(tmp_path / "out")[1]["full"]
    assert [row["id"] for row in rows if "error" in row] == [2, 5, 7]
    printed = capsys.readouterr().err
    for number, reason in ((2, "no such audio file"), (5, "cannot be read as audio"), (7, "holds no audio samples")):
        assert reason in rows[number]["error"] and names[number] in rows[number]["error"]
        assert f"not decoded: {rows[number]['error']}" in printed
        assert rows[number]["text"] == "" and rows[number]["tokens"] == [] and rows[number]["wall_seconds"] == 0
        assert rows[number]["reference_tokens"] and rows[number]["seconds"] > 0
    good = read_hypotheses(finished)[1]["full"]
    assert all(row["text"] == other["text"] for row, other in zip(rows, good, strict=True) if "error" not in row)


def test_long_audio_is_decoded_to_its_end(tmp_path):
    utterances = read_manifest(MANIFEST)
    long = [np.concatenate([soundfile.read(one.audio)[0], np.zeros(8000)]) for one in utterances * 2]
    soundfile.write(tmp_path / "long.flac", np.concatenate(long), 16000)
    text = " ".join(one.text for one in utterances * 2)
    (tmp_path / "long.jsonl").write_text(json.dumps({"audio": "long.flac", "text": text}))
    write(tmp_path / "out", [tmp_path / "long.jsonl"], systems=["full"])
    (row,) = read_hypotheses(tmp_path / "out")[1]["full"]
    assert row["test_set"] == "long" and row["seconds"] > 30
    assert len(row["text"].split()) > 0.7 * len(text.split()) and len(row["tokens"]) > 0.7 * len(text.split())


def test_a_recording_of_another_duration_than_stated_is_named_not_decoded(tmp_path):
    """Such a row means a part of the recording, whose words are not those of the whole."""
    audio = str(read_manifest(MANIFEST)[0].audio)
    rows = [{"audio": audio, "text": "set", **more} for more in ({}, {"duration": 0.5})]
    (tmp_path / "parts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(tmp_path / "out", [tmp_path / "parts.jsonl"], systems=["stage1"])
    whole, part = read_hypotheses(tmp_path / "out")[1]["stage1"]
    assert whole["text"] and "error" not in whole
    assert part["text"] == "" and "its duration is stated as 0.50 s" in part["error"]
    assert Path(audio).name in part["error"]


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    rows = [{"audio": str(read_manifest(MANIFEST)[0].audio), "text": "one"}]
    rows += [{"audio": "missing.wav", "text": "two", "duration": 1}]
    (folder / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(folder / "out", [folder / "some.jsonl"], systems=["stage1"])
    whole, missing = read_hypotheses(folder / "out")[1]["stage1"]
    assert whole["text"] and str(folder / "missing.wav") in missing["error"]
    write_report(folder / "out")
    assert "caf\\udce9/missing.wav" in (folder / "out" / "errors.md").read_text()


def test_casing_is_that_of_the_references_ids(tmp_path):
    (tmp_path / "upper.jsonl").write_text(
        json.dumps({"audio": str(read_manifest(MANIFEST)[0].audio), "text": "SET THE LIGHT"})
        + "\n"
        + json.dumps({"audio": str(read_manifest(MANIFEST)[0].audio), "text": " "})
    )
    _, processor = load_checkpoint(str(TINY))
    for casing, ids in (("lower", "set the light"), ("keep", "SET THE LIGHT")):
        write(tmp_path / casing, [tmp_path / "upper.jsonl"], systems=["stage1"], casing=casing)
        row, silent = read_hypotheses(tmp_path / casing)[1]["stage1"]
        assert row["reference"] == "SET THE LIGHT" and row["reference_tokens"] == processor.transcript_ids(ids)
        assert silent["reference"] == " " and silent["reference_tokens"] == []


def test_a_checkpoint_of_stage_1_alone_has_one_system(build_model, processor, tmp_path):
    build_model(alignment_only=True).save_pretrained(tmp_path / "stage1")
    processor.save_pretrained(tmp_path / "stage1")
    with pytest.raises(ValueError, match="holds Stage 1 without the LLM; accepted: --systems stage1"):
        decode_test_sets(str(tmp_path / "stage1"), [MANIFEST], tmp_path / "out", ["full"])
    assert not (tmp_path / "out").exists()
    decode_test_sets(str(tmp_path / "stage1"), [MANIFEST], tmp_path / "out")
    assert len(read_hypotheses(tmp_path / "out")[1]["stage1"]) == 10


def other_weights(folder):
    return change_settings(folder, "config.json", weights_fingerprint="0" * 64)


def other_settings(folder):
    return change_settings(folder, "generation_config.json", num_beams=4)


def change_settings(folder, file, **changes):
    shutil.copytree(TINY, folder / "tiny")
    settings = json.loads((folder / "tiny" / file).read_text())
    (folder / "tiny" / file).write_text(json.dumps({**settings, **changes}))
    return {"model": str(folder / "tiny")}


def other_data(folder):
    lines = MANIFEST.read_text().splitlines()
    rows = [{**json.loads(line), "text": "other words"} for line in lines]
    rows = [{**row, "audio": str(RECORDINGS / row["audio"])} for row in rows]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"manifests": [folder / "manifest.jsonl"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, r"another run \(model: tiny, with other content than now\)"),
        (other_settings, r"another run \(model: tiny, with other content than now\)"),
        (other_data, r"another run \(data: recordings/manifest.jsonl, now .*/manifest.jsonl\)"),
        (lambda _: {"casing": "keep"}, r"another run \(casing: lower, now keep\)"),
        (lambda _: {"batch_size": 4}, r"another run \(batch_size: 3, now 4\)"),
        (lambda _: {"systems": ["full", "fulll"]}, "unknown system 'fulll'; known: stage1, full, full-noftg"),
        (lambda _: {"casing": "title"}, "casing is 'title'; accepted: lower, upper, keep"),
        (lambda _: {"split": "train"}, "holds no utterance of split 'train'"),
    ],
)
def test_another_run_is_refused_before_anything_is_loaded(finished, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(decoding, "load_checkpoint", lambda *a, **k: pytest.fail("loaded"))
    before = {path: path.read_bytes() for path in finished.rglob("*.json*")}
    arguments = {"model": str(TINY), "manifests": [MANIFEST], "folder": finished, "batch_size": 3}
    with pytest.raises(ValueError, match=message):
        decode_test_sets(**{**arguments, **change(tmp_path)})
    assert {path: path.read_bytes() for path in finished.rglob("*.json*")} == before


def test_missing_and_ambiguous_manifests_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such manifest"):
        write(tmp_path / "out", [MANIFEST, tmp_path / "none.jsonl"])
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "dev.jsonl").write_text(json.dumps({"audio": "x.wav", "text": "x", "duration": 1}))
    with pytest.raises(ValueError, match="b/dev.jsonl state no corpus and have the same name"):
        write(tmp_path / "out", [tmp_path / "a" / "dev.jsonl", tmp_path / "b" / "dev.jsonl"])
    with pytest.raises(FileNotFoundError, match="run.json is missing"):
        read_hypotheses(tmp_path)
    assert not (tmp_path / "out").exists()


def twice(lines):
    return [*lines, lines[0]]


def two_writers_in_one_line(lines):
    return [*lines[:3], lines[3][:40] + lines[4], *lines[5:]]


def of_another_run(lines):
    return [*lines[:9], json.dumps({**json.loads(lines[9]), "reference": "other words"}) + "\n"]


def beyond_the_manifest(lines):
    return [json.dumps({**json.loads(lines[0]), "id": 10}) + "\n", "3\n", *lines]


@pytest.mark.parametrize(
    ("spoil", "message", "lost"),
    [
        (twice, "holds other utterances than the 10 of run.json, or some of them twice; the same", 1),
        (two_writers_in_one_line, "full.jsonl, line 4 is damaged", 1),
        (of_another_run, None, 1),
        (beyond_the_manifest, "full.jsonl, line 2 is damaged: it is no object", 2),
    ],
)
def test_a_spoilt_folder_is_named_and_the_same_command_mends_it(finished, tmp_path, caplog, spoil, message, lost):
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / "hypotheses" / "full.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(spoil(lines)))
    if message is not None:
        with pytest.raises(ValueError, match=message):
            read_hypotheses(tmp_path / "out")
    write(tmp_path / "out", systems=["full"])
    assert f"{path}: {lost} of {len(spoil(lines))} lines were damaged" in caplog.text
    rows, whole = (read_hypotheses(folder)[1]["full"] for folder in (tmp_path / "out", finished))
    assert [{**row, "wall_seconds": 0} for row in rows] == [{**row, "wall_seconds": 0} for row in whole]


def test_hypotheses_of_no_run_are_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="run.json is missing"):
        write(tmp_path / "out")


@pytest.mark.parametrize("command", [write, write_report])
def test_a_folder_has_one_writer(finished, tmp_path, monkeypatch, command):
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(files, "LOCK_SECONDS", 0)
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(OSError, match=r"out is being written by another process; wait for it"),
    ):
        command(tmp_path / "out")
    command(tmp_path / "out")


@pytest.mark.medium
def test_two_evaluations_at_once_decode_every_utterance_once(finished, tmp_path):
    arguments = [str(TINY), "--data", str(MANIFEST), "--out", str(tmp_path), "--systems", "full", "--batch-size", "3"]
    command = [sys.executable, "-m", "seam", "evaluate", *arguments]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    # The second waits a while, and ends with a sentence if that is not enough.
    assert all(one.returncode == 0 or "is being written by another" in e for one, e in zip(both, errors, strict=True))
    again, once = (folder / "hypotheses" / "full.jsonl" for folder in (tmp_path, finished))
    assert without_times(again) == without_times(once)


def test_a_whisper_goes_the_same_way(backbones, manifest_of_tones, tmp_path):
    decode_test_sets(backbones[0], [manifest_of_tones], tmp_path, batch_size=2)
    run, systems = read_hypotheses(tmp_path)
    assert run["systems"] == ["whisper"]
    whisper = WhisperForConditionalGeneration.from_pretrained(backbones[0]).eval()
    processor = SeamProcessor.from_backbones(backbones[0], backbones[1])
    for row in systems["whisper"]:
        features = processor(audio=manifest_of_tones.parent / row["audio"])["input_features"]
        assert row["text"] == processor.decode(whisper.generate(features)[0]).strip()
        assert row["stage1_tokens"] == [] and row["reference_tokens"]
    with pytest.raises(ValueError, match="is a Whisper; accepted: --systems whisper"):
        decode_test_sets(backbones[0], [manifest_of_tones], tmp_path, ["full"])


def test_a_bridge_without_a_stage_1_is_one_system(backbones, processor, manifest_of_tones, tmp_path):
    config = {"bridge": "linear", "bridge_config": {"hidden_size": 8}, "lora_rank": 0}
    model = SeamForSpeechRecognition.from_backbones(*backbones, processor, **config)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    decode_test_sets(str(tmp_path / "model"), [manifest_of_tones], tmp_path / "out")
    run, systems = read_hypotheses(tmp_path / "out")
    assert run["systems"] == ["full"] and all(row["stage1"] == "" for row in systems["full"])
    with pytest.raises(ValueError, match="has no Stage 1 .bridge 'linear'.; accepted: --systems full"):
        decode_test_sets(str(tmp_path / "model"), [manifest_of_tones], tmp_path / "out", ["stage1"])
