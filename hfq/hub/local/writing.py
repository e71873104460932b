"""The endpoints that clients publish through: repositories, uploads, commits and references.

A push is: validate the card, ask how each file travels (preupload), send large ones to LFS, and name them all
in one commit.
"""

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable
from typing import Any

from . import card
from .protocol import Call, Hub, Reply, Routes, User, parse_json
from .reading import CARD_FILE
from .store import CommitMessage, Files, RefusedError, Repo

_XET_TOKEN_SECONDS = 900

routes = Routes()


@routes("POST", "/api/repos/create")
def create_repo(hub: Hub, call: Call) -> Reply:
    asked = call.json()
    repo_type, repo_id, user = _named_repo(hub, call, asked)
    if repo := hub.store.find(repo_type, repo_id):
        message = f"You already created this {repo_type} repo: {repo_id}"
        return Reply.json({"error": message, "url": hub.page(repo)}, 409, {"X-Error-CommitMessage": message})
    private = asked.get("visibility") == "private"
    repo = hub.store.create(repo_type, repo_id, author=user.name, private=private)
    return Reply.json({"url": hub.page(repo), "name": repo.id, "id": repo.id})


@routes("DELETE", "/api/repos/delete")
def delete_repo(hub: Hub, call: Call) -> Reply:
    repo_type, repo_id, _ = _named_repo(hub, call, call.json())
    hub.store.delete(hub.store.get(repo_type, repo_id))
    return Reply()


@routes("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, call: Call) -> Reply:
    asked = call.json()
    text = str(asked.get("content", ""))
    if errors := card.problems(text, str(asked.get("repoType", "model"))):
        return Reply.json({"errors": [{"message": message} for message in errors], "warnings": []}, 400)
    empty = [] if card.metadata(text) else [{"message": "empty or missing yaml metadata in repo card"}]
    return Reply.json({"errors": [], "warnings": empty})


@routes("POST", "/api/{kind}/{repo}/preupload/{rev}")
def preupload(hub: Hub, call: Call) -> Reply:
    """How each file is to travel, and what is there now: a client leaves out what it would not change."""
    repo = hub.proposable(call)
    commit = repo.at(call.path["rev"])
    answers = []
    for asked in call.json().get("files", []):
        path, size = asked["path"], asked["size"]
        mode = "lfs" if hub.store.is_lfs(commit.files, path, size) else "regular"
        there = {"oid": commit.files[path].etag} if path in commit.files else {}
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
    return Reply.json({"files": answers, "commitOid": commit.sha})


@routes("POST", r"/{page}\.git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, call: Call) -> Reply:
    """Where to send large files, but for those that are stored already."""
    asked = call.json()
    if "ref" in asked:
        repo = hub.writable(call)
    else:  # for a pull request, which anybody may open
        hub.account(call)
        repo = hub.readable(call)
    verify = {"href": f"{hub.page(repo)}.git/info/lfs/objects/verify"}
    objects = []
    for wanted in asked.get("objects", []):
        oid, size = str(wanted["oid"]), int(wanted["size"])
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if not hub.store.has_blob(oid):
            upload = {"href": f"{hub.url}/lfs/{oid}?size={size}&key={_upload_key(hub, oid, size)}"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return Reply.json({"transfer": "basic", "objects": objects})


@routes("PUT", "/lfs/{oid}")
def lfs_upload(hub: Hub, call: Call) -> Reply:
    """Take an object. Clients send no token here, as to a bucket: the address itself is the permission."""
    oid, size = call.path["oid"], int(call.query.get("size", ["0"])[0])
    if not hmac.compare_digest(call.query.get("key", [""])[0], _upload_key(hub, oid, size)):
        raise RefusedError(403, "This address was not made by the LFS batch endpoint")
    hub.store.add_blob(call.body, expected=(oid, size))
    return Reply()


@routes("POST", r"/{page}\.git/info/lfs/objects/verify")
def lfs_verify(hub: Hub, call: Call) -> Reply:
    hub.account(call)
    asked = call.json()
    oid = str(asked.get("oid"))
    if not hub.store.has_blob(oid) or hub.store.lfs_file(oid).size != asked.get("size"):
        raise RefusedError(404, f"No such object: {oid}")
    return Reply()


@routes("GET", "/api/{kind}/{repo}/xet-write-token/{rev}")
def xet_write_token(hub: Hub, call: Call) -> Reply:
    """Where a client with `hf_xet` turns instead of LFS. There is no xet storage behind this token."""
    if not hub.advertise_xet:
        raise RefusedError(404, "This hub has no xet storage. Set HF_HUB_DISABLE_XET=1.")
    hub.writable(call)
    expires = int(time.time()) + _XET_TOKEN_SECONDS
    headers = {
        "X-Xet-Cas-Url": f"{hub.url}/xet",
        "X-Xet-Access-Token": "none",
        "X-Xet-Token-Expiration": str(expires),
    }
    return Reply.json({"casUrl": f"{hub.url}/xet", "accessToken": "none", "exp": expires}, 200, headers)


@routes("POST", "/api/{kind}/{repo}/commit/{rev}")
def commit(hub: Hub, call: Call) -> Reply:
    repo = hub.proposable(call)
    operations = [parse_json(line) for line in call.content().splitlines() if line.strip()]
    header: dict[str, Any] = next((line["value"] for line in operations if line.get("key") == "header"), {})
    made, discussion = hub.store.commit(
        repo,
        lambda files: _apply(hub, repo, operations, files),
        CommitMessage(hub.account(call).name, header.get("summary", ""), header.get("description", "")),
        revision=call.path["rev"],
        parent=header.get("parentCommit"),
        as_pull_request=call.flag("create_pr"),
    )
    page = hub.page(repo)
    answer = {
        "success": True,
        "commitOid": made.sha,
        "commitUrl": f"{page}/commit/{made.sha}",
        "hookOutput": "",
    }
    if discussion:
        answer["pullRequestUrl"] = f"{page}/discussions/{discussion.num}"
    return Reply.json(answer)


@routes("POST", "/api/{kind}/{repo}/discussions")
def open_discussion(hub: Hub, call: Call) -> Reply:
    user, repo = hub.account(call), hub.readable(call)
    asked = call.json()
    is_pull_request = bool(asked.get("pullRequest"))
    opened = hub.store.discuss(repo, str(asked["title"]), author=user.name, pull_request=is_pull_request)
    return Reply.json({"num": opened.num, "pullRequest": is_pull_request})


@routes("POST", "/api/{kind}/{repo}/branch/{rev}")
def create_branch(hub: Hub, call: Call) -> Reply:
    repo = hub.writable(call)
    start = call.json().get("startingPoint") or "main"
    hub.store.add_ref(repo, f"refs/heads/{call.path['rev']}", start)
    return Reply.json({})


@routes("DELETE", "/api/{kind}/{repo}/branch/{rev}")
def delete_branch(hub: Hub, call: Call) -> Reply:
    hub.store.remove_ref(hub.writable(call), f"refs/heads/{call.path['rev']}")
    return Reply.json({})


@routes("POST", "/api/{kind}/{repo}/tag/{rev}")
def create_tag(hub: Hub, call: Call) -> Reply:
    hub.store.add_ref(hub.writable(call), f"refs/tags/{call.json().get('tag')}", call.path["rev"])
    return Reply.json({})


@routes("DELETE", "/api/{kind}/{repo}/tag/{rev}")
def delete_tag(hub: Hub, call: Call) -> Reply:
    hub.store.remove_ref(hub.writable(call), f"refs/tags/{call.path['rev']}")
    return Reply.json({})


def _named_repo(hub: Hub, call: Call, asked: dict[str, Any]) -> tuple[str, str, User]:
    """The type and full name of a repository that is named in the body, in a namespace of the user's."""
    user = hub.account(call)
    namespace = asked.get("organization") or user.name
    repo_type, repo_id = str(asked.get("type", "model")), f"{namespace}/{asked.get('name')}"
    if not user.owns(namespace):
        message = f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"'
        raise RefusedError(403, message)
    return repo_type, repo_id, user


def _upload_key(hub: Hub, oid: str, size: int) -> str:
    return hmac.new(hub.upload_key, f"{oid}:{size}".encode(), hashlib.sha256).hexdigest()


def _apply(hub: Hub, repo: Repo, operations: list[dict[str, Any]], files: Files) -> None:
    """Carry out the lines of a commit on `files`."""
    for operation in operations:
        apply = _OPERATIONS.get(operation.get("key", ""))
        if apply:
            value = operation["value"]
            apply(hub, repo, files, _checked_path(value["path"]), value)


def _checked_path(path: str) -> str:
    """A path inside the repository; a client that joins it to a folder must not end up outside."""
    path = path.removesuffix("/")
    if not all(part not in ("", ".", "..", ".git") for part in path.split("/")):
        raise RefusedError(400, f"Invalid path: {path}")
    return path


def _put_file(hub: Hub, repo: Repo, files: Files, path: str, value: dict[str, Any]) -> None:
    try:
        content = base64.b64decode(value["content"], validate=True)
    except binascii.Error as error:
        raise RefusedError(400, f"{path} is not encoded in base64: {error}") from error
    if path == CARD_FILE and (errors := card.problems(content.decode(errors="replace"), repo.type)):
        raise RefusedError(400, f"Invalid metadata in {path}: {'; '.join(errors)}")
    files[path] = hub.store.add_file(content)


def _put_lfs_file(hub: Hub, repo: Repo, files: Files, path: str, value: dict[str, Any]) -> None:
    files[path] = hub.store.lfs_file(str(value["oid"]))


def _delete_file(hub: Hub, repo: Repo, files: Files, path: str, value: dict[str, Any]) -> None:
    if path not in files:
        raise RefusedError(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
    del files[path]


def _delete_folder(hub: Hub, repo: Repo, files: Files, path: str, value: dict[str, Any]) -> None:
    inside = [name for name in files if name.startswith(f"{path}/")]
    if not inside:
        raise RefusedError(404, f"A folder with this name doesn't exist: {path}", code="EntryNotFound")
    for name in inside:
        del files[name]


_OPERATIONS: dict[str, Callable[[Hub, Repo, Files, str, dict[str, Any]], None]] = {
    "file": _put_file,
    "lfsFile": _put_lfs_file,
    "deletedFile": _delete_file,
    "deletedFolder": _delete_folder,
}
