"""A Hub cache made by hand: what a download would leave, for processes without network."""

import shutil
from pathlib import Path


def add_to_cache(cache: Path, repo_id: str, folder: Path, commit: str) -> Path:
    """Put the files of a folder into a cache as the head of `repo_id`; returns the snapshot's folder."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot
