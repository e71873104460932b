"""What a repository on the Hub holds, and whether hfq may change it. Hubs differ in what they can be asked."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import Discussion, HfApi, RepoFile, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

from ..common.errors import HubError
from ..common.names import PLOT_FILES, REPORT_FILE
from .download import is_same, list_files

OUR_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
OURS = re.compile(rf"{OUR_WEIGHTS.pattern}|{'|'.join(map(re.escape, PLOT_FILES))}")
_ANY_WEIGHTS = re.compile(
    r".+\.(safetensors|bin|pt|pth|ckpt|pkl|onnx|gguf|h5|keras|msgpack|ot|tflite|npz|pb)", re.IGNORECASE
)
_MISSING_ENDPOINT = (404, 405, 501)


@dataclass(frozen=True)
class Remote:
    """A repository as it is at commit `head`."""

    id: str
    head: str | None
    private: bool
    files: dict[str, RepoFile]


def read_remote(api: HfApi, repo_id: str) -> Remote | None:
    """The repository's main branch; None where there is no such repository."""
    try:
        info = api.model_info(repo_id)
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            return None
        raise  # 401 and 403 come as "not found" too, but mean the token
    files = list_files(api, info.id, revision=info.sha) if info.sha else {}
    return Remote(info.id, head=info.sha, private=bool(info.private), files=files)


def read_branch(api: HfApi, remote: Remote, revision: str) -> Remote | None:
    """The same repository at another branch, or at a pull request; None where there is no such branch."""
    try:
        info = api.model_info(remote.id, revision=revision)
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            return None
        raise
    return replace(remote, head=info.sha, files=list_files(api, remote.id, revision=info.sha))


def pull_requests(api: HfApi, repo_id: str) -> list[Discussion]:
    try:
        return list(api.get_repo_discussions(repo_id, discussion_type="pull_request"))
    except HfHubHTTPError as error:
        if error.response.status_code in _MISSING_ENDPOINT:  # not every Hub has discussions
            return []
        raise


def tags(api: HfApi, repo_id: str) -> dict[str, str]:
    """The commits of tags; none where the Hub does not list them."""
    try:
        return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}
    except HfHubHTTPError as error:
        if error.response.status_code in _MISSING_ENDPOINT:
            return {}
        raise


def is_there(api: HfApi, remote: Remote, name: str, path: Path) -> bool:
    """Whether the repository holds this file as it is here. A Hub whose lists leave LFS out is asked for the file."""
    listed = remote.files.get(name)
    if is_same(path, listed):
        return True
    if listed is None or listed.lfs or listed.size != path.stat().st_size:
        return False
    url = hf_hub_url(remote.id, name, revision=remote.head, endpoint=api.endpoint)
    return is_same(path, listed, etag=get_hf_file_metadata(url, token=api.token, endpoint=api.endpoint).etag)


def refuse_foreign(remote: Remote, changed: Iterable[str] = (), *, force: bool = False) -> None:
    """Only a repository with hfq's report in it is hfq's to change; others it may add to, weights aside."""
    if REPORT_FILE in remote.files or force:
        return
    weights = [name for name in remote.files if _ANY_WEIGHTS.fullmatch(name)]
    overwritten = [name for name in changed if name in remote.files]
    if names := weights or overwritten:
        shown = ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")
        raise HubError(
            f"{remote.id} holds {shown} but no {REPORT_FILE}: hfq did not write it and will not change it. "
            "Push to another repository with --to, or replace that model with --force."
        )


def refuse_public(remote: Remote, *, private: bool) -> None:
    if private and not remote.private:
        raise HubError(
            f"{remote.id} is public already, so --private cannot keep this model from view. Make it private "
            "in its settings, or push to another repository with --to."
        )
