"""A stand-in for the Hub on this machine: enough of its HTTP API for the real client to push and to download models.

    with LocalHub() as hub:
        subprocess.run([sys.executable, "-m", "seam", ...], env=hub.environment(tmp_path), check=True)
        assert "model.safetensors" in hub.repos["user/name"].files

The client reads its endpoint when it is imported, so it has to run in a process of its own. Repositories of models
only, without pull requests and tags; large files travel by LFS, not by Xet. Anything else is answered with status 501.
"""

import base64
import hashlib
import json
import os
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

USER = "user"
TOKEN = "hf_test"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
LFS_SIZE = 10 * 2**20


class Refusal(Exception):
    """An answer other than 200. The client chooses its exception by the status and the code."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "", **content):
        super().__init__(message)
        self.status, self.content = status, {"error": message, **content}
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in headers.items() if value}


@dataclass
class Commit:
    """A snapshot: all files of the repository, by path."""

    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)  # of all branches, oldest first
    branches: dict[str, Commit] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        """What the head of the main branch holds."""
        return self.branches["main"].files

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        self.branches[branch] = Commit(secrets.token_hex(20), title, files)
        self.commits.append(self.branches[branch])
        return self.branches[branch]

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch or of a full hash."""
        known = {commit.sha: commit for commit in self.commits} | self.branches
        if revision not in known:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return known[revision]


class LocalHub:
    """Serves as long as its `with` block runs. Tests may read and set all attributes."""

    def __init__(self):
        self.repos: dict[str, Repository] = {}  # by "user/name"
        self.objects: dict[str, bytes | None] = {}  # large files by SHA-256; None: announced, not yet uploaded
        self.requests: list[str] = []  # "METHOD /path" of every request
        self.fail_uploads = False  # True: large files and commits are refused
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables for a process that talks to this hub only, past any proxy, and keeps its downloads in `cache`."""
        foreign = [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_")) or "proxy" in name.lower()]
        return {name: value for name, value in os.environ.items() if name not in foreign} | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def answer(self, method: str, target: str, authorization: str | None, body: bytes) -> tuple[object, dict[str, str]]:
        """Content, which is bytes or becomes JSON, and headers."""
        self.requests.append(f"{method} {target}")
        if authorization not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        user = USER if authorization else None
        address = urlsplit(target)
        # A slash inside a revision or a path is escaped: split first, unquote then.
        match [method, *map(unquote, address.path.strip("/").split("/"))]:
            case ["GET", "api", "whoami-v2"]:
                _check_owner(user, USER)
                return {"type": "user", "name": USER, "orgs": []}, {}
            case ["POST", "api", "validate-yaml"]:
                return {"errors": [], "warnings": []}, {}
            case ["POST", "api", "repos", "create"]:
                return self._create(user, **json.loads(body)), {}
            case ["GET", "api", "models", owner, name, *rest] if rest[:1] in ([], ["revision"]):
                repository = self._find(user, owner, name)
                commit = repository.at(rest[1] if rest else "main")
                info = {"id": f"{owner}/{name}", "author": owner, "private": repository.private, "tags": []}
                return {**info, "sha": commit.sha, "siblings": [{"rfilename": path} for path in commit.files]}, {}
            case ["GET", "api", "models", owner, name, "tree", revision, *folder]:
                return _tree(self._find(user, owner, name).at(revision), "/".join(folder)), {}
            case ["POST", "api", "models", owner, name, "branch", branch]:
                repository = self._find(user, owner, name, write=True)
                if branch in repository.branches:
                    raise Refusal(409, f"Reference already exists: {branch}")
                repository.branches[branch] = repository.at(json.loads(body).get("startingPoint", "main"))
                return {}, {}
            case ["POST", "api", "models", owner, name, "preupload", revision]:
                present = self._find(user, owner, name, write=True).at(revision).files
                asked = json.loads(body)["files"]
                return {"files": [_upload_mode(one["path"], one["size"], present) for one in asked]}, {}
            case ["POST", owner, name, "info", "lfs", "objects", "batch"]:
                self._find(user, owner, name.removesuffix(".git"), write=True)
                return {"objects": [self._announce(**one) for one in json.loads(body)["objects"]]}, {}
            case ["PUT", "lfs", oid]:
                self._receive(oid, body)
                return {}, {}
            case ["POST", "api", "models", owner, name, "commit", branch] if not address.query:
                repository = self._find(user, owner, name, write=True)
                sha = self._commit(repository, branch, [json.loads(line) for line in body.splitlines()]).sha
                return {"commitUrl": f"{self.endpoint}/{owner}/{name}/commit/{sha}", "commitOid": sha}, {}
            case ["GET" | "HEAD", owner, name, "resolve", revision, *path]:
                return _resolve(self._find(user, owner, name).at(revision), "/".join(path))
        raise Refusal(501, f"The stand-in for the Hub does not know {method} {target}")

    def _find(self, user: str | None, owner: str, name: str, write: bool = False) -> Repository:
        """Private repositories look missing to those who may not see them, as on the Hub."""
        repository = self.repos.get(f"{owner}/{name}")
        if repository is None or (repository.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            _check_owner(user, owner)
        return repository

    def _create(self, user, name, organization=None, visibility="public", type="model") -> dict:
        owner = organization or USER
        _check_owner(user, owner)
        if type != "model":
            raise Refusal(501, "The stand-in for the Hub holds models only")
        url = f"{self.endpoint}/{owner}/{name}"
        if f"{owner}/{name}" in self.repos:
            raise Refusal(409, "You already created this model repo", url=url)  # the client may go on with the address
        self.repos[f"{owner}/{name}"] = repository = Repository(visibility == "private")
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repository.commit("main", "initial commit", {".gitattributes": attributes.encode()})
        return {"url": url}

    def _announce(self, oid: str, size: int) -> dict:
        """Where to upload a large file; no address if it is here already."""
        upload = {"actions": {"upload": {"href": f"{self.endpoint}/lfs/{oid}"}}}
        return {"oid": oid, "size": size} | (upload if self.objects.setdefault(oid, None) is None else {})

    def _receive(self, oid: str, content: bytes):
        self._check_uploads()
        if oid not in self.objects:
            raise Refusal(403, "Never announced")  # the Hub's addresses are signed; they need no token either
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content does not match its SHA-256")
        self.objects[oid] = content

    def _check_uploads(self):
        if self.fail_uploads:
            raise Refusal(507, "Uploads fail, as the test wants")  # the client would repeat a 500 for 23 seconds

    def _commit(self, repository: Repository, branch: str, lines: list[dict]) -> Commit:
        """All or nothing: the branch moves after the last line is understood."""
        self._check_uploads()
        head = repository.at(branch)
        files, title = dict(head.files), ""
        for line in lines:
            match line["key"], line["value"]:
                case "header", {"summary": title, **rest}:
                    if not head.sha.startswith(rest.get("parentCommit", "")):
                        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
                case "file", {"path": path, "content": content}:
                    files[path] = base64.b64decode(content)
                case "lfsFile", {"path": path, "oid": oid}:
                    if self.objects.get(oid) is None:
                        raise Refusal(400, f"The large file {path} was not uploaded")
                    files[path] = self.objects[oid]
                case "deletedFile", {"path": path}:
                    if files.pop(path, None) is None:
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                case key, _:
                    raise Refusal(501, f"The stand-in for the Hub does not know '{key}' in a commit")
        return repository.commit(branch, title, files)


def _check_owner(user: str | None, owner: str):
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    if user != owner:
        raise Refusal(403, f"You have no right to write under the name {owner}")


def _is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


def _oid(path: str, content: bytes) -> str:
    """Return what the client compares its file with: SHA-256 of a large file, git's hash of any other."""
    if _is_large(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _upload_mode(path: str, size: int, files: dict[str, bytes]) -> dict:
    """LFS or not, and the hash of the file that is there: the client leaves out what has not changed."""
    oid = _oid(path, files[path]) if path in files else None
    return {
        "path": path,
        "uploadMode": "lfs" if _is_large(path, size) else "regular",
        "shouldIgnore": False,
        "oid": oid,
    }


def _tree(commit: Commit, folder: str) -> list[dict]:
    """All files below a folder, always with those of its folders and never with the folders themselves."""
    entries = []
    for path, content in commit.files.items():
        if not folder or path.startswith(f"{folder}/"):
            entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
            lfs = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
            entries.append({**entry, "lfs": lfs} if _is_large(path, len(content)) else entry)
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound", commit.sha)
    return entries


def _resolve(commit: Commit, path: str) -> tuple[bytes, dict[str, str]]:
    if path not in commit.files:
        raise Refusal(404, "Entry not found", "EntryNotFound", commit.sha)  # the client notes what a commit lacks
    content = commit.files[path]
    etag = f'"{_oid(path, content)}"'
    linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))} if _is_large(path, len(content)) else {}
    return content, {"ETag": etag, "X-Repo-Commit": commit.sha, **linked}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the client keeps its connections
    wbufsize = -1  # headers and content leave together

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))  # to the end: the next request follows it
        status = 200
        try:
            content, headers = self.server.hub.answer(self.command, self.path, self.headers["Authorization"], body)
        except Refusal as refusal:
            status, content, headers = refusal.status, refusal.content, refusal.headers
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, *_):
        """Silence: `LocalHub.requests` keeps them."""
