"""The endpoints that clients read from: whose token, what repositories hold, and the files themselves."""

import json
import re
from typing import Any
from urllib.parse import parse_qs

from . import card
from .protocol import Call, Hub, Reply, Routes, Slice
from .store import Commit, Discussion, File, Files, RefusedError, Repo, Store, folder_oids

CARD_FILE = "README.md"
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_SHOWN_CONFIG = ("architectures", "model_type", "auto_map", "quantization_config")

routes = Routes()


@routes("GET", "/api/whoami-v2")
def whoami(hub: Hub, call: Call) -> Reply:
    user = hub.account(call)
    orgs = [{"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": "write"} for org in user.orgs]
    token = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
    account = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "isPro": False}
    return Reply.json({**account, "orgs": orgs, "auth": token})


@routes("GET", "/api/{kind}/{repo}(?:/revision/{rev})?")
def info(hub: Hub, call: Call) -> Reply:
    repo = hub.readable(call)
    commit = repo.at(call.path.get("rev", "main"))
    described = _describe(hub.store, repo, commit, blobs=call.flag("blobs"))
    if asked := call.query.get("expand"):
        described = {name: value for name, value in described.items() if name in ("_id", "id", *asked)}
    return Reply.json(described)


@routes("GET", "/api/{kind}/{repo}/tree/{rev}(?:/{path})?")
def tree(hub: Hub, call: Call) -> Reply:
    repo = hub.readable(call)
    commit = repo.at(call.path["rev"])
    folder = call.path.get("path", "").strip("/")
    folders = folder_oids(commit.files)
    if folder not in folders:
        raise RefusedError(404, f"{folder} does not exist on {call.path['rev']}", code="EntryNotFound")
    within = [path for path in (*folders, *commit.files) if path and _is_within(path, folder)]
    if not call.flag("recursive"):
        within = [path for path in within if path.rpartition("/")[0] == folder]
    entries = (_entry(repo, commit, folders, path, expand=call.flag("expand")) for path in sorted(within))
    return Reply.json(sorted(entries, key=lambda entry: entry["type"]))  # folders before files


@routes("POST", "/api/{kind}/{repo}/paths-info/{rev}")
def paths_info(hub: Hub, call: Call) -> Reply:
    repo = hub.readable(call)
    commit = repo.at(call.path["rev"])
    form = parse_qs(call.content().decode())
    folders = folder_oids(commit.files)
    found = [path for path in form.get("paths", []) if path in commit.files or path in folders]
    expand = form.get("expand") == ["true"]
    return Reply.json([_entry(repo, commit, folders, path, expand=expand) for path in found])


@routes("GET", "/api/{kind}/{repo}/refs")
def refs(hub: Hub, call: Call) -> Reply:
    repo = hub.readable(call)

    def named(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in repo.refs.items()
            if ref.startswith(prefix)
        ]

    listed = {"branches": named("refs/heads/"), "tags": named("refs/tags/"), "converts": []}
    if call.flag("include_prs"):
        listed["pullRequests"] = named("refs/pr/")
    return Reply.json(listed)


@routes("GET", "/api/{kind}/{repo}/commits/{rev}")
def commits(hub: Hub, call: Call) -> Reply:
    repo = hub.readable(call)
    return Reply.json(
        [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.description,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in repo.history(repo.at(call.path["rev"]))
        ]
    )


@routes("GET", "/api/{kind}/{repo}/discussions")
def discussions(hub: Hub, call: Call) -> Reply:
    repo = hub.readable(call)
    kind = call.query.get("type", [""])[0]
    listed = [
        _discussion(repo, discussion)
        for discussion in reversed(repo.discussions)
        if kind in ("", "all", "pull_request" if discussion.is_pull_request else "discussion")
    ]
    return Reply.json({"discussions": listed, "count": len(listed), "start": 0})


@routes("GET", "/api/{kind}/{repo}/discussions/{num}")
def discussion(hub: Hub, call: Call) -> Reply:
    repo = hub.readable(call)
    number = int(call.path["num"])
    if not 0 < number <= len(repo.discussions):
        raise RefusedError(404, f"Discussion {number} not found")
    details = {"events": [], "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""}
    return Reply.json({**_discussion(repo, repo.discussions[number - 1]), **details})


@routes("GET", "/{page}/resolve/{rev}/{path}")
def resolve(hub: Hub, call: Call) -> Reply:
    repo = hub.readable(call)
    if repo.gated and not (call.user and call.user.owns(repo.namespace)):
        status = 403 if call.user else 401
        raise RefusedError(status, f"Access to {repo.type} {repo.id} is restricted.", code="GatedRepo")
    commit = repo.at(call.path["rev"])
    file = commit.files.get(call.path["path"])
    if file is None:
        # The client remembers by the commit that this file is absent.
        raise RefusedError(404, "Entry not found", code="EntryNotFound", commit=commit.sha)
    headers = {
        "Content-Type": "application/octet-stream",
        "X-Repo-Commit": commit.sha,
        "ETag": f'"{file.etag}"',
        "Accept-Ranges": "bytes",
    }
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
    return _ranged(hub.store, file, call.headers.get("Range"), headers)


def _ranged(store: Store, file: File, wanted: str | None, headers: dict[str, str]) -> Reply:
    """The file, or the one range of it that the request wants."""
    path = store.blob(file.sha256)
    match = _RANGE.fullmatch(wanted or "")
    if match is None or match[0] == "bytes=-":
        return Reply(200, Slice(path, 0, file.size), headers)
    first, last = match.groups()
    start = int(first) if first else max(file.size - int(last), 0)
    end = min(int(last), file.size - 1) if first and last else file.size - 1
    if start > end:
        return Reply(416, b"", {**headers, "Content-Range": f"bytes */{file.size}"})
    headers = {**headers, "Content-Range": f"bytes {start}-{end}/{file.size}"}
    return Reply(206, Slice(path, start, end - start + 1), headers)


def _describe(store: Store, repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    """The JSON that becomes a `ModelInfo` or a `DatasetInfo`."""
    metadata = _metadata(store, commit.files)
    described = {
        "_id": repo.id,
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.sha,
        "createdAt": repo.created,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.tags(metadata, list(commit.files)),
        "cardData": metadata,
        "siblings": [_sibling(path, file, blobs=blobs) for path, file in sorted(commit.files.items())],
        "usedStorage": sum(file.size for file in commit.files.values()),
    }
    if repo.type == "model":
        config = _config(store, commit.files)
        described |= {
            "modelId": repo.id,
            "config": {name: config[name] for name in _SHOWN_CONFIG if name in config},
            "pipeline_tag": metadata.get("pipeline_tag"),
            "library_name": metadata.get("library_name"),
            "model-index": metadata.get("model-index"),
        }
    return described


def _metadata(store: Store, files: Files) -> dict[str, Any]:
    """The card's, or none: a commit made on the server may hold anything."""
    if CARD_FILE not in files:
        return {}
    try:
        return card.metadata(store.read(files[CARD_FILE]).decode())
    except ValueError:
        return {}


def _config(store: Store, files: Files) -> dict[str, Any]:
    if "config.json" not in files:
        return {}
    try:
        config = json.loads(store.read(files["config.json"]))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _sibling(path: str, file: File, *, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if blobs:
        sibling |= {"size": file.size, "blobId": file.oid}
        if file.lfs:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return sibling


def _entry(repo: Repo, commit: Commit, folders: dict[str, str], path: str, *, expand: bool) -> dict[str, Any]:
    """A file or a folder of a commit."""
    entry: dict[str, Any]
    if path in folders:
        entry = {"type": "directory", "oid": folders[path], "size": 0, "path": path}
    else:
        file = commit.files[path]
        entry = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    if expand:
        last = _last_change(repo, commit, path)
        entry["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
    return entry


def _last_change(repo: Repo, commit: Commit, path: str) -> Commit:
    """The commit that made a file or folder what it is."""

    def state(of: Commit) -> Files:
        return {name: file for name, file in of.files.items() if name == path or _is_within(name, path)}

    for last in repo.history(commit):
        if last.parent is None or state(repo.commits[last.parent]) != state(last):
            return last
    raise AssertionError("history ends with a commit that has no parent")


def _is_within(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")


def _discussion(repo: Repo, discussion: Discussion) -> dict[str, Any]:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "createdAt": discussion.created,
        "status": "open",
        "isPullRequest": discussion.is_pull_request,
        "repo": {"name": repo.id, "type": repo.type},
    }
