"""The repository's own layout is a loadable Hub repository; and no code of a checkpoint runs untrusted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "tiny"
RECORDING = str(ROOT / "checkpoints" / "recordings" / "audio" / "000000.wav")
WITHOUT_PACKAGE = "import sys\nsys.modules['seam'] = None\n"


def run(script: str, folder: Path, home: Path) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    return subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path) -> Path:
    """The repository's files, with the checkpoint's weights and settings put beside the code."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("modeling_seam", "train", "tests", "publishing"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("configuration_seam.py", "processing_seam.py", "setup.cfg", "model_card.md", "__init__.py"):
        shutil.copyfile(ROOT / name, folder / name)
    for path in CHECKPOINT.iterdir():
        if not path.is_symlink():
            shutil.copyfile(path, folder / path.name)
    return folder


def test_a_clone_with_weights_beside_the_code_loads(clone, tmp_path):
    script = f"""
from transformers import AutoModel, AutoProcessor, pipeline
assert type(AutoModel.from_pretrained(".", trust_remote_code=True)).__name__ == "SeamForSpeechRecognition"
assert type(AutoProcessor.from_pretrained(".", trust_remote_code=True)).__name__ == "SeamProcessor"
print(pipeline("automatic-speech-recognition", model=".", trust_remote_code=True)({RECORDING!r})["text"])
"""
    done = run(WITHOUT_PACKAGE + script, clone, tmp_path / "home")
    assert done.stdout.strip() == "set the light to ten degrees", done.stderr


@pytest.mark.parametrize(
    "call", ["AutoConfig.from_pretrained('.'", "AutoModel.from_pretrained('.'", "pipeline(model='.'"]
)
def test_no_code_of_a_checkpoint_runs_without_trust(clone, tmp_path, call):
    marker = tmp_path / "ran"
    for path in ("configuration_seam.py", "processing_seam.py", "modeling_seam/modeling_seam.py"):
        with (clone / path).open("a") as file:
            file.write(f"\nopen({str(marker)!r}, 'w')\n")
    script = f"from transformers import AutoConfig, AutoModel, pipeline\n{call}, trust_remote_code=%s)"
    refused = run(WITHOUT_PACKAGE + script % False, clone, tmp_path / "home")
    assert refused.returncode and "trust_remote_code" in refused.stderr
    assert not marker.exists()
    assert run(WITHOUT_PACKAGE + script % True, clone, tmp_path / "home").returncode == 0
    assert marker.exists()  # the marker works


def test_with_the_package_no_trust_is_needed(tmp_path):
    script = f"""
import seam.modeling_seam
from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor
for auto in (AutoModel, AutoModelForMultimodalLM):
    assert type(auto.from_pretrained({str(CHECKPOINT)!r})) is seam.modeling_seam.SeamForSpeechRecognition
assert type(AutoProcessor.from_pretrained({str(CHECKPOINT)!r})) is seam.modeling_seam.SeamProcessor
"""
    done = run(script, tmp_path, tmp_path / "home")
    assert done.returncode == 0, done.stderr
