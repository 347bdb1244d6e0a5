"""What is missing is named before anything slow is imported, and no line is printed that is not the program's own."""

import json
import re
import subprocess
import sys

import pytest

from seam.tests.helpers.shipped import RECORDINGS, TINY

pytestmark = pytest.mark.medium

SLOW = ("torch", "transformers", "datasets", "librosa", "peft")
IN_ONE_PROCESS = f"""
import sys
from seam.__main__ import app
try:
    app(sys.argv[1:], prog_name="seam")
finally:
    print("imported:", *(name for name in {SLOW} if name in sys.modules))
"""


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", IN_ONE_PROCESS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["transcribe", "none.wav"], "none.wav: no such audio file."),
        (["transcribe", __file__], "test_startup.py cannot be read as audio"),
        (["demo", "none.wav"], "none.wav: no such audio file."),
        (["explain", "none.wav"], "none.wav: no such audio file."),
        (["describe", "none.yaml"], "none.yaml: no such recipe."),
        (["describe", "./no/folder"], "cannot load the checkpoint './no/folder': no such folder"),
        (["evaluate", TINY, "--data", "none.jsonl", "--out", "out"], "none.jsonl: no such manifest."),
        (["score", "nowhere"], "run.json is missing"),
        (["export", __file__, "out"], "test_startup.py': it is a file; accepted: a folder or a Hub id."),
        (["merge", RECORDINGS, "out"], "the folder has no config.json."),
        (["selfcheck", TINY, "--recording", "none.wav"], "none.wav: no such audio file."),
        (["train", "alignment", "none.yaml"], "none.yaml: no such recipe."),
        (["compare", "none.yaml"], "none.yaml: no such recipe."),
        (["data", "prepare", "librispeech", "nowhere", "out"], "nowhere: no such folder."),
    ],
    ids=lambda value: " ".join(map(str, value[:1])) if isinstance(value, list) else None,
)
def test_what_is_missing_is_named_before_anything_slow_is_imported(arguments, message):
    done = run(*arguments)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert done.returncode == 1 and done.stdout == "imported:\n"


def test_scoring_needs_neither_torch_nor_transformers(tmp_path):
    row = {"id": 0, "audio": "a.wav", "test_set": "t", "corpus": None, "split": None, "speaker": None}
    row |= {"reference": "one two", "text": "one too", "stage1": "one", "seconds": 1.0, "wall_seconds": 0.5}
    row |= {"tokens": [1, 2], "stage1_tokens": [1], "embeddings": 1, "reference_tokens": [1, 3]}
    run_record = {
        "data": [{"manifest": "t", "utterances": 1, "sha256": "0"}],
        "casing": "lower",
        "batch_size": 1,
        "model": {"name": "m", "sha256": "0"},
        "dtype": "float32",
        "systems": ["full"],
        "hardware": ["CPU"],
        "software": "",
    }
    (tmp_path / "hypotheses").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(run_record))
    (tmp_path / "hypotheses" / "full.jsonl").write_text(json.dumps(row) + "\n")
    done = run("score", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "50.0" in done.stdout and done.stdout.splitlines()[-1] == "imported:"


def test_the_demo_prints_nothing_but_its_table():
    done = run("demo")
    assert done.returncode == 0 and done.stderr == ""
    table = done.stdout.splitlines()
    assert table[0].startswith("┏") and table[-2].startswith("WER of the 10 shipped recordings:")


def test_a_training_prints_nothing_but_its_progress_and_result(tmp_path):
    manifest = str(RECORDINGS / "manifest.jsonl")
    training = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    training |= {"save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "wer", "use_cpu": True}
    data = {"train": [manifest], "validation": [manifest]}
    recipe = tmp_path / "recipe.json"  # which is YAML, too
    recipe.write_text(json.dumps({"model": str(TINY), "data": data, "training": training}))
    done = run("train", "instruction", recipe)
    assert done.returncode == 0, done.stderr
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert lines and all(re.match(r"(transcribing: )? *\d+%\|.*(step/s|s/step|it/s|s/it)", line) for line in lines), (
        lines
    )
    assert json.loads(done.stdout[done.stdout.index('{\n "') :].rsplit("imported:", 1)[0])["output_dir"]
