"""From a model in memory to the Hub and back through `pipeline`, with a stand-in for the Hub."""

import sys
import textwrap
from pathlib import Path

import pytest

from seam.data.manifest import read_manifest
from seam.tests.helpers import forked
from seam.tests.helpers.hub_stub import LocalHub
from seam.tests.helpers.shipped import RECORDINGS, TINY

pytestmark = pytest.mark.medium

ROOT = Path(__file__).parents[2]
PUSH = """
    import sys
    from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
    model, processor = (c.from_pretrained(sys.argv[1]) for c in (SeamForSpeechRecognition, SeamProcessor))
    model.push_to_hub("user/seam", private=True, commit_message="Weights")
    processor.push_to_hub("user/seam", private=True)
    model.push_to_hub("user/sharded", max_shard_size="4MB", private=True)
    model.save_pretrained("saved", push_to_hub=True, repo_id="user/saved", private=True, commit_message="Saved")
    print(processor.batch_decode(model.generate(**processor(audio=sys.argv[2])))[0].strip())
"""
TRANSCRIBE = """
    import sys
    sys.modules["seam"] = None  # any import of it fails
    from transformers import AutoModelForSpeechSeq2Seq, pipeline
    asr = pipeline("automatic-speech-recognition", model="user/seam", trust_remote_code=True)
    text = asr(sys.argv[1])["text"]
    same = asr.model.state_dict()
    for name in ("user/sharded", "user/saved"):
        other = AutoModelForSpeechSeq2Seq.from_pretrained(name, trust_remote_code=True).state_dict()
        assert other.keys() == same.keys() and all(other[key].equal(same[key]) for key in same)
    print(text)
"""


def run(script: str, *arguments, environment, cwd) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = forked.run(command, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


def test_pushed_and_transcribed_by_id(hub, tmp_path):
    audio = read_manifest(RECORDINGS / "manifest.jsonl")[0].audio
    expected = run(PUSH, TINY, audio, environment=hub.environment(tmp_path / "pusher"), cwd=tmp_path)
    files = hub.repos["user/seam"].files
    code = {f"modeling_seam/{path.name}" for path in (ROOT / "modeling_seam").glob("*.py")}
    code -= {"modeling_seam/__init__.py"}
    code |= {"audio_files.py", "configuration_seam.py", "processing_seam.py"}
    texts = {"config.json", "generation_config.json", "processor_config.json", "tokenizer.json"}
    texts |= {"tokenizer_config.json", "chat_template.jinja", "README.md", ".gitattributes"}
    assert set(files) == code | texts | {"model.safetensors"}
    for name in code:
        assert files[name] == (ROOT / name).read_bytes()
    assert [commit.title for commit in hub.repos["user/seam"].commits][:2] == ["initial commit", "Weights"]
    assert all(hub.repos[f"user/{name}"].private for name in ("seam", "sharded", "saved"))
    sharded, saved = hub.repos["user/sharded"].files, hub.repos["user/saved"]
    assert "model.safetensors.index.json" in sharded and "model.safetensors" not in sharded
    assert saved.files["model.safetensors"] == files["model.safetensors"]
    assert saved.branches["main"].title == "Saved"
    assert code - {"audio_files.py", "processing_seam.py"} <= set(saved.files) & set(sharded)

    environment = hub.environment(tmp_path / "user")
    environment.pop("PYTHONPATH", None)
    assert run(TRANSCRIBE, audio, environment=environment, cwd="/") == expected
