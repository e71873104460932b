"""A reverse proxy on loopback that stands between a client and any Hub, and lets one request go wrong.

It knows HTTP and the addresses of the Hub's API, and nothing of what is behind it. It can also make that Hub look like
another one: see `QUIRKS`.
"""

import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

STATUSES = ("401", "403", "404", "409", "412", "429", "500", "502", "503", "504")
SPOILED_REQUESTS = ("cut before", "cut in upload", "delay", "late 504", "lost")
SPOILED_ANSWERS = ("cut in body", "truncated", "flipped")
KINDS = (*STATUSES, *SPOILED_REQUESTS, *SPOILED_ANSWERS)
_FILE = re.compile(r"/resolve/|/elsewhere/")
_HOP = ("connection", "content-length", "transfer-encoding", "date", "server")


@dataclass(frozen=True)
class Message:
    """A request or an answer, whole."""

    headers: Mapping[str, str]
    body: bytes
    status: int = 0


@dataclass
class CutError(Exception):
    """The connection ends, after `answer` if there is one, though more was announced."""

    answer: Message | None = None
    announced: int = 0


@dataclass(frozen=True)
class Fault:
    """What happens to a request: a kind that `choose` takes from those it can suffer.

    It is the request with the number `at` (from 0), or the first `times` with `where` in "METHOD path".
    """

    choose: Callable[[list[str]], str]
    at: int | None = None
    where: str | None = None
    times: int = 1


@dataclass
class FaultyProxy:
    """Serves in a `with` block. `requests`: method, path, and the status or "!" and the fault, since `begin`."""

    upstream: str
    quirks: Collection[str] = ()
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    fault: Fault | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.proxy = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def begin(self, fault: Fault | None = None) -> None:
        """Forget what was, and let `fault` happen next."""
        with self._lock:
            self.requests, self.fault = [], fault

    def answer(
        self, method: str, path: str, headers: Mapping[str, str], length: int, read: Callable[[int], bytes]
    ) -> Message:
        """The answer to a request, spoiled if its turn has come; `CutError` if the connection is to end."""
        with self._lock:
            number, kind = len(self.requests), ""
            if self.fault and self._is_next(self.fault, number, f"{method} {path}"):
                kind = self.fault.choose(_possible(method, path, length))
            self.requests.append((method, path, f"!{kind}"))
        if kind == "cut in upload":
            read(length // 2)
            raise CutError
        request = Message(headers, read(length))
        if kind in STATUSES:
            wait = {"Retry-After": "1"} if kind in ("429", "503") else {}
            return Message({"Content-Type": "text/plain", **wait}, b"Injected", int(kind))
        if kind == "cut before":
            raise CutError
        if kind == "delay":
            time.sleep(1.5)
        answer = self._forward(method, path, request)
        for quirk in self.quirks:
            answer = QUIRKS[quirk](method, path, answer)
        if not kind:
            self.requests[number] = (method, path, str(answer.status))
        return _spoiled(kind, answer)

    def _is_next(self, fault: Fault, number: int, request: str) -> bool:
        if fault.where is None:
            return number == fault.at
        happened = sum(how.startswith("!") and len(how) > 1 for _, _, how in self.requests)
        return fault.where in request and happened < fault.times

    def _forward(self, method: str, path: str, request: Message) -> Message:
        address = urlsplit(self.upstream)
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
        try:
            headers = {name: value for name, value in request.headers.items() if name.lower() not in (*_HOP, "host")}
            headers["Accept-Encoding"] = "identity"
            connection.request(method, path.replace("/elsewhere/", "/resolve/"), request.body or None, headers)
            answer = connection.getresponse()
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
            if method == "HEAD":
                kept["Content-Length"] = answer.headers.get("Content-Length", "0")
            body = answer.read()
        finally:
            connection.close()
        if not _FILE.search(path):  # an address that the client is to go to must lead here
            body = body.replace(self.upstream.encode(), self.url.encode())
        return Message(kept, body, answer.status)


def _possible(method: str, path: str, length: int) -> list[str]:
    """What can happen to a request. Only files have checksums, so that a changed bit in others would be the truth."""
    kinds = [*STATUSES, "cut before", "delay", "late 504", "lost"]
    if length:
        kinds.append("cut in upload")
    if method != "HEAD":
        kinds += ["cut in body", "truncated"]
    if method == "GET" and _FILE.search(path):
        kinds.append("flipped")
    return kinds


def _spoiled(kind: str, answer: Message) -> Message:
    body = answer.body
    if kind == "lost":
        raise CutError
    if kind == "late 504":
        return Message({}, b"Injected", 504)
    if kind == "cut in body" and body:
        raise CutError(replace(answer, body=body[: len(body) // 2]), announced=len(body))
    if kind == "truncated":
        return replace(answer, body=body[: len(body) // 2])
    if kind == "flipped" and body:
        place = len(body) * 2 // 3
        return replace(answer, body=body[:place] + bytes([body[place] ^ 4]) + body[place + 1 :])
    return answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        proxy: FaultyProxy = self.server.proxy  # type: ignore[attr-defined]
        length = int(self.headers.get("Content-Length", 0))
        try:
            answer = proxy.answer(self.command, self.path, dict(self.headers), length, self.rfile.read)
        except CutError as cut:
            if cut.answer:
                self._send(cut.answer, announced=cut.announced)
            self.close_connection = True
            return
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815, the base class's names

    def _send(self, answer: Message, *, announced: int | None = None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        chunked = answer.headers.get("Transfer-Encoding") == "chunked"
        if "Content-Length" not in answer.headers and not chunked:
            self.send_header("Content-Length", str(len(answer.body) if announced is None else announced))
        self.end_headers()
        if self.command == "HEAD":
            return
        if chunked:
            for start in range(0, len(answer.body), 1 << 16):
                chunk = answer.body[start : start + (1 << 16)]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


# Ways in which a Hub may differ from the one behind


def _chunked(method: str, path: str, answer: Message) -> Message:
    if method == "HEAD" or answer.status >= 300:
        return answer
    return replace(answer, headers={**answer.headers, "Transfer-Encoding": "chunked"})


def _redirects(method: str, path: str, answer: Message) -> Message:
    """Files are elsewhere, as LFS files are on the real Hub: /resolve/ says where, and what they are."""
    if "/resolve/" not in path or answer.status >= 300:
        return answer
    size = answer.headers.get("Content-Length") or str(len(answer.body))
    linked = {"X-Linked-Etag": answer.headers["ETag"], "X-Linked-Size": size, "Content-Length": "0"}
    location = {"Location": path.replace("/resolve/", "/elsewhere/")}
    return Message({"X-Repo-Commit": answer.headers["X-Repo-Commit"], **linked, **location}, b"", 302)


def _no_codes(method: str, path: str, answer: Message) -> Message:
    """What went wrong is in the status, and nowhere else."""
    return Message({}, b"", answer.status) if answer.status >= 400 else answer


def _without_page(part: str) -> Callable[[str, str, Message], Message]:
    def quirk(method: str, path: str, answer: Message) -> Message:
        return Message({}, b"<html>no such page</html>", 404) if part in path else answer

    return quirk


def _edited(part: str, edit: Callable[[Any], object]) -> Callable[[str, str, Message], Message]:
    """Answers from addresses with `part` in them are changed."""

    def quirk(method: str, path: str, answer: Message) -> Message:
        if part not in path or _FILE.search(path) or answer.status >= 300 or not answer.body:
            return answer
        value = json.loads(answer.body)
        edit(value)
        return replace(answer, body=json.dumps(value).encode())

    return quirk


def _forget_lfs(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        entry.pop("lfs", None)


def _name_files_otherwise(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        entry["oid"] = "0" * 40


def _forget_verify(batch: dict[str, Any]) -> None:
    for wanted in batch["objects"]:
        wanted.get("actions", {}).pop("verify", None)


def _forget_most(info: dict[str, Any]) -> None:
    for name in set(info) - {"id", "sha", "private", "siblings"}:
        del info[name]


def _forget_files(info: dict[str, Any]) -> None:
    info.pop("siblings", None)


def _only_the_name(user: dict[str, Any]) -> None:
    for name in set(user) - {"name"}:
        del user[name]


QUIRKS: dict[str, Callable[[str, str, Message], Message]] = {
    "chunked answers": _chunked,
    "files elsewhere": _redirects,
    "errors without a code": _no_codes,
    "no card check": _without_page("/api/validate-yaml"),
    "no discussions": _without_page("/discussions"),
    "no list of refs": _without_page("/refs"),
    "no LFS in lists": _edited("/tree/", _forget_lfs),
    "file names that are not git's": _edited("/tree/", _name_files_otherwise),
    "no verify": _edited("/info/lfs/objects/batch", _forget_verify),
    "few fields": _edited(
        "/api/models/", lambda info: isinstance(info, dict) and "siblings" in info and _forget_most(info)
    ),
    "no siblings": _edited("/api/models/", lambda info: isinstance(info, dict) and _forget_files(info)),
    "a user's name only": _edited("/whoami", _only_the_name),
}
