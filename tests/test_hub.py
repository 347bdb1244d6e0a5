"""The stand-in for the Hub, with the real client, which runs in processes of its own: see `helpers/hub_stub.py`."""

import hashlib
import http.client
import subprocess
import sys
import textwrap

import pytest

from seam.tests.helpers.hub_stub import TOKEN, LocalHub

pytestmark = pytest.mark.medium

HEAD = """
    from pathlib import Path
    import huggingface_hub as client
    from huggingface_hub import errors

    def fails(error, call, *arguments, **options):
        try:
            call(*arguments, **options)
        except error as raised:
            return raised
        raise AssertionError(f"no {error}")
"""
PUSH = """
    client.create_repo("user/name", private=True, exist_ok=True)
    client.upload_folder(repo_id="user/name", folder_path="upload", commit_message="Push")
"""


@pytest.fixture
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """Return a function that runs scripts in one process; the folder `upload` contains two texts and weights."""
    upload = tmp_path / "upload"
    (upload / "notes").mkdir(parents=True)
    (upload / "README.md").write_text("---\nlicense: mit\n---\n# Model\n", encoding="utf-8")
    (upload / "notes" / "größe.txt").write_text("one two three\n", encoding="utf-8")
    (upload / "model.safetensors").write_bytes(bytes(range(256)) * 4096)

    def run(*scripts: str) -> subprocess.CompletedProcess:
        script = "".join(map(textwrap.dedent, (HEAD, *scripts)))
        environment = hub.environment(tmp_path / "cache")
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    return run


def check(done: subprocess.CompletedProcess):
    assert done.returncode == 0, done.stderr


def test_what_was_uploaded_comes_back(hub, run, tmp_path):
    script = """
    assert client.whoami()["name"] == "user"
    assert fails(errors.HfHubHTTPError, client.create_repo, "user/name").response.status_code == 409
    assert client.create_repo("user/name", exist_ok=True).repo_id == "user/name"
    first = client.model_info("user/name").sha
    client.upload_folder(repo_id="user/name", folder_path="upload")  # nothing new: no commit
    assert client.model_info("user/name", revision=first).private

    def uploaded(folder):
        files = list(Path("upload").rglob("*.*"))
        assert len(files) == 3
        for file in files:
            assert (Path(folder) / file.relative_to("upload")).read_bytes() == file.read_bytes()
    uploaded(client.snapshot_download("user/name"))
    uploaded(client.snapshot_download("user/name", revision=first, local_dir="copy"))

    Path("upload/README.md").write_text("---\\nlicense: mit\\n---\\n# Better\\n")
    Path("upload/notes/größe.txt").unlink()
    options = dict(repo_id="user/name", folder_path="upload", delete_patterns="*", parent_commit=first)
    client.upload_folder(**options)
    assert client.list_repo_files("user/name") == [".gitattributes", "README.md", "model.safetensors"]
    assert "# Better" in Path(client.hf_hub_download("user/name", "README.md")).read_text()
    assert "# Model" in Path(client.hf_hub_download("user/name", "README.md", revision=first)).read_text()
    client.ModelCard("---\\nlicense: mit\\n---\\n# Best\\n").push_to_hub("user/name")
    assert "# Best" in client.ModelCard.load("user/name").content
    error = fails(errors.HfHubHTTPError, client.upload_folder, **options)  # a commit has happened since
    assert error.response.status_code == 412

    fails(errors.EntryNotFoundError, client.hf_hub_download, "user/name", "absent.json")
    fails(errors.EntryNotFoundError, lambda: list(client.list_repo_tree("user/name", "absent")))
    fails(errors.RevisionNotFoundError, client.hf_hub_download, "user/name", "README.md", revision="absent")
    fails(errors.RepositoryNotFoundError, client.model_info, "user/absent")
    assert not client.file_exists("user/name", "notes/größe.txt") and not client.repo_exists("user/absent")
    """
    check(run(PUSH, script))
    repository = hub.repos["user/name"]
    assert repository.private
    titles = ["initial commit", "Push", "Upload folder using huggingface_hub", "Upload README.md with huggingface_hub"]
    assert [commit.title for commit in repository.commits] == titles
    assert set(repository.commits[1].files) == {".gitattributes", "README.md", "model.safetensors", "notes/größe.txt"}
    assert repository.files["model.safetensors"] == (tmp_path / "upload" / "model.safetensors").read_bytes()
    assert len(hub.objects) == 1  # the weights travelled by LFS, once
    assert sum(request.startswith("PUT") for request in hub.requests) == 1


def test_a_failed_upload_leaves_the_old_commit(hub, run, tmp_path):
    check(run(PUSH))
    before = dict(hub.repos["user/name"].files)
    (tmp_path / "upload" / "model.safetensors").write_bytes(b"new weights")
    (tmp_path / "upload" / "README.md").write_text("---\nlicense: mit\n---\n# New\n")
    hub.fail_uploads = True
    done = run(PUSH)
    assert done.returncode != 0 and "507" in done.stderr
    assert hub.repos["user/name"].files == before and len(hub.repos["user/name"].commits) == 2
    hub.fail_uploads = False
    check(run(PUSH))
    assert hub.repos["user/name"].files["model.safetensors"] == b"new weights"


def test_only_announced_and_correct_content_is_taken(hub):
    def put(oid: str, content: bytes) -> int:
        connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
        connection.request("PUT", f"/lfs/{oid}", content)
        return connection.getresponse().status

    oid = hashlib.sha256(b"content").hexdigest()
    assert put(oid, b"content") == 403
    hub.objects[oid] = None
    assert put(oid, b"contend") == 400 and hub.objects[oid] is None
    assert put(oid, b"content") == 200 and hub.objects[oid] == b"content"


def test_writing_and_private_reading_need_the_token(hub, run):
    check(run(PUSH))
    script = """
    assert fails(errors.HfHubHTTPError, client.create_repo, "user/other", token={token}).response.status_code == 401
    error = fails(errors.HfHubHTTPError, client.upload_file, repo_id="user/name", path_or_fileobj=b"x",
                  path_in_repo="x.txt", token={token})
    assert error.response.status_code == 401
    fails(errors.HfHubHTTPError, client.model_info, "user/name", token={token})
    fails((errors.HfHubHTTPError, ValueError), client.whoami, token={token})
    """
    check(run(script.format(token=False), script.format(token="'hf_wrong'")))
    forbidden = 'assert fails(errors.HfHubHTTPError, client.create_repo, "other/name").response.status_code == 403'
    check(run(forbidden))
    assert list(hub.repos) == ["user/name"] and len(hub.repos["user/name"].commits) == 2
    hub.repos["user/name"].private = False
    check(run("client.hf_hub_download('user/name', 'README.md', token=False)"))


def test_a_model_with_code_of_its_own(hub, run, tmp_path):
    (tmp_path / "tiny.py").write_text(
        textwrap.dedent("""
        import torch
        from transformers import PretrainedConfig, PreTrainedModel

        class TinyConfig(PretrainedConfig):
            model_type = "tiny"

        class TinyModel(PreTrainedModel):
            config_class = TinyConfig

            def __init__(self, config):
                super().__init__(config)
                self.layer = torch.nn.Linear(2, 3)
                self.post_init()
        """)
    )
    done = run("""
    from tiny import TinyConfig, TinyModel
    from transformers import AutoConfig, AutoModel
    TinyConfig.register_for_auto_class()
    TinyModel.register_for_auto_class("AutoModel")
    model = TinyModel(TinyConfig())
    model.push_to_hub("user/tiny", private=True, tags=["speech"])
    assert AutoConfig.from_pretrained("user/tiny", trust_remote_code=True).model_type == "tiny"
    loaded = AutoModel.from_pretrained("user/tiny", trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules")
    assert loaded.layer.weight.equal(model.layer.weight)
    model.push_to_hub("user/tiny", revision="draft", commit_message="Draft", tags=["draft"])
    """)
    check(done)
    repository = hub.repos["user/tiny"]
    assert set(repository.files) == {".gitattributes", "README.md", "config.json", "model.safetensors", "tiny.py"}
    assert repository.branches["draft"].title == "Draft" and repository.branches["main"].title == "Upload model"


def test_the_environment_is_closed(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")
    monkeypatch.setenv("https_proxy", "http://elsewhere")
    environment = hub.environment(tmp_path)
    assert "HF_HUB_CACHE" not in environment and "https_proxy" not in environment
    assert (environment["HF_ENDPOINT"], environment["HF_TOKEN"]) == (hub.endpoint, TOKEN)
    assert environment["HF_HUB_OFFLINE"] == "0"  # conftest.py sets 1 for the tests themselves
