"""A small Hub for tests: the HTTP API that huggingface_hub's client speaks, on this machine, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http, close_session
from huggingface_hub.utils.sha import git_hash

TOKEN = "hf_" + "Sekret" * 6
# A large file, as the Hub decides it.
LARGE = (".safetensors",)
Play = Callable[[str, str], "int | None"]


@dataclass
class Repository:
    """Commits as {path: content}, the newest last, and tags."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        before = self.commits[-1][1] if self.commits else {}
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, before | files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        wanted = {"main": self.commits[-1][0], **self.tags}.get(revision, revision)
        return next((one for one in self.commits if one[0] == wanted), None)


class HubServer(ThreadingHTTPServer):
    """Answers as the Hub does, unless `play` gives another status for a method and path; 0 cuts the connection."""

    daemon_threads = True

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.received = b""
        self.play: Play = lambda method, path: None
        self.orgs = ["clinic"]
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, *_: Any) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_HEAD = do_GET

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        self.server.received += f"{self.command} {self.path}\n".encode() + body
        status = self.server.play(self.command, path)
        if status == 0:
            self.connection.close()
            self.close_connection = True
        elif status is not None:
            self._reply(status)
        elif not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._reply(401, error="Invalid credentials in Authorization header")
        else:
            self._route(path, body)

    def _route(self, path: str, body: bytes) -> None:
        hub = self.server
        if path == "/api/whoami-v2":
            return self._reply(content={"name": "alice", "orgs": [{"name": name} for name in hub.orgs]})
        if path == "/api/repos/create":
            settings = json.loads(body)
            name = f"{settings['organization']}/{settings['name']}"
            if name in hub.repositories:
                return self._reply(409)
            hub.repositories[name] = made = Repository(settings.get("visibility") == "private")
            made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            return self._reply(content={"url": f"https://huggingface.co/{name}"})
        if path == "/api/validate-yaml":
            return self._reply(content={"errors": [], "warnings": []})
        if path.startswith("/lfs/"):
            hub.large[path[5:]] = body
            return self._reply()
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in hub.large:
                    one["actions"] = {"upload": {"href": f"{constants.ENDPOINT}/lfs/{one['oid']}"}}
            return self._reply(content={"objects": objects, "transfer": "basic"})
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(\w+)(?:/([^/]+)(?:/(.+))?)?)?", path)
        repository = hub.repositories.get(found[1]) if found else None
        if found is None or repository is None:
            return self._reply(404, code="RepoNotFound")
        verb, revision, rest = found[2] or "info", found[3] or "main", found[4]
        at = repository.at(revision)
        if at is None:
            return self._reply(404, code="RevisionNotFound")
        if verb == "preupload":
            files = json.loads(body)["files"]
            for one in files:
                one |= {"uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            return self._reply(content={"files": [{k: v for k, v in one.items() if k != "sample"} for one in files]})
        if verb == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            if lines[0]["value"].get("parentCommit") not in (None, repository.commits[-1][0]):
                return self._reply(412)
            files = {}
            for line in lines[1:]:
                value = line["value"]
                small = line["key"] == "file"
                files[value["path"]] = base64.b64decode(value["content"]) if small else hub.large[value["oid"]]
            oid = repository.commit(files)
            return self._reply(content={"commitUrl": f"{constants.ENDPOINT}/{found[1]}/commit/{oid}", "commitOid": oid})
        if verb == "tag":
            tag = json.loads(body)["tag"]
            if tag in repository.tags:
                return self._reply(409)
            repository.tags[tag] = at[0]
            return self._reply(content={})
        if verb == "resolve":
            content = at[1].get(rest or "")
            if content is None:
                return self._reply(404, code="EntryNotFound")
            headers = {"X-Repo-Commit": at[0], "ETag": f'"{_about(rest, content)["oid"]}"'}
            return self._reply(content=content, headers=headers)
        files = [_about(name, content) for name, content in at[1].items()]
        if verb == "tree":
            return self._reply(content=files)
        siblings = [{"rfilename": one["path"], "blobId": one["oid"], **one} for one in files]
        return self._reply(content={"id": found[1], "sha": at[0], "private": repository.private, "siblings": siblings})

    def _reply(
        self, status: int = 200, content: Any = None, code: str = "", error: str = "", headers: Any = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "X-Error-Message": error, **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def _about(name: str, content: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    about = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
    lfs = {"lfs": {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 100}}
    return about | (lfs if name.endswith(LARGE) else {})


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that the client takes for the Hub, with a token that it knows."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name, value in {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its tries
        close_session()
        try:
            yield server
        finally:
            close_session()
            server.shutdown()
