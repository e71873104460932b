"""What an endpoint of the Hub's API is here: a function of the hub and a request, found by method and path.

Also who may do what, and how the Hub says no. Sockets are `server`'s business, repositories `store`'s.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from .store import RefusedError, Repo, Store


@dataclass(frozen=True)
class User:
    """An account. It may write to its own namespace and to those of its organizations."""

    name: str
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs)


@dataclass(frozen=True)
class Slice:
    """A part of a file on disk, so that large ones are never in memory whole."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class Reply:
    """An answer; the length of its body is the server's to add."""

    status: int = 200
    body: bytes | Slice = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> "Reply":
        headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        return cls(status, json.dumps(value, default=str).encode(), headers)


@dataclass(frozen=True)
class Call:
    """A request. `path` is what the route's pattern found, `body` arrives while it is read."""

    path: Mapping[str, str]
    query: Mapping[str, list[str]]
    headers: Message
    body: Iterator[bytes]
    user: User | None

    @property
    def repo_type(self) -> str:
        return self.path.get("kind", "models").removesuffix("s")

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def content(self) -> bytes:
        return b"".join(self.body)

    def json(self) -> dict[str, Any]:
        return parse_json(self.content() or b"{}")


def parse_json(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RefusedError(400, f"Invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RefusedError(400, "Expected a JSON object")
    return value


@dataclass(frozen=True)
class Hub:
    """What endpoints share. `users` maps tokens to accounts."""

    store: Store
    url: str
    users: dict[str, User]
    advertise_xet: bool
    upload_key: bytes = field(default_factory=secrets.token_bytes)

    def page(self, repo: Repo) -> str:
        """The address of a repository, which clients take apart to learn its type and name."""
        return f"{self.url}/{'datasets/' if repo.type == 'dataset' else ''}{repo.id}"

    def authenticate(self, headers: Message) -> User | None:
        """Whose token a request bears. One that nobody has is an error even where none is needed."""
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def account(self, call: Call) -> User:
        """The user, who must be logged in."""
        if call.user is None:
            # From an https address, the client would take a 401 for this anyway.
            raise RefusedError(401, "Invalid username or password.", code="RepoNotFound")
        return call.user

    def readable(self, call: Call) -> Repo:
        """The repository a request is about. To those who may not see it, it does not exist."""
        repo = self.store.find(call.repo_type, call.path["repo"])
        if repo is None or (repo.private and not (call.user and call.user.owns(repo.namespace))):
            self.account(call)  # a stranger is not even told whether it might exist
            raise RefusedError(404, "Repository not found", code="RepoNotFound")
        return repo

    def writable(self, call: Call) -> Repo:
        """The same for a request that changes it."""
        user = self.account(call)
        repo = self.readable(call)
        if not user.owns(repo.namespace):
            raise RefusedError(403, "pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def proposable(self, call: Call) -> Repo:
        """The same for a commit, which anybody may offer as a pull request."""
        if not call.flag("create_pr"):
            return self.writable(call)
        self.account(call)
        return self.readable(call)


Endpoint = Callable[[Hub, Call], Reply]
_PARTS = {
    "{kind}": "(?P<kind>models|datasets)",
    "{page}": "(?:(?P<kind>datasets)/)?(?P<repo>[^/]+(?:/[^/]+?)?)",
    "{repo}": "(?P<repo>[^/]+(?:/[^/]+)?)",  # one without a namespace, like gpt2, is never found
    "{rev}": "(?P<rev>[^/]+)",
    "{path}": "(?P<path>.+)",
    "{num}": r"(?P<num>\d+)",
    "{oid}": "(?P<oid>[0-9a-f]{64})",
}


class Routes:
    """Endpoints by method and path."""

    def __init__(self) -> None:
        self._endpoints: list[tuple[str, re.Pattern[str], Endpoint]] = []

    def __call__(self, method: str, path: str) -> Callable[[Endpoint], Endpoint]:
        """Decorate an endpoint. `path` is a regular expression with names of `_PARTS` in it."""
        for part, expression in _PARTS.items():
            path = path.replace(part, expression)

        def register(endpoint: Endpoint) -> Endpoint:
            self._endpoints.append((method, re.compile(path), endpoint))
            return endpoint

        return register

    def find(self, method: str, path: str) -> tuple[Endpoint, dict[str, str]] | None:
        for its_method, pattern, endpoint in self._endpoints:
            match = pattern.fullmatch(path) if its_method == method else None
            if match:
                # Unquoted only now: a revision such as refs/pr/1 comes as one segment.
                return endpoint, {name: unquote(text) for name, text in match.groupdict().items() if text}
        return None


def answer(hub: Hub, routes: list[Routes], method: str, target: str, headers: Message, body: Iterator[bytes]) -> Reply:
    """What the hub says to a request."""
    path, _, query = target.partition("?")
    method = "GET" if method == "HEAD" else method
    try:
        found = next(filter(None, (table.find(method, path) for table in routes)), None)
        if found is None:
            raise RefusedError(404, "Sorry, we can't find the page you are looking for.")
        endpoint, values = found
        return endpoint(hub, Call(values, parse_qs(query), headers, body, user=hub.authenticate(headers)))
    except RefusedError as error:
        known = {"X-Error-Code": error.code, "X-Repo-Commit": error.commit}
        # A header holds one line of ASCII; the body says it in full.
        message = " ".join(str(error).encode("ascii", "replace").decode().split())
        given = {name: value for name, value in known.items() if value}
        return Reply.json({"error": str(error)}, error.status, {"X-Error-Message": message, **given})
