"""The repositories of a local Hub, with git's object names but without git.

A repository is an immutable value. A change makes a new one, which is on disk before anybody can see it: a
commit is there whole or not at all, and readers need no lock. Nothing here knows HTTP but for the statuses.
"""

import fcntl
import hashlib
import json
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path

from ...common.errors import HubError

REPO_TYPES = ("model", "dataset")
LFS_THRESHOLD = 10 * 2**20
GIT_ATTRIBUTES = ".gitattributes"
# The Hub's rules in a new repository: what it keeps as LFS however small it is.
_LFS_PATTERNS = """
    *.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz
    *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar
    *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*
"""
CHUNK = 1 << 20
_REPO_NAME = re.compile(r"(?!.*(--|\.\.))\w([\w.-]{0,94}\w)?", re.ASCII)
_REF_NAME = re.compile(r"(?!.*(\.\.|//|/$|\.lock$))[\w.-][\w./-]*", re.ASCII)


class RefusedError(HubError):
    """The Hub's no to a request. Clients tell one 404 from another by `code`."""

    def __init__(self, status: int, message: str, *, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.commit = commit


@dataclass(frozen=True)
class File:
    """One version of a file: where its content is stored (`sha256`), and its name in git (`oid`)."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer(self) -> bytes:
        """What git holds in place of the content of an LFS file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return text.encode()


Files = dict[str, File]


@dataclass(frozen=True)
class CommitMessage:
    """Who commits, and what is said of it."""

    author: str
    title: str
    description: str = ""


@dataclass(frozen=True)
class Commit:
    """A commit with all files it leaves in the repository, by path."""

    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Files


@dataclass(frozen=True)
class Discussion:
    """A pull request, whose commits are at `refs/pr/<num>`, or a mere conversation."""

    num: int
    title: str
    author: str
    created: str
    is_pull_request: bool


@dataclass(frozen=True)
class Repo:
    """A repository as it is at one moment. `refs` maps full names, as in `refs/heads/main`, to commits."""

    type: str
    id: str
    private: bool
    gated: bool
    created: str
    commits: dict[str, Commit]
    refs: dict[str, str]
    discussions: tuple[Discussion, ...] = ()

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a pull request or the beginning of a hash names."""
        ref = self.ref(revision)
        if ref is not None:
            return self.commits[self.refs[ref]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for sha, commit in self.commits.items():
                if sha.startswith(revision):
                    return commit
        raise RefusedError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def history(self, commit: Commit) -> Iterator[Commit]:
        """`commit` and what came before it, newest first."""
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit


class Store:
    """Repositories and blobs in a folder, and the only way to change them."""

    def __init__(self, root: Path) -> None:
        self._repo_folder = root / "repos"
        self._blobs = root / "blobs"
        self._incoming = root / "incoming"
        self._lock = threading.Lock()
        root.mkdir(parents=True, exist_ok=True)
        self._claim = (root / "lock").open("w")
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._claim.close()
            raise HubError(
                f"Another local Hub serves {root}. Use that one, or give this one its own folder."
            ) from error
        shutil.rmtree(self._incoming, ignore_errors=True)  # what a killed server was receiving
        for folder in (self._repo_folder, self._blobs, self._incoming):
            folder.mkdir(exist_ok=True)
        repos = map(_load_repo, sorted(self._repo_folder.glob("*/*/*.json")))
        self._repos = {(repo.type, repo.id): repo for repo in repos}

    def close(self) -> None:
        """Let another server have the folder."""
        self._claim.close()

    def find(self, repo_type: str, repo_id: str) -> Repo | None:
        return self._repos.get((repo_type, repo_id))

    def get(self, repo_type: str, repo_id: str) -> Repo:
        repo = self.find(repo_type, repo_id)
        if repo is None:
            raise RefusedError(404, "Repository not found", code="RepoNotFound")
        return repo

    def create(self, repo_type: str, repo_id: str, *, author: str, private: bool, gated: bool = False) -> Repo:
        """A new repository with the commit that the Hub makes in one."""
        names = repo_id.split("/")
        if repo_type not in REPO_TYPES or len(names) != 2 or not all(map(_REPO_NAME.fullmatch, names)):
            raise RefusedError(400, f"Invalid {repo_type} repo name: {repo_id}")
        with self._lock:
            if self.find(repo_type, repo_id):
                raise RefusedError(409, f"You already created this {repo_type} repo: {repo_id}")
            rules = (f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS_PATTERNS.split())
            attributes = self.add_file("".join(rules).encode())
            first = _seal({GIT_ATTRIBUTES: attributes}, CommitMessage(author, "initial commit"))
            refs = {"refs/heads/main": first.sha}
            repo = Repo(repo_type, repo_id, private, gated, first.date, commits={first.sha: first}, refs=refs)
            self._publish(repo)
            return repo

    def delete(self, repo: Repo) -> None:
        with self._lock:
            self._state_file(repo).unlink(missing_ok=True)
            self._repos.pop((repo.type, repo.id), None)

    def commit(
        self,
        repo: Repo,
        edit: Callable[[Files], None],
        message: CommitMessage,
        *,
        revision: str = "main",
        parent: str | None = None,
        as_pull_request: bool = False,
    ) -> tuple[Commit, Discussion | None]:
        """Apply `edit` to the files at `revision`. A commit that would change nothing is not made.

        Args:
            parent: refuse unless this is the head; a pull request branches off from here instead.

        Raises:
            RefusedError: there is no such revision, it has moved on, or `edit` refused.
        """
        with self._lock:
            repo = self.get(repo.type, repo.id)
            head = repo.at(revision)
            if parent is not None and parent != head.sha:
                if not as_pull_request:
                    raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
                head = repo.at(parent)
            files = dict(head.files)
            edit(files)
            discussion = None
            ref = repo.ref(revision)
            if as_pull_request:
                repo, discussion = _with_discussion(repo, message.title, message.author, pull_request=True)
                ref = f"refs/pr/{discussion.num}"
            elif ref is None or ref.startswith("refs/tags/"):
                raise RefusedError(400, f"{revision} is not a branch")
            elif files == head.files:
                return head, None
            commit = _seal(files, message, parent=head.sha)
            commits = {**repo.commits, commit.sha: commit}
            self._publish(replace(repo, commits=commits, refs={**repo.refs, ref: commit.sha}))
            return commit, discussion

    def discuss(self, repo: Repo, title: str, *, author: str, pull_request: bool) -> Discussion:
        """Open a discussion, or a pull request that has no commit yet."""
        with self._lock:
            repo, discussion = _with_discussion(self.get(repo.type, repo.id), title, author, pull_request)
            if pull_request:
                ref = f"refs/pr/{discussion.num}"
                repo = replace(repo, refs={**repo.refs, ref: repo.refs["refs/heads/main"]})
            self._publish(repo)
            return discussion

    def add_ref(self, repo: Repo, ref: str, revision: str) -> None:
        """Create a branch or a tag."""
        with self._lock:
            repo = self.get(repo.type, repo.id)
            if not _REF_NAME.fullmatch(ref):
                raise RefusedError(400, f"Invalid reference name: {ref}")
            if ref in repo.refs:
                raise RefusedError(409, f"Reference already exists: {ref}")
            self._publish(replace(repo, refs={**repo.refs, ref: repo.at(revision).sha}))

    def remove_ref(self, repo: Repo, ref: str) -> None:
        with self._lock:
            repo = self.get(repo.type, repo.id)
            if ref == "refs/heads/main":
                raise RefusedError(403, "The main branch cannot be deleted")
            if ref not in repo.refs:
                raise RefusedError(404, f"Reference does not exist: {ref}", code="RevisionNotFound")
            self._publish(replace(repo, refs={name: sha for name, sha in repo.refs.items() if name != ref}))

    def is_lfs(self, files: Files, path: str, size: int) -> bool:
        """Whether a file at `path` belongs to LFS: by its size, or by the repository's .gitattributes."""
        if GIT_ATTRIBUTES not in files or size > LFS_THRESHOLD:
            return size > LFS_THRESHOLD
        lines = self.read(files[GIT_ATTRIBUTES]).decode(errors="replace").splitlines()
        patterns = (line.split()[0] for line in lines if "filter=lfs" in line.split()[1:])
        name = path.rpartition("/")[2]
        return any(fnmatch(path if "/" in pattern else name, pattern) for pattern in patterns)

    def add_file(self, content: bytes) -> File:
        """A regular file of git."""
        sha256, size = self.add_blob([content])
        return File(sha256, size, oid=_git_hash("blob", content), lfs=False)

    def lfs_file(self, sha256: str) -> File:
        """An LFS file whose content was uploaded before."""
        if not self.has_blob(sha256):
            raise RefusedError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        file = File(sha256, self.blob(sha256).stat().st_size, oid="", lfs=True)
        return replace(file, oid=_git_hash("blob", file.pointer))

    def add_blob(self, chunks: Iterable[bytes], *, expected: tuple[str, int] | None = None) -> tuple[str, int]:
        """Store content, and return its sha256 and size.

        Raises:
            RefusedError: those are not the `expected` ones. Nothing is stored.
        """
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self._incoming, delete=False) as incoming:
            path = Path(incoming.name)
            try:
                for chunk in chunks:
                    digest.update(chunk)
                    incoming.write(chunk)
                found = (digest.hexdigest(), incoming.tell())
                if expected is not None and found != expected:
                    raise RefusedError(400, f"Expected sha256 and size {expected}, received {found}")
                incoming.flush()
                path.replace(self.blob(found[0]))
            except BaseException:
                path.unlink()
                raise
        return found

    def has_blob(self, sha256: str) -> bool:
        return bool(re.fullmatch("[0-9a-f]{64}", sha256)) and self.blob(sha256).exists()

    def blob(self, sha256: str) -> Path:
        return self._blobs / sha256

    def read(self, file: File) -> bytes:
        return self.blob(file.sha256).read_bytes()

    def _publish(self, repo: Repo) -> None:
        path = self._state_file(repo)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._incoming, delete=False, encoding="utf-8") as file:
            json.dump(asdict(repo), file)
        Path(file.name).replace(path)
        self._repos[repo.type, repo.id] = repo

    def _state_file(self, repo: Repo) -> Path:
        return self._repo_folder / f"{repo.type}s" / f"{repo.id}.json"


def read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def folder_oids(files: Files) -> dict[str, str]:
    """Git's name of every folder by its path; the whole tree's is at ""."""
    entries: dict[str, dict[str, bytes]] = {"": {}}
    for path, file in files.items():
        folder, _, name = path.rpartition("/")
        entries.setdefault(folder, {})[name] = b"100644 %s\0%s" % (name.encode(), bytes.fromhex(file.oid))
        while folder:  # a folder may hold nothing but folders
            folder = folder.rpartition("/")[0]
            entries.setdefault(folder, {})
    oids = {}
    for folder in sorted(entries, key=len, reverse=True):  # from the leaves to the root
        oids[folder] = _git_hash("tree", b"".join(entry for _, entry in sorted(entries[folder].items())))
        if folder:
            parent, _, name = folder.rpartition("/")
            # The slash is only for the order: git sorts a folder as if its name ended in one.
            entries[parent][f"{name}/"] = b"40000 %s\0%s" % (name.encode(), bytes.fromhex(oids[folder]))
    return oids


def _seal(files: Files, message: CommitMessage, *, parent: str | None = None) -> Commit:
    """A commit under the name that git would give it."""
    now = datetime.now(timezone.utc)
    signature = f"{message.author} <{message.author}@localhost> {now.timestamp():.0f} +0000"
    lines = [
        f"tree {folder_oids(files)['']}",
        *([f"parent {parent}"] if parent else []),
        f"author {signature}",
        f"committer {signature}",
        "",
        "\n\n".join(filter(None, (message.title, message.description))),
    ]
    sha = _git_hash("commit", "\n".join(lines).encode())
    return Commit(sha, parent, message.title, message.description, message.author, _timestamp(now), files)


def _with_discussion(repo: Repo, title: str, author: str, pull_request: bool) -> tuple[Repo, Discussion]:
    created = _timestamp(datetime.now(timezone.utc))
    discussion = Discussion(len(repo.discussions) + 1, title, author, created, is_pull_request=pull_request)
    return replace(repo, discussions=(*repo.discussions, discussion)), discussion


def _git_hash(kind: str, content: bytes) -> str:
    blob = b"%s %d\0%s" % (kind.encode(), len(content), content)
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def _timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _load_repo(path: Path) -> Repo:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        for sha, commit in state["commits"].items():
            files = {name: File(**file) for name, file in commit["files"].items()}
            state["commits"][sha] = Commit(**{**commit, "files": files})
        discussions = tuple(Discussion(**discussion) for discussion in state["discussions"])
        return Repo(**{**state, "discussions": discussions})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HubError(
            f"{path} is not the state of a repository ({error}). Remove it to start the local Hub without it."
        ) from error
