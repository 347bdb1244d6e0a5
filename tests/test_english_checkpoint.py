"""The shipped English checkpoint and the recordings of people that `seam demo` transcribes."""

import json
import os
import sys

import pytest
import soundfile

from seam.__main__ import CHECKPOINT, RECORDINGS
from seam.data.manifest import read_manifest
from seam.evaluation.scoring import word_errors
from seam.evaluation.transcription import transcribe
from seam.modeling_seam import load_checkpoint
from seam.modeling_seam.weights import packaged_folder
from seam.tests.helpers import forked

CONFIG = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
needs_backbones = pytest.mark.skipif(
    not all(packaged_folder(one["id"]).is_dir() for one in CONFIG["backbones"].values()),
    reason="the backbones are not in the cache: seam backbones",
)


def test_it_is_light_and_its_code_is_a_link_to_ours():
    root = CHECKPOINT.parents[1]
    links = {path.name: path.resolve() for path in CHECKPOINT.iterdir() if path.is_symlink()}
    assert links == {
        name: root / name for name in ("audio_files.py", "configuration_seam.py", "modeling_seam", "processing_seam.py")
    }
    files = [path for path in CHECKPOINT.iterdir() if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) <= 80e6
    assert CONFIG["light_checkpoint"] and CONFIG["token_projection"] == "table"
    assert '"_name_or_path": "/' not in (CHECKPOINT / "config.json").read_text()
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    corpora = "LibriSpeech", "Common Voice", "speechocean762", "AN4", "RoboTutor", "African Storybook", "LJ Speech"
    assert not [corpus for corpus in corpora if corpus not in card]


def test_recordings_are_of_people_whom_no_training_has_heard():
    people = read_manifest(RECORDINGS / "manifest.jsonl")
    assert len(people) >= 8 and max(one.duration for one in people) > 30
    assert {one.audio.stem.rpartition("-")[2] for one in people} >= {"noisy", "telephone"}
    assert all(soundfile.info(one.audio).samplerate == 16000 for one in people)
    rows = [json.loads(line) for line in (RECORDINGS / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["licence"] for row in rows} == {"public domain", "CC0-1.0"}
    shared = CHECKPOINT.parents[2] / "shared"
    if not shared.is_dir():
        pytest.skip("the corpora are not here")
    trained = {
        one.speaker for name in ("speech", "speech_en") for one in read_manifest(shared / name, "train") if one.speaker
    }
    assert not trained & {one.speaker for one in people}


@needs_backbones
@pytest.mark.medium
def test_it_transcribes_people():
    model, processor = load_checkpoint(str(CHECKPOINT))
    people = [one for one in read_manifest(RECORDINGS / "manifest.jsonl") if one.duration < 8]
    texts = transcribe(model, processor, [one.audio for one in people])
    references = [one.text for one in people]
    assert word_errors(references, [one.stage1 for one in texts], "english").error_rate < 20
    assert word_errors(references, [one.text for one in texts], "english").error_rate < 20
    assert "He knows that the little soul has not been lost after all." in [one.text for one in texts]


@needs_backbones
@pytest.mark.timeout(900)  # it writes and reads half a gigabyte several times
@pytest.mark.slow
def test_exported_whole_it_needs_neither_this_package_nor_the_backbones(tmp_path):
    done = forked.run([sys.executable, "-m", "seam", "export", str(CHECKPOINT), str(tmp_path / "full")])
    assert done.returncode == 0, done.stderr
    code = f"""
import sys
sys.modules["seam"] = None  # any import of the package fails
from transformers import pipeline
pipe = pipeline("automatic-speech-recognition", model={str(tmp_path / "full")!r}, trust_remote_code=True)
print(pipe({str(RECORDINGS / "audio" / "soul.flac")!r})["text"])
"""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "none"),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    done = forked.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    model, processor = load_checkpoint(str(CHECKPOINT))
    (expected,) = transcribe(model, processor, [RECORDINGS / "audio" / "soul.flac"])
    assert done.stdout.strip() == expected.text
