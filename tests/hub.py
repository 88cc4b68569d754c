"""A Hugging Face Hub on this machine: the paths that huggingface_hub asks for, with repositories in memory."""

import base64
import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download, hf_api, utils

TOKEN = "hf_local"
LARGE = (".safetensors", ".bin", ".ckpt", ".pth")  # kept beside git, as .gitattributes of the Hub has it


@dataclass
class Repository:
    """Files by commit, the newest last; ``refs`` name commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_private: bool = False
    is_gated: bool = False


class Hub:
    """Serves ``repositories``; ``requests`` are those that came in, each method and path."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}  # by sha256
        self.requests: list[tuple[str, str]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.storage = f"http://localhost:{self._http.server_port}/storage"  # on another host, as the Hub's is
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: object) -> None:
        """Let huggingface_hub, which is imported, ask this Hub, with an empty cache and without a token."""
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        for module in (constants, file_download):  # an older one has the address there, too
            form = self.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", form, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/token")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # an older one has none
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        self.set_offline(monkeypatch, False)

    def set_offline(self, monkeypatch: pytest.MonkeyPatch, is_offline: bool = True) -> None:
        """Let huggingface_hub ask nobody, as with HF_HUB_OFFLINE=1; an older one asks by sessions that it keeps."""
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
        getattr(utils, "reset_sessions", lambda: None)()

    def put(self, repository: str, files: dict[str, bytes], ref: str = "main") -> str:
        """Make a commit of these files alone; returns its name."""
        repo = self.repositories.setdefault(repository, Repository())
        commit = hashlib.sha1(f"{repository} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs[ref] = commit
        return commit

    def files(self, repository: str) -> dict[str, bytes]:
        """The newest files."""
        repo = self.repositories[repository]
        return repo.commits[repo.refs["main"]]

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        self.requests.append((request.command, path))
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        is_known = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        status, headers, content = self._respond(request.command, path, body, is_known)
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def _respond(self, method: str, path: str, body: bytes, is_known: bool) -> tuple[int, dict[str, str], bytes]:
        if found := re.fullmatch(r"/storage/(\w+)", path):
            if method == "PUT":
                assert hashlib.sha256(body).hexdigest() == found[1]
                self.stored[found[1]] = body
            return 200, {}, b"" if method == "PUT" else self.stored[found[1]]
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], unquote(found[2]), unquote(found[3]), is_known)
        if not is_known:
            return 401, {"X-Error-Message": "Invalid username or password."}, b"{}"
        asked = json.loads(body) if body.startswith(b"{") and b"\n" not in body.strip() else {}
        if path == "/api/validate-yaml":
            return 200, {}, b'{"errors": [], "warnings": []}'
        if path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, {}, json.dumps({"url": f"{self.url}/{name}"}).encode()
            self.put(name, {})
            self.repositories[name].is_private = asked.get("private") or asked.get("visibility") == "private"
            return 200, {}, json.dumps({"url": f"{self.url}/{name}", "name": name}).encode()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False, "oid": None} for file in asked["files"]
            ]  # fmt: skip
            return 200, {}, json.dumps({"files": modes}).encode()
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.storage}/{each['oid']}"}}} for each in asked["objects"]
            ]
            return 200, {}, json.dumps({"transfer": "basic", "objects": objects}).encode()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            files = dict(self.files(found[1]))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    files[value["path"]] = self.stored[value["oid"]]
            commit = self.put(found[1], files)
            said = {"commitUrl": f"{self.url}/{found[1]}/commit/{commit}", "commitOid": commit}
            return 200, {}, json.dumps(said).encode()
        return 404, {}, b"{}"

    def _resolve(self, repository: str, revision: str, file: str, is_known: bool) -> tuple[int, dict[str, str], bytes]:
        repo = self.repositories.get(repository)
        if repo is None or (repo.is_private and not is_known):
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        if repo.is_gated and not is_known:
            return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b""
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        headers = {"X-Repo-Commit": commit}
        if file not in repo.commits[commit]:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        content = repo.commits[commit][file]
        if not file.endswith(LARGE):
            return 200, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content
        digest = hashlib.sha256(content).hexdigest()
        self.stored.setdefault(digest, content)
        linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return 302, {**headers, **linked, "Location": f"{self.storage}/{digest}", "Content-Length": "0"}, b""
