"""The HTTP server of a local Hub, and `LocalHub`, by which programs and tests start, fill and examine it."""

import logging
import re
import secrets
import socket
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from socketserver import TCPServer
from types import TracebackType
from typing import Any

from ...common.errors import HubError
from . import reading, writing
from .protocol import Hub, Reply, Slice, User, answer
from .store import CHUNK, Commit, CommitMessage, Files, Store, read_chunks

HOST = "127.0.0.1"
USER = "hfq-user"

_log = logging.getLogger(__name__)


@dataclass
class _Fault:
    """What happens to the next `times` requests for a path: another reply, or a cut in the real one."""

    method: str
    path: re.Pattern[str]
    times: int
    reply: Reply | None
    cut_after: int | None


class LocalHub:
    """A Hub on loopback, with one user to begin with. It serves from `start` to `stop`, or in a `with` block.

    The clients read `HF_ENDPOINT` once, when they are imported: start the hub before that, or start another
    process with `environment()`.

    Args:
        root: folder in which repositories are kept; None to forget them at the end.
        port: 0 for any that is free.
        advertise_xet: give out tokens for a xet storage that is not there, to see clients ask for them.

    Raises:
        HubError: the folder or the port is in use.
    """

    def __init__(self, root: Path | None = None, *, port: int = 0, advertise_xet: bool = False) -> None:
        self._cleanup = ExitStack()
        if root is None:
            temporary = tempfile.TemporaryDirectory(prefix="hfq-hub-", ignore_cleanup_errors=True)
            root = Path(self._cleanup.enter_context(temporary))
        self._store = Store(root)
        self._cleanup.callback(self._store.close)
        try:
            self._server = _Server(self, port)
        except OSError as error:
            self._cleanup.close()
            raise HubError(f"Port {port} of {HOST} cannot be had: {error}. Choose another.") from error
        self.url = f"http://{HOST}:{self._server.server_address[1]}"
        self.token = f"hf_{secrets.token_hex(17)}"
        self._users = {self.token: User(USER)}
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="local-hub", daemon=True
        )
        self._hub = Hub(self._store, self.url, self._users, advertise_xet)
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self._requests: list[tuple[str, str, int]] = []

    def start(self) -> None:
        """Serve from a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """Answer nobody any more, and let go of port and folder."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()
        self._cleanup.close()

    def __enter__(self) -> "LocalHub":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def environment(self) -> dict[str, str]:
        """The variables that make a process take this for the Hub, and go there by no proxy."""
        found = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1"}
        return {**found, **self.direct()}

    def direct(self) -> dict[str, str]:
        """The variables by which clients go to it, and wherever else, by no proxy."""
        names = [f"{scheme}_proxy" for scheme in ("http", "https", "all")]
        return dict.fromkeys([*names, *map(str.upper, names)], "")

    def add_user(self, name: str, *, token: str | None = None, orgs: Iterable[str] = ()) -> str:
        """Another account, and the token that it logs in with."""
        token = token or f"hf_{secrets.token_hex(17)}"
        self._users[token] = User(name, tuple(orgs))
        return token

    def create_repo(
        self, repo_id: str, repo_type: str = "model", *, private: bool = False, gated: bool = False
    ) -> None:
        """A new repository, in any namespace. The files of a gated one are only for its owner."""
        author = repo_id.partition("/")[0]
        self._store.create(repo_type, repo_id, author=author, private=private, gated=gated)

    def commit_folder(
        self, repo_id: str, folder: Path, *, repo_type: str = "model", message: str = "Upload folder"
    ) -> str:
        """Add the files of a folder to a repository, new if need be, in one commit; return its hash."""
        if self._store.find(repo_type, repo_id) is None:
            self.create_repo(repo_id, repo_type)

        def add(files: Files) -> None:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                name = path.relative_to(folder).as_posix()
                if self._store.is_lfs(files, name, path.stat().st_size):
                    sha256, _ = self._store.add_blob(read_chunks(path))
                    files[name] = self._store.lfs_file(sha256)
                else:
                    files[name] = self._store.add_file(path.read_bytes())

        repo = self._store.get(repo_type, repo_id)
        commit, _ = self._store.commit(repo, add, CommitMessage(repo.namespace, message))
        return commit.sha

    def commits(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> list[Commit]:
        """The history of a revision, newest first."""
        repo = self._store.get(repo_type, repo_id)
        return list(repo.history(repo.at(revision)))

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """What a revision holds, by path; `.gitattributes`, which the Hub puts there, included."""
        commit = self._store.get(repo_type, repo_id).at(revision)
        return {path: self._store.read(file) for path, file in commit.files.items()}

    def fail(  # noqa: PLR0913 - what a test may say of a fault, each by its name
        self,
        method: str,
        path_regex: str,
        status: int = 500,
        *,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        cut_after: int | None = None,
    ) -> None:
        """Let the next `times` requests go wrong whose path and query contain a match of `path_regex`.

        They are answered `status` and not carried out. With `cut_after` they are carried out, and the
        connection is closed after that many bytes of the real answer's body.
        """
        text = body if body is not None else b'{"error": "Injected fault"}'
        reply = Reply(status, text, dict(headers or {})) if cut_after is None else None
        with self._lock:
            self._faults.append(_Fault(method, re.compile(path_regex), times, reply, cut_after))

    @property
    def requests(self) -> list[tuple[str, str, int]]:
        """Method, path with query, and status of each request since `reset`, in the order of answers."""
        with self._lock:
            return list(self._requests)

    def reset(self) -> None:
        """Forget faults that have not happened and requests that have. Repositories and users stay."""
        with self._lock:
            self._faults.clear()
            self._requests.clear()

    def _answer(self, method: str, target: str, headers: Message, body: Iterator[bytes]) -> tuple[Reply, int | None]:
        """The reply to a request, and after how many bytes to cut it off."""
        fault = self._next_fault(method, target)
        if fault and fault.reply:
            reply = fault.reply
        else:
            try:
                reply = answer(self._hub, [reading.routes, writing.routes], method, target, headers, body)
            except ConnectionError:
                raise
            except Exception:
                _log.exception("%s %s failed", method, target)
                reply = Reply.json({"error": "The local Hub failed; its log says why"}, 500)
        with self._lock:
            self._requests.append((method, target, reply.status))
        return reply, fault.cut_after if fault else None

    def _next_fault(self, method: str, target: str) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.method == method and fault.path.search(target):
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: LocalHub, port: int) -> None:
        self.hub = hub
        self._connections: set[Any] = set()
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for the name of this machine, which can take seconds.
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Close the idle connections of clients too, or their threads would go on serving."""
        super().server_close()
        for connection in tuple(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body would wait for the client to acknowledge its header
    server: _Server

    def _serve(self) -> None:
        if "Transfer-Encoding" in self.headers:
            self.send_error(411)  # the clients always tell the length
            return
        body = _read_body(self.rfile, self.headers)
        reply, cut_after = self.server.hub._answer(self.command, self.path, self.headers, body)
        deque(body, maxlen=0)  # what nobody read would be taken for the next request
        size = reply.body.length if isinstance(reply.body, Slice) else len(reply.body)
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(size)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(reply.body, size if cut_after is None else min(cut_after, size))
        if cut_after is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815, the base class's names

    def _send_body(self, body: bytes | Slice, size: int) -> None:
        if isinstance(body, bytes):
            self.wfile.write(body[:size])
            return
        with body.path.open("rb") as file:
            file.seek(body.start)
            while chunk := file.read(min(size, CHUNK)):
                self.wfile.write(chunk)
                size -= len(chunk)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


def _read_body(stream: BufferedIOBase, headers: Message) -> Iterator[bytes]:
    """A request's body as it arrives."""
    left = int(headers.get("Content-Length", 0))
    while left > 0:
        chunk = stream.read(min(left, CHUNK))
        if not chunk:
            raise ConnectionAbortedError("the client went away while it sent")
        left -= len(chunk)
        yield chunk
