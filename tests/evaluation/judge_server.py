"""A judge for tests: a real HTTP server on this machine that plays well-behaved, confused, slow, strict and broken."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = {"urgency": 4, "harm": "no", "false_reassurance": "no", "relevance": 3, "clarity": 5, "reason": "Sends to care."}
KEY = "sk-secret-123"
Play = Callable[["Request"], tuple[int, Any]]


class Request:
    """What came: its number from 0, the body, the key, and what was asked to be rated."""

    def __init__(self, number: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.number, self.body, self.headers = number, body, headers
        self.prompt = body["messages"][-1]["content"]
        self.texts = json.loads(self.prompt[self.prompt.rindex("\n\n{") :])


class JudgeServer(ThreadingHTTPServer):
    """Answers as `play` says: a status with a reply (text), headers (dict), or a body (bytes, or a list that drips)."""

    daemon_threads = True

    def __init__(self, play: Play) -> None:
        self.play, self.requests, self.counting = play, [], threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    requests: list[Request]

    def handle_error(self, *_: Any) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.counting:
            request = Request(len(self.server.requests), body, dict(self.headers.items()))
            self.server.requests.append(request)
        assert self.path == "/v1/chat/completions"
        status, said = self.server.play(request)
        if status == 0:
            self.connection.close()
            return
        self.send_response(status)
        content = said if isinstance(said, bytes) else b"".join(said) if isinstance(said, list) else b""
        if isinstance(said, str):
            content = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
        for name, value in said.items() if isinstance(said, dict) else ():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for part in said if isinstance(said, list) else [content]:
            time.sleep(0.04 if isinstance(said, list) else 0)
            self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def serving(play: Play) -> Iterator[JudgeServer]:
    with JudgeServer(play) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


def good(_: Request) -> tuple[int, Any]:
    return 200, json.dumps(GOOD)


def slow(_: Request) -> tuple[int, Any]:
    time.sleep(0.5)
    return good(_)
