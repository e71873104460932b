"""One commit on the Hub, or none: in a new repository, on a branch, as a pull request, and when answers are lost."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError

from ..common.errors import HfqError, HubError
from ..common.names import REPORT_FILE
from ..recipe import PushOptions
from .client import Waits, is_passing
from .errors import NOT_UNDERSTOOD, conflict, explain, response_of
from .repository import (
    OURS,
    Remote,
    is_there,
    pull_requests,
    read_branch,
    read_remote,
    refuse_foreign,
    refuse_public,
    tags,
)

MAIN = "main"
CommitOperation = CommitOperationAdd | CommitOperationDelete
# What transformers and peft look for beside config.json: left there, it would be loaded instead of ours, or with it.
_LOADED_TOO = re.compile(
    r"(model|pytorch_model|tf_model|flax_model|adapter_model)[^/]*\.(safetensors|bin|h5|msgpack|json)|adapter_config\.json"
    r"|tokenizer\.(json|model)|(tokenizer_config|special_tokens_map|added_tokens|vocab|generation_config)\.json"
    r"|vocab\.txt|merges\.txt|[^/]+\.(bpe\.)?model|[^/]+\.jinja"
)
_HUB_OWN = {".gitattributes"}  # what the Hub itself puts into a new repository


@dataclass(frozen=True)
class PushResult:
    """What a push did. `url` is the repository's, or the pull request's. `left`: files of the folder that stayed here."""

    url: str
    commit: str
    created: bool
    changed: bool
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Push:
    """What is to be where, whatever is there now."""

    api: HfApi
    files: dict[str, Path]
    message: str
    options: PushOptions


def push_to_new(push: Push, repo_id: str) -> PushResult:
    """Create the repository and fill it; take it back if that fails, unless it turns out to be somebody else's."""
    creation = _Creation(push.api, repo_id)
    with _removed_on_failure(creation, branch=push.options.branch):
        creation.run(private=push.options.private)
        remote = read_remote(push.api, repo_id)
        if remote is None and not creation.ours:
            raise HubError(f"{repo_id} can neither be read nor created: the name is taken. Choose another with --to.")
        remote = remote or Remote(repo_id, head=None, private=push.options.private, files={})
        return replace(push_to(push, remote), created=creation.ours)


class _Creation:
    """Makes a repository, and knows whether it was this one who made it: of a lost answer too."""

    def __init__(self, api: HfApi, repo_id: str) -> None:
        self.api = api
        self.repo_id = repo_id
        self.ours = False

    def run(self, *, private: bool) -> None:
        waits = Waits()
        while True:
            try:
                # None leaves the choice to an organization whose repositories are private unless told otherwise.
                self.api.create_repo(self.repo_id, private=True if private else None)
                self.ours = True
                return
            except (HTTPError, OSError) as error:
                response = response_of(error)
                if (
                    response is not None and response.status_code == 409
                ):  # by a request of ours whose answer was lost, if there was one
                    return
                if not is_passing(error):
                    raise
                self.ours = True
                if not waits.another(error, response):
                    raise
            except (ValueError, *NOT_UNDERSTOOD):  # created, but the answer does not say so as it should
                self.ours = True
                return


def push_to(push: Push, remote: Remote) -> PushResult:
    """Publish in a repository that is there; one that holds nothing yet is one too."""
    refuse_public(remote, private=push.options.private)
    if push.options.branch is None:
        return _commit(push, remote)
    if there := read_branch(push.api, remote, push.options.branch):
        return _commit(push, there)
    refuse_foreign(remote, force=push.options.force)  # before a branch is made for nothing
    push.api.create_branch(remote.id, branch=push.options.branch, revision=remote.head, exist_ok=True)
    try:
        return _commit(push, remote)
    except BaseException:
        there = read_branch(push.api, remote, push.options.branch)
        if there and there.head == remote.head:
            push.api.delete_branch(remote.id, branch=push.options.branch)
        raise


def _commit(push: Push, remote: Remote) -> PushResult:
    """One atomic commit on top of `remote.head` that leaves the push's files there.

    What is there already is found by comparing hashes here, before anything is sent. The client drops
    unchanged files too, but only after it has uploaded, and it does not say whether it made a commit.
    """
    changed = {name: path for name, path in push.files.items() if not is_there(push.api, remote, name, path)}
    refuse_foreign(remote, changed, force=push.options.force)
    # What passed as not ours without --force has no weights, and a file that is named as our plots are is a stranger's.
    removable = OURS if REPORT_FILE in remote.files else _LOADED_TOO if push.options.force else None
    stale = [name for name in remote.files if removable and removable.fullmatch(name) and name not in push.files]
    _refuse_taken_tag(push, remote, is_new=bool(changed or stale))
    unchanged = PushResult(f"{push.api.endpoint}/{remote.id}", str(remote.head), created=False, changed=False)
    if not changed and not stale:
        return unchanged
    if push.options.create_pr and (proposed := _already_proposed(push, remote)):
        return proposed
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in changed.items()]
    push.api.preupload_lfs_files(
        remote.id, additions, revision=push.options.branch, create_pr=push.options.create_pr, free_memory=False
    )
    return _send(push, remote, [*additions, *(CommitOperationDelete(name, is_folder=False) for name in stale)])


def _send(push: Push, remote: Remote, operations: Sequence[CommitOperation]) -> PushResult:
    """Make the commit. Where the answer is lost or is no answer, the repository says whether it was made.

    It is sent again only while the head is what it was, and then with the same parent: it cannot be made twice.
    """
    waits = Waits()
    url = f"{push.api.endpoint}/{remote.id}"
    while True:
        try:
            commit = push.api.create_commit(
                remote.id,
                operations,
                commit_message=push.message,
                parent_commit=remote.head,
                revision=push.options.branch,
                create_pr=push.options.create_pr,
            )
            return PushResult(commit.pr_url or url, commit.oid, created=False, changed=commit.oid != remote.head)
        except (HTTPError, OSError, ValueError, *NOT_UNDERSTOOD) as error:
            response = response_of(error)
            status = response.status_code if response is not None else None
            if status not in (None, 409, 412) and not is_passing(error):
                raise
            if made := _made_after_all(push, remote, error):
                return made
            if (push.options.create_pr and status not in (429, 503)) or not waits.another(error, response):
                raise


def _made_after_all(push: Push, remote: Remote, error: BaseException) -> PushResult | None:
    """What a commit that seems to have failed has left: itself, or nothing.

    Raises:
        HubError: somebody else's commit, or it cannot be found out.
    """
    try:
        if push.options.create_pr:
            found = _already_proposed(push, remote)
            return replace(found, changed=True) if found else None
        now = read_branch(push.api, remote, push.options.branch or MAIN)
    except (HTTPError, OSError, ValueError, *NOT_UNDERSTOOD) as failure:
        raise HubError(
            f"{explain(error)} Whether the commit was made could not be found out ({explain(failure).rstrip('.')}). "
            "Push again: what is there already is not sent twice."
        ) from error
    if now is None or now.head == remote.head:
        return None
    if any(not is_there(push.api, now, name, path) for name, path in push.files.items()):
        raise HubError(conflict(error)) from error
    return PushResult(f"{push.api.endpoint}/{remote.id}", str(now.head), created=False, changed=True)


def _already_proposed(push: Push, remote: Remote) -> PushResult | None:
    """The open pull request under this title that holds the same files, if there is one."""
    for request in pull_requests(push.api, remote.id):
        if request.title != push.message or request.status != "open" or not request.git_reference:
            continue
        there = read_branch(push.api, remote, request.git_reference)
        if there and all(is_there(push.api, there, name, path) for name, path in push.files.items()):
            return PushResult(request.url, commit=str(there.head), created=False, changed=False)
    return None


def set_tag(api: HfApi, repo_id: str, tag: str, *, commit: str) -> None:
    waits = Waits()
    while True:
        try:
            api.create_tag(repo_id, tag=tag, revision=commit)
            return
        except (HTTPError, OSError) as error:
            if tags(api, repo_id).get(tag) == commit:  # since before, or by a request whose answer was lost
                return
            if not (is_passing(error) and waits.another(error, response_of(error))):
                raise


def _refuse_taken_tag(push: Push, remote: Remote, *, is_new: bool) -> None:
    taken = tags(push.api, remote.id).get(push.options.tag) if push.options.tag else None
    if taken and (is_new or taken != remote.head):
        raise HubError(
            f"{remote.id} has a tag {push.options.tag} already, at {taken}, and a tag is never moved. Nothing was pushed; "
            "choose another --tag."
        )


@contextmanager
def _removed_on_failure(creation: _Creation, *, branch: str | None) -> Iterator[None]:
    """Take back a repository this push created, if the rest fails; unless it holds something by then."""
    api, repo_id = creation.api, creation.repo_id
    try:
        yield
    except BaseException as error:  # an interruption too must leave nothing
        if not creation.ours:
            raise
        try:
            if _holds_nothing(api, repo_id, branch):
                api.delete_repo(repo_id, missing_ok=True)
        except (HTTPError, OSError, ValueError, *NOT_UNDERSTOOD):
            said = str(error) if isinstance(error, HfqError) else explain(error)
            raise HubError(
                f"{said} The empty repository {api.endpoint}/{repo_id}, which this push created, could not "
                "be removed again: push again to fill it, or delete it in its settings."
            ) from error
        raise


def _holds_nothing(api: HfApi, repo_id: str, branch: str | None) -> bool:
    """Whether nobody has put anything into a repository. It need not exist."""
    remote = read_remote(api, repo_id)
    there = read_branch(api, remote, branch) if remote and branch else remote
    return all(set(one.files) <= _HUB_OWN for one in (remote, there) if one)
