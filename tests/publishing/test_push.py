"""`seam push` with the Hub's real client against a local stand-in, and loading back by id."""

import json
import sys

import pytest

from seam.data.manifest import read_manifest
from seam.publishing.export import export
from seam.tests.helpers import forked
from seam.tests.helpers.hub_stub import LocalHub
from seam.tests.helpers.shipped import RECORDINGS, TINY
from seam.tests.helpers.training_sounds import write_sounds

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


TRANSCRIBE_BY_ID = """
import sys; sys.modules["seam"] = None
from transformers import pipeline
asr = pipeline("automatic-speech-recognition", model="user/trained", trust_remote_code=True)
print(repr(asr(sys.argv[1], **({"use_llm": False} if len(sys.argv) == 3 else {}))["text"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["alignment", "instruction"])
def test_a_training_pushes_what_loads(backbones, tmp_path, stage):
    """With `training.push_to_hub`: code, config, processor and card, in one commit, of the weights of the end."""
    manifest, recipe, out = write_sounds(tmp_path), tmp_path / "recipe.yaml", tmp_path / "trained"
    model = {"model": str(TINY)} if stage == "instruction" else {"encoder": backbones[0], "llm": backbones[1]}
    training = {"output_dir": str(out), "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "use_cpu": True}
    training |= {"push_to_hub": True, "hub_private_repo": True, "report_to": "none"}
    data = {"train": [manifest], "validation": [manifest]}
    recipe.write_text(json.dumps({**model, "training": training, "data": data}))
    with LocalHub() as hub:
        trained = run(["-m", "seam", "train", stage, str(recipe)], hub, tmp_path / "a")
        assert trained.returncode == 0, trained.stderr
        repository = hub.repos["user/trained"]
        assert repository.private and f"user/trained at {repository.branches['main'].sha}" in trained.stdout
        titles = [commit.title for commit in repository.commits if commit.files]
        assert titles[-1] == "Upload SEAM checkpoint" and len([one for one in titles if "Upload" in one]) == 1
        assert "user/trained" in repository.files["README.md"].decode()
        assert {"modeling_seam/modeling_seam.py", "processing_seam.py", "config.json"} <= set(repository.files)
        assert not [name for name in repository.files if name.startswith("checkpoint-")]
        audio = str(read_manifest(manifest)[0].audio)
        options = [audio] if stage == "instruction" else [audio, "stage1"]
        loaded = run(["-c", TRANSCRIBE_BY_ID, *options], hub, tmp_path / "b", HF_MODULES_CACHE=str(tmp_path / "m"))
        local = TRANSCRIBE_BY_ID.replace("user/trained", str(out))
        expected = run(["-c", local, *options], hub, tmp_path / "b", HF_MODULES_CACHE=str(tmp_path / "m"))
        assert loaded.returncode == expected.returncode == 0, loaded.stderr
        assert loaded.stdout == expected.stdout
