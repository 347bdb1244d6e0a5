"""What README.md and the shipped checkpoint's card say to run, runs: their Python blocks, in order, in one process."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from seam.tests.helpers import forked

ROOT = Path(__file__).parents[1]
WITHOUT_PACKAGE = "import sys\nsys.modules['seam'] = None  # any import of the package fails\n"


def run_blocks(document: Path, folder: Path, head: str = "") -> str:
    """Run the blocks marked `python` and nothing else, beside `checkpoints` and `recording.wav`; returns the output."""
    blocks = re.findall(r"^```python\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    shutil.copyfile(ROOT / "checkpoints" / "recordings" / "audio" / "000000.wav", folder / "recording.wav")
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", head + "\n".join(blocks)]
    done = forked.run(command, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme(tmp_path):
    assert "set the light to ten degrees" in run_blocks(ROOT / "README.md", tmp_path)


def test_card_without_the_package(tmp_path):
    card = ROOT / "checkpoints" / "tiny" / "README.md"
    if not (card.parent / "configuration_seam.py").exists():
        pytest.skip("the checkpoint carries no code")
    written = run_blocks(card, tmp_path, WITHOUT_PACKAGE)
    assert written.count("set the light to ten degrees") == 3  # the pipeline, the model, Stage 1
