"""`seam push` with the Hub's real client against a local stand-in, and loading back by id."""

import json
import sys

import pytest

from seam.publishing.export import export
from seam.tests.helpers import forked
from seam.tests.helpers.hub_stub import LocalHub
from seam.tests.helpers.shipped import RECORDINGS, TINY

RECORDING = str(RECORDINGS / "audio" / "000000.wav")
LOAD_BY_ID = f"""
import sys; sys.modules["seam"] = None
from transformers import pipeline
print(pipeline("automatic-speech-recognition", model="user/tiny", trust_remote_code=True)({RECORDING!r})["text"])
"""


def run(arguments, hub, cache, **environment):
    environment = {**hub.environment(cache), **environment}
    return forked.run([sys.executable, *arguments], env=environment)


def push(hub, cache, *options, model=TINY):
    return run(["-m", "seam", "push", str(model), "user/tiny", *options], hub, cache)


@pytest.mark.slow
def test_push_load_back_and_push_again(tmp_path):
    with LocalHub() as hub:
        pushed = push(hub, tmp_path / "a", "--private", "--verify")
        assert pushed.returncode == 0, pushed.stderr
        repository = hub.repos["user/tiny"]
        assert repository.private and "verified" in pushed.stdout
        card = repository.files["README.md"].decode()
        assert "user/tiny" in card and "model-index" in card
        config = json.loads(repository.files["config.json"])
        assert config["auto_map"]["AutoModel"] == "modeling_seam/modeling_seam.SeamForSpeechRecognition"

        loaded = run(["-c", LOAD_BY_ID], hub, tmp_path / "b", HF_MODULES_CACHE=str(tmp_path / "modules"))
        assert loaded.stdout.strip() == "set the light to ten degrees", loaded.stderr

        commits = len(repository.commits)
        before = dict(repository.files)
        hub.fail_uploads = True
        merged = export(str(TINY), tmp_path / "merged", merge=True)
        failed = push(hub, tmp_path / "a", model=merged)
        assert failed.returncode == 1
        assert "error: the upload failed" in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
        assert len(repository.commits) == commits and dict(repository.files) == before


@pytest.mark.slow
def test_a_public_repository_is_not_taken_for_private(tmp_path):
    with LocalHub() as hub:
        assert push(hub, tmp_path).returncode == 0
        again = push(hub, tmp_path, "--private")
        assert again.returncode == 1 and "is public" in again.stderr
