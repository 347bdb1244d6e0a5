"""Push a checkpoint to the Hub in one commit, so that an interrupted push leaves the old one in place."""

import fnmatch
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from seam.data.files import sha256_of
from seam.modeling_seam.weights import WEIGHT_FILES
from seam.publishing.export import export


def push(model: str, repo_id: str, private: bool = False, verify: bool = False, **options) -> str:
    """
    Export a checkpoint and upload the folder.

    Args:
        model: folder or Hub id.
        repo_id: `owner/name`; created if it does not exist.
        private: make a new repository private.
        verify: download the commit afterwards and compare every file.
        options: of `seam.publishing.export.export`.

    Returns:
        The commit's id.

    Raises:
        OSError: when the Hub is not reached or an upload fails.
        ValueError: when `private` is set and the repository is public, or a downloaded file differs.
    """
    api = HfApi()
    try:
        known = api.model_info(repo_id)
    except RepositoryNotFoundError:
        known = None
    if known is not None and private and not known.private:
        raise ValueError(f"{repo_id} exists and is public; make it private first, or push without --private.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = export(model, Path(temporary) / "checkpoint", model_id=repo_id, **options)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        api.create_repo(repo_id, private=private, exist_ok=True)
        present = set(api.list_repo_files(repo_id))
        stale = fnmatch.filter(present - set(files), WEIGHT_FILES)
        try:
            commit = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
                    *(CommitOperationDelete(name) for name in sorted(stale)),
                ],
                commit_message="Upload SEAM checkpoint",
            )
        except RuntimeError as error:  # raised by the client when the upload of a large file fails
            raise OSError(f"the upload failed, and {repo_id} is as it was: {error}") from error
        if verify:
            with tempfile.TemporaryDirectory() as cache:
                copy = Path(snapshot_download(repo_id, revision=commit.oid, cache_dir=cache))
                different = [name for name, path in files.items() if sha256_of([copy / name]) != sha256_of([path])]
            if different:
                raise ValueError(f"{repo_id} at {commit.oid}: {different[0]} differs from what was uploaded.")
    return commit.oid
