"""Files of a repository at one commit, as the Hub lists them there. huggingface_hub compares their sizes only.

A file that arrived damaged, or lies damaged in the cache, is deleted there and fetched again, once.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import HfApi, RepoFile, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import repo_folder_name

from ..common.errors import HubError
from .client import Waits, be_patient, is_cut

Files = Mapping[str, RepoFile]
Found = TypeVar("Found")


class Digests(NamedTuple):
    """What the content of a file may be called: by LFS, by git, and by Hubs that are not that particular."""

    sha256: str
    git: str
    sha1: str


def head(api: HfApi, repo_id: str, *, revision: str | None = None, repo_type: str | None = None) -> str:
    """The commit that a repository is at, or one of its revisions. It becomes part of paths here.

    Raises:
        HubError: the Hub names none.
    """
    be_patient()
    sha = api.repo_info(repo_id, revision=revision, repo_type=repo_type).sha
    if not re.fullmatch("[0-9a-f]{40}", str(sha)):
        raise HubError(f"The Hub says that {repo_id} is at {sha!r}, which is no commit. Try again later.")
    return str(sha)


def list_files(api: HfApi, repo_id: str, *, revision: str | None, repo_type: str | None = None) -> dict[str, RepoFile]:
    """Every file of a repository at a revision, by path."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def fetch_folder(
    repo_id: str, files: Files, *, revision: str, token: str | None, allow: Sequence[str], ignore: Sequence[str]
) -> Path:
    """A folder with those of `files` that the patterns take. `revision`: the commit they are of.

    Raises:
        HubError: a file arrives damaged each time.
    """

    def fetch() -> Path:
        return Path(
            snapshot_download(
                repo_id, revision=revision, token=token, allow_patterns=list(allow), ignore_patterns=list(ignore)
            )
        )

    return undamaged(repo_id, fetch, lambda folder: find_damaged(folder, files))


def fetch_file(repo_id: str, file: RepoFile, *, revision: str, token: str | None, repo_type: str | None = None) -> Path:
    """One file of a repository at a commit.

    Raises:
        HubError: it arrives damaged each time.
    """

    def fetch() -> Path:
        return Path(hf_hub_download(repo_id, file.path, revision=revision, token=token, repo_type=repo_type))

    return undamaged(repo_id, fetch, lambda path: _damaged({path: file}))


def undamaged(name: str, fetch: Callable[[], Found], find: Callable[[Found], Mapping[Path, str | None]]) -> Found:
    """What `fetch` brings, once `find` finds no damage in it.

    Args:
        find: the damaged files, which lie in the cache, and their sha256; or None where the Hub lists another sha256.
            Without one, the same bytes twice are what the Hub has, and its listing calls them by no name we know.

    Raises:
        HubError: it arrives damaged each time.
    """
    found = _uncut(fetch)
    if not (first := find(found)):
        return found
    _forget(first)
    found = _uncut(fetch)
    again = {path: sha256 for path, sha256 in find(found).items() if sha256 is None or first.get(path) != sha256}
    if again:
        _forget(again)
        raise HubError(
            f"{', '.join(path.name for path in again)} of {name} arrived damaged, twice: the Hub lists another checksum. "
            "Nothing of it was kept. Check the network (a proxy may change files), then try again."
        )
    return found


def snapshot_folder(repo_id: str, revision: str, *, repo_type: str) -> Path:
    """Where the cache has what was fetched of a repository at a commit, if anything was."""
    return (
        Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type) / "snapshots" / revision
    )


def find_damaged(folder: Path, files: Files) -> dict[Path, str | None]:
    """The files of a snapshot in the cache that are not what the Hub lists, as `undamaged` takes them."""
    return _damaged({folder / name: listed for name, listed in files.items() if (folder / name).is_file()})


def is_same(path: Path, listed: RepoFile | None, *, etag: str | None = None) -> bool:
    """Whether a file here has the content of one on the Hub: by sha256 for what is in LFS (or xet), else by git's hash.

    `etag` is what the Hub calls it when it is downloaded: for LFS its sha256 too, where the list does not say so.
    """
    if listed is None or listed.size != path.stat().st_size:
        return False
    names = {listed.lfs.sha256} if listed.lfs else {listed.blob_id, etag}
    return not names.isdisjoint(digests(path))


def digests(path: Path) -> Digests:
    """Of a file of any size, read once."""
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    found = hashlib.sha256(), git, hashlib.sha1(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            for digest in found:
                digest.update(chunk)
    return Digests(*(digest.hexdigest() for digest in found))


def _damaged(files: Mapping[Path, RepoFile]) -> dict[Path, str | None]:
    return {
        path: None if listed.lfs else digests(path).sha256
        for path, listed in files.items()
        if not is_same(path, listed, etag=path.resolve().name)  # the cache's files are named by their etags
    }


def _forget(paths: Mapping[Path, object]) -> None:
    for path in paths:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _uncut(fetch: Callable[[], Found]) -> Found:
    """Fetch again where the connection was cut in the middle of a file, which huggingface_hub does not always do."""
    waits = Waits()
    while True:
        try:
            return fetch()
        except (HTTPError, OSError) as error:
            if not (is_cut(error) and waits.another(error)):
                raise
