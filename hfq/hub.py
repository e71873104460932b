"""Publishing a folder that hfq exported: one commit or none, and nothing of other people's touched.

The card's text is made in `hfq.card`; the HTTP is `huggingface_hub`'s.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    Discussion,
    HfApi,
    ModelCard,
    RepoFile,
    constants,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from .errors import ExportError, HubError, UsageError
from .reading import read_json
from .report import REPORT_FILE, read_report
from .trust import check_links

CARD_FILE = "README.md"
COMMIT_TITLE = "INT8 export by hfq"
_OUR_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_ANY_WEIGHTS = re.compile(
    r".+\.(safetensors|bin|pt|pth|ckpt|pkl|onnx|gguf|h5|keras|msgpack|ot|tflite|npz|pb)", re.IGNORECASE
)
_HUB_OWN = {".gitattributes"}  # what the Hub itself puts into a new repository

# By HTTP status: what is wrong, and what to do about it.
_EXPLANATIONS = {
    401: (
        "the token is not valid",
        "Log in again with `hf auth login`, or give another token with --token or HF_TOKEN.",
    ),
    403: (
        "the token may not do this",
        "Use one with write access there, push to a namespace of your own with --to, or try --create-pr.",
    ),
    404: ("no such namespace or repository, or the token may not see it", "Check --to and the token."),
    409: (
        "the name is taken, or somebody is writing to it right now",
        "Push again, or choose another name with --to.",
    ),
    412: (
        "somebody else pushed to it in the meantime",
        "Nothing of this push was written. Look at what changed there, then push again.",
    ),
    429: ("the Hub takes no more requests from you for now", "Wait {wait}, then push again."),
}
_SERVER_FAILED = ("the Hub itself failed", "Nothing is lost: push again later.")
_REFUSED = ("the Hub refuses the request", "Mend what it names, then push again.")


@dataclass(frozen=True)
class PushResult:
    """What a push did. `url` is the repository's, or the pull request's."""

    url: str
    commit: str
    created: bool
    changed: bool


@dataclass(frozen=True)
class _Remote:
    """A repository as it is at commit `head`."""

    id: str
    head: str | None
    private: bool
    files: dict[str, RepoFile]


def push_folder(
    folder: Path,
    *,
    repo_id: str | None,
    default_name: str,
    token: str | None,
    private: bool,
    create_pr: bool,
    message: str,
) -> PushResult:
    """Publish an exported folder in one commit; in none, if the repository holds the same already.

    The repository is created if there is none, and removed again if the commit then fails. Weight files that
    an earlier push left there and this folder no longer has go in the same commit. Other files stay.

    Args:
        repo_id: `user/name`, or a name among the user's own; None for `default_name` there.
        token: None for the one `hf auth login` or `HF_TOKEN` left.
        create_pr: propose the commit as a pull request.

    Raises:
        HubError: the Hub or the repository's content does not allow it. Nothing was published.
        ExportError, SourceError: `folder` is not a complete export.
    """
    token = _require_token(token)
    files = _local_files(folder, token=token)
    target = resolve_repo_id(repo_id, default_name=default_name, token=token)
    validate_card(files[CARD_FILE].read_text(encoding="utf-8"))

    api = HfApi(token=token, library_name="hfq")
    doing = f"Pushing {folder.name} to {target}"
    with _explained(doing, token=token):
        remote = _read_remote(api, target, revision=None)
        if remote is not None:
            _refuse_public(remote, private=private)
            return _commit(api, remote, files=files, create_pr=create_pr, message=message)
        # None leaves the choice to an organization whose repositories are private unless told otherwise.
        created = api.create_repo(target, private=True if private else None).repo_id
    with _removed_on_failure(api, created), _explained(doing, token=token):
        empty = _Remote(created, head=api.model_info(created).sha, private=private, files={})
        result = _commit(api, empty, files=files, create_pr=create_pr, message=message)
        return replace(result, created=True)


def published_revisions(repo_id: str, *, token: str | None, private: bool, create_pr: bool) -> set[str]:
    """Revisions of float checkpoints whose export is in a repository already, by its `hfq.json`.

    One or none; and with `create_pr`, those of hfq's pull requests too, open or turned down.

    Raises:
        HubError: the Hub cannot be asked, or a push there would be refused whatever is in it.
    """
    api = HfApi(token=token, library_name="hfq")
    with _explained(f"Reading {REPORT_FILE} of {repo_id}", token=token):
        remote = _read_remote(api, repo_id, revision=None)
        if remote is None:
            return set()
        _refuse_foreign(remote, {})
        _refuse_public(remote, private=private)
        heads = [remote.head] if any(map(_OUR_WEIGHTS.fullmatch, remote.files)) else []
        if create_pr:
            requests = api.get_repo_discussions(remote.id, discussion_type="pull_request")
            heads += [request.git_reference for request in requests if _is_proposal(request)]
        return {found for head in heads if (found := _recorded_revision(api, remote.id, head))}


def _is_proposal(request: Discussion) -> bool:
    return request.title.startswith(COMMIT_TITLE) and request.status != "merged"


def _recorded_revision(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The checkpoint's revision in a published report; None where there is no report of a checkpoint's export."""
    try:
        path = api.hf_hub_download(repo_id, REPORT_FILE, revision=revision)
        return str(read_json(Path(path))["checkpoint"]["revision"])
    except RemoteEntryNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None


def resolve_repo_id(repo_id: str | None, *, default_name: str, token: str | None) -> str:
    """The full `user/name` that a push goes to; asks the Hub whose token it is where that is needed.

    Raises:
        UsageError: that is no possible name.
        HubError: no token, or a bad one.
    """
    name = repo_id or default_name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(
            f"{name!r} cannot name a repository. Expected 'name' or 'user/name' of up to 96 letters, digits "
            "and single '-', '_' or '.' each."
        ) from error
    if "/" in name:
        return name
    token = _require_token(token)
    with _explained("Asking the Hub whose token this is", token=token):
        return f"{HfApi(token=token).whoami()['name']}/{name}"


def validate_card(text: str) -> None:
    """Ask the Hub whether it would accept this README.md.

    Raises:
        HubError: it would not, or cannot be asked.
    """
    with _explained("Validating the model card", token=None):
        try:
            ModelCard(text).validate()
        except (ValueError, YAMLError) as error:
            raise HubError(
                f"The metadata of {CARD_FILE} is not valid: {_messages(str(error))}. Nothing was pushed; "
                "mend the file and push again."
            ) from error


def _require_token(token: str | None) -> str:
    token = token or get_token()
    if not token:
        raise HubError(
            f"There is no token for {constants.ENDPOINT}. Run `hf auth login`, set HF_TOKEN or pass --token; "
            "it needs write access."
        )
    return token


def _local_files(folder: Path, *, token: str) -> dict[str, Path]:
    """What to publish: every file by its path in the repository, but for hidden ones.

    A recorded command line can hold the token it was run with, and a public repository is no place for that.
    """
    read_report(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in paths.items() if not re.search(r"(^|/)\.", name)}
    check_links(files.values(), folder=folder)
    if not any(_OUR_WEIGHTS.fullmatch(name) for name in files):
        raise ExportError(f"{folder} has no model.safetensors: it is no complete export. Quantize again.")
    if CARD_FILE not in files:
        raise ExportError(f"{folder} has no {CARD_FILE}, and a model is not published without its card.")
    for name, path in files.items():
        if not name.endswith(".safetensors") and token.encode() in path.read_bytes():
            raise ExportError(f"{path} contains your token. Take it out before you publish the folder.")
    return files


def _read_remote(api: HfApi, repo_id: str, *, revision: str | None) -> _Remote | None:
    """None where there is no such repository."""
    try:
        info = api.model_info(repo_id, revision=revision)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 404:
            return None
        raise  # 401 and 403 come as "not found" too, but mean the token
    tree = api.list_repo_tree(info.id, recursive=True, revision=info.sha)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    return _Remote(info.id, head=info.sha, private=bool(info.private), files=files)


def _commit(api: HfApi, remote: _Remote, *, files: dict[str, Path], create_pr: bool, message: str) -> PushResult:
    """One atomic commit on top of `remote.head` that leaves `files` there.

    What is there already is found by comparing hashes here, before anything is sent. The client drops
    unchanged files too, but only after it has uploaded, and it does not say whether it made a commit.
    """
    changed = {name: path for name, path in files.items() if not _is_same(path, remote.files.get(name))}
    stale = [name for name in remote.files if _OUR_WEIGHTS.fullmatch(name) and name not in files]
    _refuse_foreign(remote, changed)
    url = f"{api.endpoint}/{remote.id}"
    if not changed and not stale:
        return PushResult(url, commit=str(remote.head), created=False, changed=False)
    if create_pr and (proposed := _already_proposed(api, remote, files=files, message=message)):
        return proposed
    commit = api.create_commit(
        remote.id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in changed.items()),
            *(CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale),
        ],
        commit_message=message,
        parent_commit=remote.head,
        create_pr=create_pr,
    )
    return PushResult(commit.pr_url or url, commit=commit.oid, created=False, changed=True)


def _already_proposed(api: HfApi, remote: _Remote, *, files: dict[str, Path], message: str) -> PushResult | None:
    """The open pull request under this title that holds the same files, if there is one."""
    requests = api.get_repo_discussions(remote.id, discussion_type="pull_request", discussion_status="open")
    for request in requests:
        if request.title != message:
            continue
        there = _read_remote(api, remote.id, revision=request.git_reference)
        if there and all(_is_same(path, there.files.get(name)) for name, path in files.items()):
            return PushResult(request.url, commit=str(there.head), created=False, changed=False)
    return None


def _is_same(path: Path, remote: RepoFile | None) -> bool:
    """By sha256 for what the Hub keeps as LFS (or xet), by git's own hash for the rest."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    if remote.lfs is None:
        content = path.read_bytes()
        blob = b"blob %d\0" % len(content) + content
        return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == remote.blob_id
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == remote.lfs.sha256


def _refuse_foreign(remote: _Remote, changed: dict[str, Path]) -> None:
    """Only a repository with hfq's report in it is hfq's to change; others it may add to, weights aside."""
    if REPORT_FILE in remote.files:
        return
    weights = [name for name in remote.files if _ANY_WEIGHTS.fullmatch(name)]
    overwritten = [name for name in changed if name in remote.files]
    if names := weights or overwritten:
        shown = ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")
        raise HubError(
            f"{remote.id} holds {shown} but no {REPORT_FILE}: hfq did not write it and will not change it. "
            "Push to another repository with --to."
        )


def _refuse_public(remote: _Remote, *, private: bool) -> None:
    if private and not remote.private:
        raise HubError(
            f"{remote.id} is public already, so --private cannot keep this model from view. Make it private "
            "in its settings, or push to another repository with --to."
        )


@contextmanager
def _removed_on_failure(api: HfApi, repo_id: str) -> Iterator[None]:
    """Take back a repository this push created, if the rest fails; unless it holds something by then."""
    try:
        yield
    except BaseException as error:  # an interruption too must leave nothing
        try:
            if set(api.list_repo_files(repo_id)) <= _HUB_OWN:
                api.delete_repo(repo_id)
        except (HTTPError, OSError):
            raise HubError(
                f"{error} The empty repository {api.endpoint}/{repo_id}, which this push created, could not "
                "be removed again: delete it in its settings."
            ) from error
        raise


@contextmanager
def _explained(doing: str, *, token: str | None) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into one `HubError` without the token in it."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        text = f"{doing} failed: {_explain(error)}"
        raise HubError(text.replace(token, "HF_TOKEN") if token else text) from error


def _explain(error: BaseException) -> str:
    """What is wrong and what to do, by the HTTP or network error at the root of `error` if there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (HTTPError, ConnectionError)):
        cause = cause.__cause__  # the client wraps a failed upload in a RuntimeError
    if isinstance(cause, HfHubHTTPError):
        return _explain_status(cause)
    if isinstance(cause, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and this needs {constants.ENDPOINT}. Unset it and push again."
    if cause is not None:
        reason = str(cause) or type(cause).__name__
        return f"{constants.ENDPOINT} cannot be reached ({reason}). Check the network, then push again."
    return f"{error}."


def _explain_status(error: HfHubHTTPError) -> str:
    response = error.response
    status = response.status_code
    what, remedy = _SERVER_FAILED if status >= 500 else _EXPLANATIONS.get(status, _REFUSED)
    seconds = response.headers.get("Retry-After", "")
    wait = f"{seconds} seconds" if seconds.isdigit() else "a few minutes"
    said = f": {error.server_message}" if error.server_message else ""
    return f"{what} ({response.url.host} answered {status}{said}). {remedy.format(wait=wait)}"


def _messages(text: str) -> str:
    """The messages in the JSON with which the Hub rejects a card, or `text` if it is something else."""
    try:
        return "; ".join(row["message"] for row in json.loads(text)["errors"]).rstrip(".")
    except (ValueError, KeyError, TypeError):
        return text.strip().rstrip(".")
