"""Both hubs on 127.0.0.1: what their clients ask for to fetch and to upload, with faults on demand."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
STALL, SLOW = 30.0, 1.5
"""Seconds that an answer stalls and is late, or until the server stops."""


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next answers: `cut` in the middle, `stall` there, `slow`, `wrong` bytes, or a status."""

    where: str
    what: str | int
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Request:
    """A request that came."""

    method: str
    path: str
    headers: Mapping[str, str]


class Hubs:
    """Repositories, as both hubs serve them.

    Attributes:
        repos: files by path, by revision, by `owner/repo`; the main branch, `main`, is `master` to one hub.
        tokens: the token that a private repository asks for, and that every upload does, under "".
        made: what repositories were made with.
        lists_anything: answers with an empty list for a revision that is not there.
        requests: all that came.
        faults: those to come.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        self.tokens: dict[str, str] = {}
        self.made: dict[str, dict[str, Any]] = {}
        self.lists_anything = False
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.blobs: dict[str, bytes] = {}
        self.closing = threading.Event()
        self.url = ""
        self.lock = threading.Lock()

    def add(self, repo: str, files: Mapping[str, bytes] | Path, revision: str = "main") -> None:
        """Put files, or those of a folder, into a repository."""
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        self.repos.setdefault(repo, {})[revision] = dict(files)

    def fetched(self, path: str) -> list[Request]:
        """Return the requests for the content of a file."""
        wanted = re.compile(rf"FilePath={re.escape(path)}|/resolve/[^/]+/{re.escape(path)}$")
        return [each for each in self.requests if each.method == "GET" and wanted.search(unquote(each.path))]

    def fault(self, path: str) -> Fault | None:
        """Return what is to go wrong with an answer, and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.where in unquote(path):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def hubs() -> Iterator[Hubs]:
    """Start a server."""
    state = Hubs()
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *arguments: _Handler(state, *arguments))  # type: ignore[arg-type]
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hubs: Hubs, *arguments: Any) -> None:
        self.hubs = hubs
        self.routes: list[tuple[str, str, Callable[..., None]]] = [
            ("GET", r"/api/v1/models/(\w+/[\w.-]+)/repo/files", self.list_modelscope),
            ("GET", r"/api/v1/models/(\w+/[\w.-]+)/repo", self.file_modelscope),
            ("GET", r"/(?:api|openapi)/v1/models/(\w+/[\w.-]+)", self.info_modelscope),
            ("POST", r"/api/v1/models", self.create_modelscope),
            ("POST", r"/api/v1/repos/models/(\w+/[\w.-]+)/info/lfs/objects/batch", self.batch),
            ("POST", r"/api/v1/repos/models/(\w+/[\w.-]+)/commit/(\w+)", self.commit_modelscope),
            ("GET", r"/api/models/(\w+/[\w.-]+)(?:/revision/([^/]+))?", self.info_huggingface),
            ("GET", r"/api/models/(\w+/[\w.-]+)/tree/([^/]+)", self.tree_huggingface),
            ("HEAD", r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", self.file_huggingface),
            ("GET", r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", self.file_huggingface),
            ("POST", r"/api/validate-yaml", lambda: self.answer({"errors": [], "warnings": []})),
            ("POST", r"/api/repos/create", self.create_huggingface),
            ("POST", r"/api/models/(\w+/[\w.-]+)/preupload/(\w+)", self.preupload_huggingface),
            ("POST", r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", self.batch),
            ("POST", r"/api/models/(\w+/[\w.-]+)/commit/(\w+)", self.commit_huggingface),
            ("PUT", r"/blobs/(\w+)", self.put_blob),
        ]
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        pass

    def serve(self) -> None:
        self.hubs.requests.append(Request(self.command, self.path, dict(self.headers)))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = None if self.command == "HEAD" else self.hubs.fault(self.path)
        self.broken = fault.what if fault else ""
        split = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(split.query).items()}
        try:
            if isinstance(self.broken, int):
                raise _RefusedError(self.broken)
            for method, pattern, route in self.routes:
                match = re.fullmatch(pattern, unquote(split.path))
                if match and method == self.command:
                    route(*match.groups())
                    return
            raise _RefusedError(404)
        except _RefusedError as refusal:
            # an unkind server: it sends back what it was sent
            told = f"refused, you said {self.headers.get('Authorization')} {self.headers.get('Cookie')}"
            self.answer({"Code": 1, "Message": told, "error": told}, refusal.status, {"X-Error-Code": refusal.code})

    do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815

    def answer(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.broken == "slow":
            self.hubs.closing.wait(SLOW)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.broken == "wrong":
            data = bytes(255 - byte for byte in data)
        if self.broken in ("cut", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if self.broken == "stall":
                self.hubs.closing.wait(STALL)
            self.close_connection = True
            return
        self.wfile.write(data)

    def send_file(self, data: bytes, headers: Mapping[str, str]) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            self.answer(data, headers=headers)
            return
        first = int(start[1])
        found = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        self.answer(data[first:], 206, {**headers, **found})

    def authorize(self, repo: str) -> None:
        wanted = self.hubs.tokens.get(repo)
        given = f"{self.headers.get('Authorization')} {self.headers.get('Cookie')}"
        if wanted is not None and wanted not in given:
            raise _RefusedError(403)

    def revisions(self, repo: str) -> dict[str, Files]:
        self.authorize(repo)
        if repo not in self.hubs.repos:
            raise _RefusedError(404, "RepoNotFound")
        return self.hubs.repos[repo]

    def files(self, repo: str, revision: str) -> Files:
        revisions = self.revisions(repo)
        for name, files in revisions.items():
            if revision in (name, _commit(files)) or (revision == "master" and name == "main"):
                return files
        raise _RefusedError(404, "RevisionNotFound")

    # ModelScope

    def info_modelscope(self, repo: str) -> None:
        self.revisions(repo)
        self.answer({"Code": 200, "Data": {"Name": repo}, "data": {"id": repo}})

    def list_modelscope(self, repo: str) -> None:
        is_there = not self.hubs.lists_anything or self.query["Revision"] in self.revisions(repo)
        files = self.files(repo, self.query["Revision"]) if is_there else {}
        entries = [
            {"Path": path, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
            for path, data in files.items()
        ]
        self.answer({"Code": 200, "Data": {"Files": entries}})

    def file_modelscope(self, repo: str) -> None:
        files = self.files(repo, self.query["Revision"])
        if self.query["FilePath"] not in files:
            raise _RefusedError(404)
        self.send_file(files[self.query["FilePath"]], {})

    def create_modelscope(self) -> None:
        self.authorize("")
        body = json.loads(self.body)
        repo = f"{body['Path']}/{body['Name']}"
        if repo in self.hubs.repos:
            raise _RefusedError(409)
        self.hubs.repos[repo] = {"main": {}}
        self.hubs.made[repo] = body
        self.answer({"Code": 200, "Data": body})

    def commit_modelscope(self, repo: str, revision: str) -> None:
        self.authorize("")
        files = self.files(repo, revision)
        for action in json.loads(self.body)["actions"]:
            is_large = action["type"] == "lfs"
            data = self.hubs.blobs[action["sha256"]] if is_large else base64.b64decode(action["content"])
            files[action["path"]] = data
        self.answer({"Code": 200, "Success": True, "Data": {}})

    # Hugging Face

    def info_huggingface(self, repo: str, revision: str | None) -> None:
        self.answer({"id": repo, "sha": _commit(self.files(repo, revision or "main"))})

    def tree_huggingface(self, repo: str, revision: str) -> None:
        self.answer([_entry(path, data) for path, data in self.files(repo, revision).items()])

    def file_huggingface(self, repo: str, revision: str, path: str) -> None:
        files = self.files(repo, revision)
        if path not in files:
            raise _RefusedError(404, "EntryNotFound")
        entry = _entry(path, files[path])
        tag = entry.get("lfs", entry)["oid"]
        self.send_file(files[path], {"ETag": f'"{tag}"', "X-Repo-Commit": _commit(files)})

    def create_huggingface(self) -> None:
        self.authorize("")
        body = json.loads(self.body)
        repo = f"{body['organization']}/{body['name']}"
        url = f"{self.hubs.url}/{repo}"
        if repo in self.hubs.repos:
            self.answer({"url": url, "error": "exists"}, 409)
            return
        self.hubs.repos[repo] = {"main": {}}
        self.hubs.made[repo] = body
        self.answer({"url": url, "id": repo})

    def preupload_huggingface(self, repo: str, revision: str) -> None:
        names = [each["path"] for each in json.loads(self.body)["files"]]
        modes = {name: "lfs" if name.endswith((".safetensors", ".png")) else "regular" for name in names}
        self.answer(
            {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]}
        )

    def commit_huggingface(self, repo: str, revision: str) -> None:
        self.authorize("")
        files = self.files(repo, revision)
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hubs.blobs[value["oid"]]
        commit = _commit(files)
        self.answer({"success": True, "commitOid": commit, "commitUrl": f"{self.hubs.url}/{repo}/commit/{commit}"})

    # both

    def batch(self, repo: str) -> None:
        self.authorize("")
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "actions": {"upload": {"href": f"{self.hubs.url}/blobs/{each['oid']}"}},
            }
            for each in json.loads(self.body)["objects"]
        ]
        self.answer({"Code": 200, "Data": {"objects": objects}, "objects": objects, "transfer": "basic"})

    def put_blob(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400)
        self.hubs.blobs[oid] = self.body
        self.answer({})


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """Return how Hugging Face lists a file: a small one by git's checksum, a large one by its own too."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if path.endswith((".safetensors", ".png")):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
    return entry


def _commit(files: Files) -> str:
    digests = [(path, hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())]
    return hashlib.sha1(json.dumps(digests).encode()).hexdigest()


def variables(url: str, folder: Path) -> dict[str, str]:
    """Return the environment variables that turn both clients to a server, with their files in a folder."""
    return {
        "MODELSCOPE_ENDPOINT": url,
        "MODELSCOPE_CACHE": str(folder / "modelscope"),
        "MODELSCOPE_HOME": str(folder / "modelscope-home"),
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
        "MODELSCOPE_API_MAX_RETRIES": "1",
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
