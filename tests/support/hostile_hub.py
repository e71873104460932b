"""A Hub that says what no honest one does: names that lead out of a folder, and requests said back with their token."""

import json
import threading
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "a" * 40


class HostileHub:
    """One repository with `files`, of a model and of a dataset.

    Args:
        listed: further names in its lists of files. `hidden`: those that it adds once it was asked for a list, so that
            only the client which downloads sees them.
        sha: what it calls its commit.
        answer: said to every request in place of a repository: status and JSON; an error says the token back.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        *,
        listed: Iterable[str] = (),
        hidden: Iterable[str] = (),
        sha: str = SHA,
        answer: tuple[int, Any] | None = None,
    ) -> None:
        self.files, self.listed, self.hidden, self.sha, self.answer = dict(files), [*listed], [*hidden], sha, answer
        self.paths: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HostileHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HostileHub

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.paths.append(path)
        if hub.answer is not None:
            status, content = hub.answer
            said = f"bad token {self.headers.get('Authorization')}" if status >= 400 else ""
            self._send(status, json.dumps(content).encode(), {"X-Error-Message": said} if said else {})
        elif path.startswith(("/api/models/mallory/model/tree/", "/api/datasets/mallory/model/tree/")):
            asked_before = any("/tree/" in before for before in hub.paths[:-1])
            names = [*hub.files, *hub.listed, *(hub.hidden if asked_before else [])]
            rows = [{"type": "file", "path": name, "oid": "b" * 40, "size": self._size(name)} for name in names]
            self._send(200, json.dumps(rows).encode())
        elif path.startswith(("/api/models/mallory/model", "/api/datasets/mallory/model")):
            self._send(200, json.dumps({"id": "mallory/model", "sha": hub.sha}).encode())
        else:
            name = path.partition(f"/resolve/{hub.sha}/")[2]
            etag = {"ETag": f'"{name}"', "X-Repo-Commit": hub.sha}
            self._send(200, hub.files.get(name, b"owned"), etag)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _size(self, name: str) -> int:
        return len(self.hub.files.get(name, b"owned"))

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
