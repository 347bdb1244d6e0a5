"""The `seam` command, as a user runs it."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import typer
from torch import distributed

from seam.__main__ import app, run_recipe
from seam.arguments import check_audio, print_json
from seam.data.manifest import read_manifest
from seam.tests.helpers import forked
from seam.tests.helpers.shipped import RECORDINGS, TINY
from seam.train.recipe import StageRecipe

pytestmark = pytest.mark.medium


def seam(*arguments) -> subprocess.CompletedProcess:
    return forked.run([sys.executable, "-m", "seam", *map(str, arguments)])


@pytest.fixture(scope="module")
def recordings():
    return read_manifest(RECORDINGS / "manifest.jsonl")


@pytest.mark.oldest
def test_demo_prints_references_and_transcripts(recordings, tmp_path):
    soundfile.write(tmp_path / "mine.wav", soundfile.read(recordings[0].audio)[0], 16000)
    done = seam("demo", tmp_path / "mine.wav", "--model", TINY)
    assert done.returncode == 0, done.stderr
    for heading in ("file", "reference", "Stage 1 heard", "transcript", "WER %", "mine.wav"):
        assert heading in done.stdout
    assert "WER of the 10 shipped recordings:" in done.stdout


def test_transcribe_json_and_the_equality_of_batch_sizes(recordings):
    files = [one.audio for one in recordings[:5]]
    outputs = [seam("transcribe", *files, "--model", TINY, "--json", "--batch-size", size).stdout for size in (1, 5)]
    assert outputs[0] == outputs[1]
    rows = [json.loads(line) for line in outputs[0].splitlines()]
    assert [set(row) for row in rows] == [{"file", "seconds", "stage1", "text"}] * 5
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert all(row["text"] for row in rows)


def test_a_bad_file_among_many_is_named_and_the_rest_goes_on(recordings, tmp_path):
    good, better = (str(one.audio) for one in recordings[:2])
    (tmp_path / "words.wav").write_text("no audio")
    done = seam("transcribe", good, tmp_path / "words.wav", "missing.wav", better, "--model", TINY, "--json")
    assert [json.loads(line)["file"] for line in done.stdout.splitlines()] == [good, better]
    assert done.returncode == 1
    bad, missing = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "words.wav cannot be read as audio" in bad and "missing.wav: no such audio file" in missing


def test_folders_patterns_and_standard_input(recordings, tmp_path):
    (tmp_path / "inner").mkdir()
    for name, one in zip(("b.wav", "inner/a.wav"), recordings, strict=False):
        (tmp_path / name).write_bytes(one.audio.read_bytes())
    (tmp_path / "notes.txt").write_text("no audio")
    command = [sys.executable, "-m", "seam", "transcribe", "--model", str(TINY), "--json"]
    with open(tmp_path / "b.wav", "rb") as audio:
        done = subprocess.run(
            [*command, "-", str(tmp_path), f"{tmp_path}/*/*.wav"], stdin=audio, capture_output=True, text=True
        )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["file"] for row in rows] == ["-", *(str(tmp_path / n) for n in ("b.wav", "inner/a.wav", "inner/a.wav"))]
    assert rows[0]["text"] == rows[1]["text"] and rows[2]["text"] == rows[3]["text"] and done.returncode == 0


def test_stage_1_alone_and_no_guidance(recordings):
    file = recordings[0].audio
    plain, alone, unguided = (
        json.loads(seam("transcribe", file, "--model", TINY, "--json", *options).stdout)
        for options in ([], ["--no-llm"], ["--no-first-token-guidance"])
    )
    assert alone["text"] == alone["stage1"] == plain["stage1"] == unguided["stage1"]


def test_any_rate_channels_and_length(recordings, tmp_path):
    waveform, rate = soundfile.read(recordings[0].audio)
    stereo = np.repeat(np.stack([waveform, waveform], axis=1), 3, axis=0)
    soundfile.write(tmp_path / "stereo48.wav", stereo, 3 * rate)
    long = np.concatenate([np.concatenate([soundfile.read(one.audio)[0], np.zeros(8000)]) for one in recordings * 3])
    assert len(long) > 30 * rate
    soundfile.write(tmp_path / "long.flac", long, rate)
    done = seam("transcribe", tmp_path / "stereo48.wav", tmp_path / "long.flac", "--model", TINY, "--json")
    assert done.returncode == 0, done.stderr
    one, other = map(json.loads, done.stdout.splitlines())
    assert abs(one["seconds"] - len(waveform) / rate) < 0.01
    assert other["seconds"] == round(len(long) / rate, 3)
    assert len(other["text"].split()) > 0.7 * sum(len(u.text.split()) for u in recordings * 3)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_names_that_the_terminal_cannot_print(recordings, tmp_path, monkeypatch, encoding):
    files = [tmp_path / "\u00fcn\u4e2d\U0001f600.wav", tmp_path / "plain.wav"]
    for file in files:
        shutil.copy(recordings[0].audio, file)

    def transcribe(*arguments) -> tuple[str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            try:
                app(["transcribe", *map(str, arguments), "--model", str(TINY)], standalone_mode=False)
            except typer.Exit:
                pass
        for stream in streams:
            stream.flush()
        return tuple(stream.buffer.getvalue().decode(encoding) for stream in streams)

    printed, _ = transcribe(*files, "--json")
    assert [json.loads(line)["file"] for line in printed.splitlines()] == [str(file) for file in files]
    no_utf8 = tmp_path / os.fsdecode(b"bad\xff.wav")
    shutil.copy(recordings[0].audio, no_utf8)
    printed, _ = transcribe(no_utf8, files[1], "--json")
    assert [json.loads(line)["file"] for line in printed.splitlines()] == [str(no_utf8), str(files[1])]
    odd, plain = transcribe(*files)[0].splitlines()
    assert odd.split(": ", 1)[1] == plain.split(": ", 1)[1] != ""
    missing = tmp_path / "\u4e2d.wav"
    shown = str(missing).encode(encoding, "backslashreplace").decode(encoding)
    assert f"error: {shown}: no such audio file" in transcribe(missing)[1]


def test_a_file_name_that_is_not_utf8_is_checked_and_printed(recordings, tmp_path, capsys):
    file = tmp_path / os.fsdecode(b"bad\xff.wav")
    shutil.copy(recordings[0].audio, file)
    check_audio(file)
    print_json({"file": str(file)})
    assert json.loads(capsys.readouterr().out) == {"file": str(file)}


def bad_files(folder):
    (folder / "text.wav").write_text("not audio at all")
    soundfile.write(folder / "none.wav", np.zeros(0), 16000)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan, 0.1]), 16000, subtype="FLOAT")
    (folder / "bert").mkdir()
    (folder / "empty").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (folder / "unknown.yaml").write_text("traning: {}")
    good = RECORDINGS / "audio" / "000000.wav"
    return {
        "missing file": (["transcribe", folder / "missing.wav"], "missing.wav: no such audio file"),
        "no audio": (["transcribe", folder / "text.wav", "--model", TINY], "text.wav cannot be read as audio"),
        "empty folder": (["transcribe", folder / "empty"], "empty: the folder holds no audio file"),
        "no match": (["transcribe", folder / "x*.wav"], "no file matches the pattern"),
        "no samples": (["transcribe", folder / "none.wav", "--model", TINY], "none.wav holds no audio samples"),
        "nan": (["transcribe", folder / "nan.wav", "--model", TINY], "nan.wav holds NaN"),
        "other architecture": (["transcribe", good, "--model", folder / "bert"], "architecture 'bert', not of 'seam'"),
        "no checkpoint": (["transcribe", good, "--model", folder / "nowhere"], "nowhere"),
        "unknown key": (
            ["train", "alignment", folder / "unknown.yaml"],
            "unknown recipe key traning; did you mean training?",
        ),
        "no recipe": (["train", "demo", folder / "none.yaml"], "none.yaml: no such recipe"),
    }


CASES = [
    "missing file",
    "no audio",
    "empty folder",
    "no match",
    "no samples",
    "nan",
    "other architecture",
    "no checkpoint",
    "unknown key",
    "no recipe",
]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence_and_a_non_zero_exit(case, tmp_path):
    arguments, message = bad_files(tmp_path)[case]
    done = seam(*arguments)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stderr and not done.stdout


def test_the_shipped_checkpoint_is_small_and_its_code_is_a_link_to_ours():
    links = {path.name: path.resolve() for path in TINY.iterdir() if path.is_symlink()}
    root = TINY.resolve().parents[1]
    assert links == {
        name: root / name for name in ("audio_files.py", "configuration_seam.py", "modeling_seam", "processing_seam.py")
    }
    files = [path for path in TINY.iterdir() if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert '"_name_or_path": "/' not in (TINY / "config.json").read_text()
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".md", ".png"}


def test_where_stage_1_hears_nothing_the_transcript_is_empty(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
    done = seam("transcribe", tmp_path / "silence.wav", "--model", TINY, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["seconds"] == 1.0
    if not row["stage1"]:
        assert not row["text"]


def test_evaluate_and_score(tmp_path):
    manifest = RECORDINGS / "manifest.jsonl"
    done = seam("evaluate", TINY, "--data", manifest, "--systems", "stage1,full", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "| WER %, Whisper's English normaliser | recordings (29 words) |" in done.stdout
    assert "full-noftg" not in done.stdout and "RTFx" in done.stdout
    results = (tmp_path / "out" / "results.json").read_bytes()
    again = seam("score", tmp_path / "out")
    assert again.returncode == 0 and again.stdout == done.stdout
    assert (tmp_path / "out" / "results.json").read_bytes() == results
    for arguments, message in (
        (["evaluate", TINY, "--data", manifest, "--systems", "fast", "--out", tmp_path / "x"], "system 'fast'"),
        (["evaluate", TINY, "--data", tmp_path / "no.jsonl", "--out", tmp_path / "x"], "no.jsonl: no such manif"),
        (["evaluate", tmp_path / "none", "--data", manifest, "--out", tmp_path / "x"], "cannot load the checkpoint"),
        (
            ["evaluate", TINY, "--data", manifest, "--casing", "keep", "--out", tmp_path / "out"],
            "holds hypotheses of another run (casing: lower, now keep)",
        ),
        (["score", tmp_path / "x"], "run.json is missing"),
    ):
        refused = seam(*arguments)
        (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
        assert refused.returncode == 1 and message in line and "Traceback" not in refused.stderr
    assert not (tmp_path / "x").exists()


def test_processes_end_together(tmp_path):
    """A process group that is left open may abort its process at the end."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    (tmp_path / "recipe.yaml").write_text("training: {output_dir: out, use_cpu: true}\n")
    run_recipe(StageRecipe, lambda recipe: {}, tmp_path / "recipe.yaml", None)
    assert not distributed.is_initialized()
