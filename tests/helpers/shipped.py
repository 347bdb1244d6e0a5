"""The tiny checkpoint and its recordings, which tests use; the commands' default is the English one."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
TINY = CHECKPOINTS / "tiny"
RECORDINGS = CHECKPOINTS / "recordings"
