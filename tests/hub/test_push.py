"""What a push leaves on the Hub, what it leaves alone, and what it says when it cannot."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from support.factories import make_folder, make_report

from hfq.common.errors import ExportError, HubError, SourceError, UsageError
from hfq.common.names import PLOT_FILES
from hfq.hub.local import LocalHub
from hfq.publish import PushResult, push_folder, resolve_repo_id
from hfq.recipe import PushOptions, make_recipe
from hfq.report import plots
from hfq.runs.watch import Watcher

USER = "hfq-user"
COMMIT = r"/commit/"
ALWAYS = 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "out")


@pytest.fixture
def repo_id(request: pytest.FixtureRequest) -> str:
    """A repository of its own for each test; the Hub is one for all."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", request.node.name.removeprefix("test_"))
    return f"{USER}/{name[:90].strip('-')}"


@pytest.fixture(autouse=True)
def token_stays_secret(
    hub: LocalHub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[None]:
    yield
    output = capfd.readouterr()
    assert hub.token not in output.out + output.err + caplog.text


def push(folder: Path, repo_id: str | None, **changes: Any) -> PushResult:
    options = {
        "default_name": "model-int8",
        "token": None,
        "message": "Upload INT8",
    }
    chosen = {field.name: changes.pop(field.name) for field in fields(PushOptions) if field.name in changes}
    return push_folder(folder, repo_id=repo_id, options=PushOptions(**chosen), **{**options, **changes})


def refusal(folder: Path, repo_id: str | None, **changes: Any) -> str:
    """The message of a push that fails. It never shows the token."""
    with pytest.raises(HubError) as caught:
        push(folder, repo_id, **changes)
    message = str(caught.value)
    assert (changes.get("token") or "hf_") not in message
    return message


def exists(repo_id: str) -> bool:
    return HfApi().repo_exists(repo_id)


def commits_sent(hub: LocalHub) -> int:
    return sum(method == "POST" and COMMIT in path for method, path, _ in hub.requests)


def test_creates_the_repository_with_what_hfq_wrote_in_one_commit(hub: LocalHub, folder: Path, repo_id: str) -> None:
    strange = {"sub/notes.txt", ".cache/hidden", ".env", "predictions.json", "plots/mine.png"}
    for name in (*strange, "plots/accuracy_speed.png", "vocab.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    result = push(folder, repo_id)
    assert (result.created, result.changed) == (True, True)
    assert result.left == (".env", "plots/mine.png", "predictions.json", "sub/")
    assert result.url == f"{hub.url}/{repo_id}"
    found = hub.files(repo_id)
    del found[".gitattributes"]
    local = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert found == {name: path.read_bytes() for name, path in local.items() if name not in strange}
    assert {"plots/accuracy_speed.png", "vocab.txt"} < set(found)
    assert [commit.title for commit in hub.commits(repo_id)][:-1] == ["Upload INT8"]
    assert hub.commits(repo_id)[0].sha == result.commit


def test_same_content_again_makes_no_commit_and_sends_nothing(hub: LocalHub, folder: Path, repo_id: str) -> None:
    first = push(folder, repo_id)
    hub.reset()
    again = push(folder, repo_id)
    assert again == replace(first, created=False, changed=False)
    assert {method for method, path, _ in hub.requests if "validate-yaml" not in path} == {"GET"}


def test_a_change_is_one_more_commit_of_that_file_alone(hub: LocalHub, folder: Path, repo_id: str) -> None:
    push(folder, repo_id)
    hub.reset()
    (folder / "config.json").write_text('{"model_type": "BERT"}\n')
    result = push(folder, repo_id)
    assert (result.created, result.changed) == (False, True)
    assert commits_sent(hub) == 1
    assert not any(method == "PUT" for method, _, _ in hub.requests)
    assert hub.files(repo_id)["config.json"] == (folder / "config.json").read_bytes()


def test_name_defaults_to_the_users_own_namespace(hub: LocalHub, folder: Path) -> None:
    assert push(folder, None, default_name="bert-int8").url == f"{hub.url}/{USER}/bert-int8"
    assert push(folder, "other-int8").url == f"{hub.url}/{USER}/other-int8"
    assert resolve_repo_id(None, default_name="bert-int8", token=None) == f"{USER}/bert-int8"


def test_impossible_names_are_refused_before_any_request(hub: LocalHub, folder: Path) -> None:
    for name in ("a/b/c", "../up", "spaces in it", "me/x--y"):
        with pytest.raises(UsageError, match="cannot name a repository"):
            push(folder, name)
    assert hub.requests == []


def test_private(hub: LocalHub, folder: Path, repo_id: str) -> None:
    push(folder, repo_id, private=True)
    assert HfApi().model_info(repo_id).private
    assert not push(folder, repo_id, private=True).changed


def test_private_is_not_pushed_to_a_public_repository(hub: LocalHub, folder: Path, repo_id: str) -> None:
    hub.create_repo(repo_id)
    assert "public already" in refusal(folder, repo_id, private=True)
    assert len(hub.commits(repo_id)) == 1


def test_pull_request_leaves_main_alone_and_is_not_opened_twice(hub: LocalHub, folder: Path, repo_id: str) -> None:
    push(folder, repo_id)
    before = hub.commits(repo_id)
    (folder / "config.json").write_text("{}\n")
    result = push(folder, repo_id, create_pr=True)
    assert result.changed
    assert result.url == f"{hub.url}/{repo_id}/discussions/1"
    assert hub.commits(repo_id) == before
    assert hub.files(repo_id, "refs/pr/1")["config.json"] == b"{}\n"

    assert push(folder, repo_id, create_pr=True) == replace(result, changed=False)
    assert len(list(HfApi().get_repo_discussions(repo_id))) == 1


def test_pull_request_to_somebody_elses_repository(hub: LocalHub, folder: Path, repo_id: str) -> None:
    push(folder, repo_id)
    stranger = hub.add_user("stranger")
    (folder / "config.json").write_text("{}\n")
    message = refusal(folder, repo_id, token=stranger)
    assert "may not do this" in message and "--create-pr" in message
    assert push(folder, repo_id, token=stranger, create_pr=True).changed


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors", "onnx/model.onnx"])
def test_somebody_elses_weights_are_refused(
    hub: LocalHub, folder: Path, tmp_path: Path, repo_id: str, weights: str
) -> None:
    theirs = tmp_path / "theirs" / weights
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    hub.commit_folder(repo_id, tmp_path / "theirs")
    before = hub.commits(repo_id)
    for create_pr in (False, True):
        message = refusal(folder, repo_id, create_pr=create_pr)
        assert weights in message and "hfq did not write it" in message and "--to" in message
    assert hub.commits(repo_id) == before


def test_somebody_elses_card_is_not_overwritten(hub: LocalHub, folder: Path, tmp_path: Path, repo_id: str) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "README.md").write_text("mine\n")
    hub.commit_folder(repo_id, tmp_path / "theirs")
    assert "README.md" in refusal(folder, repo_id)
    assert hub.files(repo_id)["README.md"] == b"mine\n"


def test_an_empty_repository_is_filled(hub: LocalHub, folder: Path, repo_id: str) -> None:
    hub.create_repo(repo_id)
    result = push(folder, repo_id)
    assert (result.created, result.changed) == (False, True)


def test_stale_shards_go_and_other_files_stay(hub: LocalHub, folder: Path, tmp_path: Path, repo_id: str) -> None:
    index = "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"second")
    (folder / index).write_text("{}")
    push(folder, repo_id)
    extra = tmp_path / "extra"
    extra.mkdir()
    for name in ("adapter.safetensors", "notes.md"):
        (extra / name).write_text("kept")
    hub.commit_folder(repo_id, extra)
    hub.reset()

    push(make_folder(tmp_path / "small", weights=b"small"), repo_id)
    assert commits_sent(hub) == 1
    left = {name for name in hub.files(repo_id) if "safetensors" in name or name.endswith(".md")}
    assert left == {"model.safetensors", "adapter.safetensors", "notes.md", "README.md"}


def write_mine(folder: Path) -> Path:
    """A plot that somebody put beside ours on the Hub."""
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "mine.png").write_bytes(b"mine")
    return folder


def test_plots_go_with_the_card_and_stale_ones_leave_with_it(
    hub: LocalHub, folder: Path, tmp_path: Path, repo_id: str
) -> None:
    plots.write(make_report(), folder)
    push(folder, repo_id)
    hub.commit_folder(repo_id, write_mine(tmp_path / "extra"))
    assert {*PLOT_FILES, "plots/mine.png"} <= set(hub.files(repo_id))
    hub.reset()
    push(make_folder(tmp_path / "without"), repo_id)
    assert commits_sent(hub) == 1
    assert [name for name in hub.files(repo_id) if name.startswith("plots/")] == ["plots/mine.png"]


def test_a_strangers_file_is_not_taken_for_a_stale_plot(
    hub: LocalHub, folder: Path, tmp_path: Path, repo_id: str
) -> None:
    theirs = tmp_path / "theirs" / PLOT_FILES[0]
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    hub.commit_folder(repo_id, tmp_path / "theirs")
    push(folder, repo_id)
    assert hub.files(repo_id)[PLOT_FILES[0]] == b"theirs"


@pytest.mark.parametrize(
    ("status", "said", "advice"),
    [
        (401, "token is not valid", "hf auth login"),
        (403, "may not do this", "write access"),
        (404, "no such namespace or repository", "Check --to"),
        (409, "name is taken", "Push again"),
        (412, "somebody else pushed", "push again"),
        (413, "refuses the request", "push again"),
        (429, "no more requests", "Wait 7 seconds"),
        (500, "Hub itself failed", "push again later"),
        (503, "Hub itself failed", "push again later"),
    ],
)
def test_failed_commit_says_why_and_leaves_nothing(
    hub: LocalHub, folder: Path, repo_id: str, status: int, said: str, advice: str
) -> None:
    echo = json.dumps({"error": f"Bearer {hub.token} is no good"}).encode()
    hub.fail("POST", COMMIT, status, headers={"Retry-After": "7"}, body=echo, times=ALWAYS)
    message = refusal(folder, repo_id, token=hub.token)
    assert said in message and advice in message
    assert f"Pushing out to {repo_id} failed" in message and f"127.0.0.1 answered {status}" in message
    assert not exists(repo_id)


def test_failed_commit_leaves_an_existing_repository_as_it_was(hub: LocalHub, folder: Path, repo_id: str) -> None:
    push(folder, repo_id)
    before = hub.commits(repo_id)
    (folder / "model.safetensors").write_bytes(b"new")
    hub.fail("POST", COMMIT, 500, times=ALWAYS)
    refusal(folder, repo_id)
    assert hub.commits(repo_id) == before
    hub.reset()
    assert push(folder, repo_id).changed


def test_failed_upload_is_explained_too(hub: LocalHub, folder: Path, repo_id: str) -> None:
    (folder / "model.safetensors").write_bytes(b"never seen by this Hub")
    hub.fail("PUT", "/lfs/", 403)
    assert "may not do this" in refusal(folder, repo_id)
    assert not exists(repo_id)


def test_interruption_leaves_nothing(
    hub: LocalHub, folder: Path, repo_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        push(folder, repo_id)
    assert not exists(repo_id)


def test_repository_that_cannot_be_removed_again_is_named(hub: LocalHub, folder: Path, repo_id: str) -> None:
    hub.fail("POST", COMMIT, 413)
    hub.fail("DELETE", "/api/repos/delete", 403)
    message = refusal(folder, repo_id)
    assert "refuses the request" in message
    assert f"{hub.url}/{repo_id}, which this push created, could not be removed" in message
    assert push(folder, repo_id).changed


def test_somebody_pushes_in_the_meantime(
    hub: LocalHub, folder: Path, tmp_path: Path, repo_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder, repo_id)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.md").write_text("theirs")
    upload: Callable[..., None] = HfApi.preupload_lfs_files

    def upload_late(*args: Any, **kwargs: Any) -> None:
        hub.commit_folder(repo_id, tmp_path / "theirs")
        upload(*args, **kwargs)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", upload_late)
    (folder / "config.json").write_text("{}\n")
    assert "somebody else pushed to it in the meantime" in refusal(folder, repo_id)
    assert hub.files(repo_id)["config.json"] != b"{}\n"
    assert hub.commits(repo_id)[0].title == "Upload folder"


@pytest.mark.parametrize("name", ["with/namespace", None])
def test_bad_token(hub: LocalHub, folder: Path, name: str | None) -> None:
    message = refusal(folder, name, token="hf_notavalidtokenatall")
    assert "the token is not valid" in message and "hf auth login" in message


def test_no_token(hub: LocalHub, folder: Path, repo_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    message = refusal(folder, repo_id)
    assert "no token" in message and "hf auth login" in message and "--token" in message
    assert hub.requests == []


def test_foreign_namespace(hub: LocalHub, folder: Path) -> None:
    message = refusal(folder, "google/bert-int8")
    assert "may not do this" in message and 'namespace "google"' in message


def test_no_network(folder: Path, repo_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refusal(folder, repo_id)
    assert "http://127.0.0.1:9 cannot be reached" in message and "Check the network" in message


def test_offline_mode(folder: Path, repo_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(folder, repo_id)


def test_invalid_card_is_refused_before_anything_is_made(hub: LocalHub, folder: Path, repo_id: str) -> None:
    (folder / "README.md").write_text("---\nlanguage: Klingon!\n---\n# x\n")
    message = refusal(folder, repo_id)
    assert "README.md is not valid" in message and "language" in message and "{" not in message
    assert [path for _, path, _ in hub.requests] == ["/api/validate-yaml"]


def test_incomplete_folders_are_refused(hub: LocalHub, tmp_path: Path, repo_id: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no hfq\.json"):
        push(tmp_path / "empty", repo_id)
    for name in ("README.md", "model.safetensors"):
        folder = make_folder(tmp_path / f"without-{name}")
        (folder / name).unlink()
        with pytest.raises(ExportError, match=f"has no {name}"):
            push(folder, repo_id)
    assert hub.requests == []


def test_a_folder_that_holds_the_token_is_not_published(hub: LocalHub, tmp_path: Path, repo_id: str) -> None:
    folder = make_folder(tmp_path / "out", make_report(command="hfq quantize THERE"))
    report = folder / "hfq.json"  # hfq writes none there; an editor may
    report.write_text(report.read_text().replace("THERE", f"x --token {hub.token}"))
    with pytest.raises(ExportError, match=r"hfq\.json contains your token"):
        push(folder, repo_id)
    assert hub.requests == []


# Overwriting, branches, tags, organizations

THEIRS = {
    "README.md": b"theirs\n",
    "config.json": b'{"model_type": "gpt2"}\n',
    "pytorch_model.bin": b"theirs",
    "model-00001-of-00002.safetensors": b"theirs",
    "model.safetensors.index.json": b"{}",
    "adapter_config.json": b"{}",
    "vocab.txt": b"theirs",
    "notes.md": b"theirs",
    "onnx/model.onnx": b"theirs",
}


def somebody_elses(hub: LocalHub, repo_id: str, folder: Path) -> None:
    for name, content in THEIRS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    hub.commit_folder(repo_id, folder)


def test_force_replaces_another_model_in_one_commit_and_leaves_what_is_not_loaded(
    hub: LocalHub, folder: Path, tmp_path: Path, repo_id: str
) -> None:
    somebody_elses(hub, repo_id, tmp_path / "theirs")
    before = hub.commits(repo_id)
    assert "replace that model with --force" in refusal(folder, repo_id)
    assert push(folder, repo_id, force=True).changed
    ours = {path.name: path.read_bytes() for path in folder.iterdir()}
    kept = {name: THEIRS[name] for name in ("notes.md", "onnx/model.onnx")}
    found = hub.files(repo_id)
    assert found == {**ours, **kept, ".gitattributes": found[".gitattributes"]}
    assert hub.commits(repo_id)[1:] == before  # theirs are a commit away
    assert not push(folder, repo_id).changed


def test_force_takes_nothing_more_from_a_repository_that_hfq_wrote(
    hub: LocalHub, folder: Path, tmp_path: Path, repo_id: str
) -> None:
    push(folder, repo_id)
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "adapter_config.json").write_text("{}")
    hub.commit_folder(repo_id, tmp_path / "extra")
    assert not push(folder, repo_id, force=True).changed


def test_a_branch_is_made_and_main_stays(hub: LocalHub, folder: Path, repo_id: str) -> None:
    push(folder, repo_id)
    before = hub.commits(repo_id)
    (folder / "config.json").write_text("{}\n")
    assert push(folder, repo_id, branch="v2").changed
    assert not push(folder, repo_id, branch="v2").changed
    assert hub.commits(repo_id) == before
    assert hub.files(repo_id, "v2")["config.json"] == b"{}\n"
    assert len(hub.commits(repo_id, "v2")) == len(before) + 1


def test_a_branch_of_a_new_repository(hub: LocalHub, folder: Path, repo_id: str) -> None:
    assert push(folder, repo_id, branch="v2").created
    assert "model.safetensors" in hub.files(repo_id, "v2")
    assert set(hub.files(repo_id)) == {".gitattributes"}


def test_a_branch_that_was_made_for_a_push_that_fails_is_removed(hub: LocalHub, folder: Path, repo_id: str) -> None:
    push(folder, repo_id)
    (folder / "config.json").write_text("{}\n")
    hub.fail("POST", COMMIT, 413)
    refusal(folder, repo_id, branch="v2")
    assert [branch.name for branch in HfApi().list_repo_refs(repo_id).branches] == ["main"]


def test_a_tag_names_the_commit_and_is_never_moved(hub: LocalHub, folder: Path, repo_id: str) -> None:
    first = push(folder, repo_id, tag="v1")
    assert push(folder, repo_id, tag="v1") == replace(first, created=False, changed=False)
    assert push(folder, repo_id, tag="also").commit == first.commit
    (folder / "config.json").write_text("{}\n")
    message = refusal(folder, repo_id, tag="v1")
    assert f"has a tag v1 already, at {first.commit}" in message and "choose another --tag" in message
    assert hub.commits(repo_id)[0].sha == first.commit
    tags = {tag.name: tag.target_commit for tag in HfApi().list_repo_refs(repo_id).tags}
    assert tags == {"v1": first.commit, "also": first.commit}


def test_a_tag_that_fails_says_that_the_model_is_published(hub: LocalHub, folder: Path, repo_id: str) -> None:
    hub.fail("POST", "/tag/", 403)
    message = refusal(folder, repo_id, tag="v1")
    commit = hub.commits(repo_id)[0]
    assert commit.title == "Upload INT8"
    assert f"{repo_id} holds out at {commit.sha}, but setting tag v1 failed: the token may not do this" in message
    assert not push(folder, repo_id, tag="v1").changed
    assert [tag.name for tag in HfApi().list_repo_refs(repo_id).tags] == ["v1"]


def test_an_organization_of_the_user(hub: LocalHub, folder: Path) -> None:
    member = hub.add_user("member", orgs=["acme"])
    assert push(folder, "acme/bert-int8", token=member, private=True).created
    assert HfApi(token=member).model_info("acme/bert-int8").private


def test_a_gated_repository_of_ones_own(hub: LocalHub, folder: Path, repo_id: str) -> None:
    hub.create_repo(repo_id, gated=True)
    assert push(folder, repo_id).changed
    assert not push(folder, repo_id).changed


@pytest.mark.parametrize("key", ["branch", "tag"])
def test_a_pull_request_has_neither_branch_nor_tag(key: str) -> None:
    with pytest.raises(UsageError, match="leave out 'branch' and 'tag', or 'create_pr'"):
        make_recipe({"checkpoint": "x", "create_pr": True, key: "v1"})


def test_a_tag_is_refused_where_every_revision_is_published(tmp_path: Path) -> None:
    (tmp_path / "tagged.yaml").write_text("checkpoint: me/x\ntag: v1\n")
    (outcome,) = Watcher(tmp_path, recipes=tmp_path).round()
    assert (outcome.state, outcome.exit_code) == ("failed", 2)
    assert "the tag 'v1', which can name one commit only" in outcome.message


@pytest.mark.parametrize("status", [401, 429, 503])
def test_a_card_that_cannot_be_checked_is_not_published(hub: LocalHub, folder: Path, repo_id: str, status: int) -> None:
    hub.fail("POST", "/api/validate-yaml", status, times=ALWAYS)
    assert "Validating the model card failed" in refusal(folder, repo_id)
    assert not exists(repo_id)
