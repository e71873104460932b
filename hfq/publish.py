"""Publishing a folder that hfq exported: one commit or none, and nothing of other people's touched.

The card's text is made in `hfq.report.card`; the HTTP is `huggingface_hub`'s, and how often it is tried `hfq.hub.client`'s.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import Discussion, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from .common.errors import ExportError, HubError, UsageError
from .common.names import CARD_FILE, REPORT_FILE
from .common.reading import read_json
from .common.redact import remember
from .common.ui import Reporter
from .common.version import __version__
from .hub.client import be_patient, proxies_changed
from .hub.commit import MAIN, Push, PushResult, push_to, push_to_new, set_tag
from .hub.download import fetch_file
from .hub.errors import card_messages, explained
from .hub.local import LocalHub
from .hub.repository import (
    OUR_WEIGHTS,
    Remote,
    pull_requests,
    read_branch,
    read_remote,
    refuse_foreign,
    refuse_public,
)
from .output import split_export
from .recipe import PushOptions, Recipe
from .report.report import read_report
from .source.trust import check_links

COMMIT_TITLE = "INT8 export by hfq"


def push_folder(
    folder: Path,
    *,
    repo_id: str | None,
    default_name: str,
    token: str | None,
    message: str,
    options: PushOptions | None = None,
) -> PushResult:
    """Publish an exported folder in one commit; in none, if the repository holds the same already.

    The repository is created if there is none, and removed again if the commit then fails. Weight files and plots
    that an earlier push left there and this folder no longer has go in the same commit. Other files stay. Of the folder
    goes what hfq wrote and what belongs to a checkpoint (`hfq.contents`), nothing else.

    Args:
        repo_id: `user/name`, or a name among the user's own; None for `default_name` there.
        token: None for the one `hf auth login` or `HF_TOKEN` left.
        message: the commit's title.

    Raises:
        HubError: the Hub or the repository's content does not allow it. Nothing was published, unless the message says
            that only the tag is missing.
        ExportError, SourceError: `folder` is not a complete export.
    """
    be_patient()
    token = _require_token(token)
    files, left = _local_files(folder, token=token)
    target = resolve_repo_id(repo_id, default_name=default_name, token=token)
    validate_card(files[CARD_FILE].read_text(encoding="utf-8"))

    options = options or PushOptions()
    options = replace(options, branch=None if options.branch == MAIN else options.branch)
    api = HfApi(token=token, library_name="hfq")
    push = Push(api, files, message, options)
    with explained(f"Pushing {folder.name} to {target}"):
        remote = read_remote(api, target)
        result = push_to_new(push, target) if remote is None else push_to(push, remote)
    if options.tag:
        with explained(f"{result.url} holds {folder.name} at {result.commit}, but setting tag {options.tag}"):
            set_tag(api, target, options.tag, commit=result.commit)
    return replace(result, left=left)


def publish(folder: Path, recipe: Recipe, *, token: str | None, ui: Reporter) -> str:
    """Push a folder as its recipe says, and say so; return what was said. Raises what `push_folder` does."""
    ui.stage("Publish")
    pushed = push_folder(
        folder,
        repo_id=recipe.to,
        default_name=folder.resolve().name,
        token=token,
        message=f"{COMMIT_TITLE} {__version__}",
        options=recipe.push_options,
    )
    said = f"{pushed.url} at {pushed.commit}" if pushed.changed else f"{pushed.url} holds this already: no commit"
    ui.note(said)
    ui.left_behind(pushed.left, where="published")
    return said


def find_target(to: str | None, name: str, *, token: str | None) -> str:
    """The repository that a push of the checkpoint `name` goes to, after asking the Hub whose token this is.

    Raises what `resolve_repo_id` does.
    """
    _check_name(to or name)
    resolve_repo_id(None, default_name="any", token=token)  # asks whatever `to` is
    return resolve_repo_id(to, default_name=f"{name}-int8", token=token)


@contextmanager
def hub_session(*, local: bool) -> Iterator[str | None]:
    """For the length of the block, a Hub on loopback with its token; or the configured Hub, and None."""
    if not local:
        yield None
        return
    configured = constants.ENDPOINT, constants.HF_HUB_DISABLE_XET
    with LocalHub() as server, proxies_changed(server.direct()):
        constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = server.url, True
        try:
            yield server.token
        finally:
            constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = configured


def published_revisions(repo_id: str, options: PushOptions, *, token: str | None) -> set[str]:
    """Revisions of float checkpoints whose export is in a repository already, by its `hfq.json`.

    One or none; and for pushes that `create_pr`, those of hfq's pull requests too, open or turned down.

    Raises:
        HubError: the Hub cannot be asked, or a push there would be refused whatever is in it.
    """
    be_patient()
    remember(token)
    api = HfApi(token=token, library_name="hfq")
    with explained(f"Reading {REPORT_FILE} of {repo_id}"):
        remote = read_remote(api, repo_id)
        if remote is None:
            return set()
        refuse_public(remote, private=options.private)
        there = remote if options.branch in (None, MAIN) else read_branch(api, remote, str(options.branch))
        if not options.force:
            refuse_foreign(there or remote)
        holders = [there] if there and any(map(OUR_WEIGHTS.fullmatch, there.files)) else []
        for request in pull_requests(api, remote.id) if options.create_pr else []:
            if _is_proposal(request) and (proposed := read_branch(api, remote, str(request.git_reference))):
                holders.append(proposed)
        return {found for holder in holders if (found := _recorded_revision(holder, token=token))}


def _is_proposal(request: Discussion) -> bool:
    return request.title.startswith(COMMIT_TITLE) and request.status != "merged"


def _recorded_revision(remote: Remote, *, token: str | None) -> str | None:
    """The checkpoint's revision in a published report; None where there is no report of a checkpoint's export."""
    if REPORT_FILE not in remote.files or remote.head is None:
        return None
    path = fetch_file(remote.id, remote.files[REPORT_FILE], revision=remote.head, token=token)
    try:
        return str(read_json(path)["checkpoint"]["revision"])
    except (ValueError, KeyError, TypeError):
        return None


def resolve_repo_id(repo_id: str | None, *, default_name: str, token: str | None) -> str:
    """The full `user/name` that a push goes to; asks the Hub whose token it is where that is needed.

    Raises:
        UsageError: that is no possible name.
        HubError: no token, or a bad one.
    """
    name = repo_id or default_name
    _check_name(name)
    if "/" in name:
        return name
    be_patient()
    token = _require_token(token)
    with explained("Asking the Hub whose token this is"):
        return f"{HfApi(token=token).whoami()['name']}/{name}"


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"{repo_id!r} cannot name a repository. Expected 'name' or 'user/name' of up to 96 letters, digits "
            "and single '-', '_' or '.' each."
        ) from error


def validate_card(text: str) -> None:
    """Ask the Hub whether it would accept this README.md. One that cannot check cards accepts all.

    Raises:
        HubError: it would not, or cannot be asked.
    """
    be_patient()
    with explained("Validating the model card"):
        try:
            ModelCard(text).validate()
        except (ValueError, YAMLError) as error:
            raise HubError(
                f"The metadata of {CARD_FILE} is not valid: {card_messages(str(error))}. Nothing was pushed; "
                "mend the file and push again."
            ) from error


def _require_token(token: str | None) -> str:
    remember(token)
    token = token or get_token()
    if not token:
        raise HubError(
            f"There is no token for {constants.ENDPOINT}. Run `hf auth login`, set HF_TOKEN or pass --token; "
            "it needs write access."
        )
    return token


def _local_files(folder: Path, *, token: str) -> tuple[dict[str, Path], tuple[str, ...]]:
    """What to publish, by path in the repository, and the names of what stays here.

    A recorded command line can hold the token it was run with, and a public repository is no place for that.
    """
    report = read_report(folder)
    names, left = split_export(folder, report)
    files = {name: folder / name for name in names}
    check_links((path for path in sorted(folder.rglob("[!.]*")) if path.is_file()), folder=folder)
    if not any(OUR_WEIGHTS.fullmatch(name) for name in files):
        raise ExportError(f"{folder} has no model.safetensors: it is no complete export. Quantize again.")
    if CARD_FILE not in files:
        raise ExportError(f"{folder} has no {CARD_FILE}, and a model is not published without its card.")
    for name, path in files.items():
        if not name.endswith(".safetensors") and token.encode() in path.read_bytes():
            raise ExportError(f"{path} contains your token. Take it out before you publish the folder.")
    return files, tuple(left)
