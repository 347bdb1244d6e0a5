"""`seam data prepare`, as a user runs it."""

import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from seam.__main__ import app
from seam.data.manifest import read_manifest
from seam.tests.helpers import forked
from seam.tests.helpers.shipped import TINY
from seam.tests.helpers.sounds import tone, write


@pytest.fixture
def corpus(tmp_path):
    """One chapter of LibriSpeech: three good utterances, 22 silent ones."""
    folder = tmp_path / "LibriSpeech" / "test-other" / "1688" / "142285"
    ids = [f"1688-142285-{number:04d}" for number in range(25)]
    for number, id in enumerate(ids):
        write(folder / f"{id}.flac", tone(2.0, 200 + 50 * number) if number < 3 else np.zeros(16000 + number))
    (folder / "1688-142285.trans.txt").write_text("".join(f"{id} TURN ON THE LIGHT\n" for id in ids))
    return tmp_path


@pytest.mark.medium
def test_what_is_kept_and_what_is_left_out_is_printed(corpus):
    command = [sys.executable, "-m", "seam", "data", "prepare", "librispeech", "LibriSpeech", "out"]
    done = forked.run([*command, "--tokenizer", TINY], cwd=corpus)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("out/manifest.jsonl: 3 utterances, 0.00 hours, speakers: 1")
    assert lines[1].startswith("tokens per second, casing lower: ")
    assert lines[4] == "left out: 22 (22 silent)"
    assert lines[5] == "  1688-142285-0003: silent (0.00 s of 1.00 s are above -66 dBFS)"
    assert len(lines) == 5 + 20 + 1 and lines[-1].startswith("  2 more in ") and lines[-1].endswith("left_out.jsonl")
    assert len(read_manifest(corpus / "out" / "manifest.jsonl")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["librispeech", "nowhere", "out"], "nowhere: no such folder."),
        (["tedlium", "LibriSpeech", "out"], "LibriSpeech is not TED-LIUM as unpacked: looked for"),
        (["librispeech", ".", "out", "--split", "dev"], ". has no split 'dev'; it has test-other."),
        (["librispeech", ".", "out", "--text-column", "text"], "--text-column is for the kind dataset, not for libri"),
        (["librispeech", ".", "out", "--max-seconds", "0.5"], "nothing is left to write a manifest of: 25 too long."),
        (["librispeech", ".", "out", "--tokenizer", "nowhere"], "no tokenizer can be loaded from 'nowhere'"),
        (["dataset", "nobody/nothing", "out", "--streaming"], "nobody/nothing"),
    ],
)
def test_bad_input_is_one_sentence(corpus, arguments, message, monkeypatch):
    monkeypatch.chdir(corpus)
    done = CliRunner().invoke(app, ["data", "prepare", *arguments])
    assert done.exit_code == 1 and not done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in done.stderr
