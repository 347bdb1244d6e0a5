"""Push a checkpoint to the Hub in one commit, so that an interrupted push leaves the old one in place."""

import fnmatch
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from seam.data.files import sha256_of
from seam.modeling_seam.weights import WEIGHT_FILES
from seam.publishing.export import export


def push(
    model: str, repo_id: str, private: bool = False, verify: bool = False, token: str | None = None, **options
) -> str:
    """
    Export a checkpoint and upload the folder.

    Args:
        model: folder or Hub id.
        repo_id: `owner/name`; created if it does not exist.
        private: make a new repository private.
        verify: download the commit afterwards and compare every file.
        token: of the Hub; by default the one that is logged in with.
        options: of `seam.publishing.export.export`.

    Returns:
        The commit's id.

    Raises:
        OSError: when the Hub is not reached or an upload fails.
        ValueError: when `private` is set and the repository is public, or a downloaded file differs.
    """
    api = HfApi(token=token)
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
                copy = Path(snapshot_download(repo_id, revision=commit.oid, cache_dir=cache, token=token))
                different = [name for name, path in files.items() if sha256_of([copy / name]) != sha256_of([path])]
            if different:
                raise ValueError(f"{repo_id} at {commit.oid}: {different[0]} differs from what was uploaded.")
    return commit.oid


def pushing(main: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """
    Return a stage's `main` that pushes its result where the recipe says so (`training.push_to_hub`).

    The trainers of transformers push weights and config of their checkpoints, which do not load without the code. Here
    nothing is pushed before the end, and then all that `push` does; the repository is made before the training.

    Args:
        main: of the stage; it saves a checkpoint in `training.output_dir`.
    """

    def train_and_push(recipe: Any) -> dict[str, Any]:
        training = recipe.training
        if not training.push_to_hub:
            return main(recipe)
        repo_id = training.hub_model_id or Path(training.output_dir).resolve().name
        private, is_first = bool(training.hub_private_repo), training.process_index == 0
        if is_first:
            api = HfApi(token=training.hub_token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and not api.model_info(repo_id).private:
                raise ValueError(f"training.hub_private_repo: {repo_id} exists and is public; make it private first.")
        training.push_to_hub = False
        result = main(recipe)
        if is_first:
            commit = push(training.output_dir, repo_id, private=private, token=training.hub_token)
            result = {**result, "pushed": f"{repo_id} at {commit}"}
        return result

    return train_and_push
