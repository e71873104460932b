"""The local Hub, by what the real clients make of it."""

import io
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from hfq.common.errors import HubError
from hfq.hub.client import be_patient
from hfq.hub.local import LocalHub

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-classification
base_model: org/base
base_model_relation: quantized
tags: [int8]
datasets: [nyu-mll/glue]
model-index:
- name: tiny
  results:
  - task: {type: text-classification}
    dataset: {name: GLUE MRPC, type: nyu-mll/glue, config: mrpc, split: validation}
    metrics: [{type: accuracy, value: 0.82}]
---
# Tiny
"""

_numbers = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def stock_client() -> None:
    """huggingface_hub's own client: hfq's, which other tests have set, would ask again where a fault is to be seen."""
    set_client_factory(default_client_factory)
    be_patient.cache_clear()


@pytest.fixture
def api() -> HfApi:
    return HfApi()


@pytest.fixture
def repo(hub: LocalHub, api: HfApi) -> str:
    """A new repository with a name of its own, because all tests share one hub."""
    return api.create_repo(f"repo-{next(_numbers)}").repo_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model to push: a card, a small file, weights and a folder."""
    path = tmp_path / "model"
    (path / "extra").mkdir(parents=True)
    (path / "README.md").write_text(CARD)
    (path / "config.json").write_text('{"model_type": "bert", "vocab_size": 8}')
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (path / "extra" / "notes.txt").write_text("n")
    return path


def methods(hub: LocalHub, path: str) -> list[str]:
    """What was asked of paths that contain `path`."""
    return [method for method, asked, _ in hub.requests if path in asked]


def commit_file(api: HfApi, repo: str, path: str = "a.txt", content: bytes = b"a", **options: object) -> str:
    operation = CommitOperationAdd(path, content)
    return api.create_commit(repo, [operation], commit_message=f"Add {path}", **options).oid


# Accounts


def test_a_token_says_who_the_user_is(hub, api):
    token = hub.add_user("jane", orgs=["acme"])
    assert api.whoami()["name"] == "hfq-user"
    assert [org["name"] for org in api.whoami(token=token)["orgs"]] == ["acme"]


def test_an_unknown_token_is_refused_everywhere(hub, api, repo):
    for ask in (api.whoami, lambda token: api.model_info(repo, token=token)):
        with pytest.raises(HfHubHTTPError) as caught:
            ask(token="hf_unknown")
        assert caught.value.response.status_code == 401
        assert not isinstance(caught.value, RepositoryNotFoundError)


# Repositories


def test_create_and_delete(hub, api):
    url = api.create_repo("created", private=True)
    assert url == f"{hub.url}/hfq-user/created"
    assert api.model_info("hfq-user/created").private
    assert api.list_repo_files("hfq-user/created") == [".gitattributes"]
    api.delete_repo("hfq-user/created")
    assert not api.repo_exists("hfq-user/created")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("hfq-user/created")


def test_create_again(api, repo):
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(repo)
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    dataset = api.create_repo(repo, repo_type="dataset")
    assert (dataset.repo_id, dataset.repo_type) == (repo, "dataset")


@pytest.mark.parametrize("name", ["a--b", "..", "-a"])
def test_names_that_the_hub_does_not_take(api, name):
    response = get_session().post(
        f"{api.endpoint}/api/repos/create", json={"name": name}, headers=api._build_hf_headers()
    )
    assert response.status_code == 400


def test_namespaces(hub, api):
    member = hub.add_user("member", orgs=["acme"])
    assert api.create_repo("acme/model", token=member).repo_id == "acme/model"
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("acme/other")
    assert caught.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("hfq-user/other", token=False)
    assert caught.value.response.status_code == 401


# Commits


def test_a_folder_is_one_commit(hub, api, repo, folder):
    commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload")
    first, *rest = hub.commits(repo)
    assert (first.sha, first.title, first.parent) == (commit.oid, "Upload", rest[0].sha)
    assert [entry.title for entry in api.list_repo_commits(repo)] == ["Upload", "initial commit"]
    stored = hub.files(repo)
    assert stored.pop(".gitattributes")
    assert stored == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_names_are_those_of_git(hub, api, repo, folder, tmp_path):
    api.upload_folder(repo_id=repo, folder_path=folder)
    entries = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True)}

    def git(*arguments: str, stdin: bytes = b"") -> str:
        run = subprocess.run(["git", *arguments], cwd=tmp_path, input=stdin, capture_output=True, check=True)
        return run.stdout.decode().strip()

    git("init", "-q")
    config = (folder / "config.json").read_bytes()
    assert entries["config.json"].blob_id == git("hash-object", "--stdin", stdin=config)
    notes = git("hash-object", "-w", "--stdin", stdin=b"n")
    assert entries["extra"].tree_id == git("mktree", stdin=f"100644 blob {notes}\tnotes.txt\n".encode())


def test_large_files_and_weights_go_to_lfs(api, repo, folder):
    (folder / "large.txt").write_bytes(b"x" * (10 * 2**20 + 1))
    api.upload_folder(repo_id=repo, folder_path=folder)
    in_lfs = {entry.path for entry in api.list_repo_tree(repo, recursive=True) if getattr(entry, "lfs", None)}
    assert in_lfs == {"large.txt", "model.safetensors"}


def test_the_same_again_is_no_commit(hub, api, repo, folder):
    before = api.upload_folder(repo_id=repo, folder_path=folder)
    hub.reset()
    assert api.upload_folder(repo_id=repo, folder_path=folder).oid == before.oid
    assert not methods(hub, "/commit/")
    assert "PUT" not in methods(hub, "/lfs/")


def test_only_what_changed_is_sent(hub, api, repo, folder):
    api.upload_folder(repo_id=repo, folder_path=folder)
    (folder / "config.json").write_text("{}")
    hub.reset()
    api.upload_folder(repo_id=repo, folder_path=folder)
    new, old, _ = hub.commits(repo)
    assert [path for path in new.files if new.files[path] != old.files.get(path)] == ["config.json"]
    assert "PUT" not in methods(hub, "/lfs/")


def test_a_commit_of_what_is_there_returns_the_head(hub, api, repo):
    head = commit_file(api, repo)
    lines = [
        {"key": "header", "value": {"summary": "Nothing new"}},
        {"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}},
    ]
    response = get_session().post(
        f"{hub.url}/api/models/{repo}/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers=api._build_hf_headers(),
    )
    assert response.json()["commitOid"] == head
    assert len(hub.commits(repo)) == 2


def test_an_object_that_is_stored_is_not_sent_twice(hub, api, repo, folder):
    api.upload_folder(repo_id=repo, folder_path=folder)
    other = api.create_repo(f"{repo}-2").repo_id
    hub.reset()
    api.upload_folder(repo_id=other, folder_path=folder)
    assert methods(hub, "/lfs/objects/batch") == ["POST"]
    assert "PUT" not in methods(hub, "/lfs/")
    assert hub.files(other) == hub.files(repo)


@pytest.mark.parametrize("sent", [b"other", b"longer than promised"])
def test_an_object_must_be_what_was_promised(hub, api, repo, sent):
    oid = "ab" * 32
    batch = get_session().post(
        f"{hub.url}/{repo}.git/info/lfs/objects/batch",
        json={"operation": "upload", "objects": [{"oid": oid, "size": 5}], "ref": {"name": "main"}},
        headers=api._build_hf_headers(),
    )
    href = batch.json()["objects"][0]["actions"]["upload"]["href"]
    assert get_session().put(href, content=sent).status_code == 400
    assert get_session().put(href.replace("size=5", "size=6"), content=sent).status_code == 403
    operation = CommitOperationAdd("model.bin", b"hello")
    operation._upload_mode, operation._is_uploaded = "lfs", True
    operation.upload_info.sha256 = bytes.fromhex(oid)
    with pytest.raises(BadRequestError, match="does not exist"):
        api.create_commit(repo, [operation], commit_message="A pointer to nothing")


def test_a_push_on_top_of_somebody_elses_is_refused(hub, api, repo):
    parent = api.model_info(repo).sha
    theirs = commit_file(api, repo, "theirs.txt", parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        commit_file(api, repo, "ours.txt", parent_commit=parent)
    assert caught.value.response.status_code == 412
    assert hub.commits(repo)[0].sha == theirs


def test_of_pushes_at_the_same_time_one_wins(hub, api, repo):
    parent = api.model_info(repo).sha

    def push(number: int) -> int:
        try:
            commit_file(api, repo, f"{number}.txt", parent_commit=parent)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(push, range(8))) == [200] + [412] * 7
    assert len(hub.commits(repo)) == 2


def test_a_commit_that_fails_changes_nothing(hub, api, repo):
    head = commit_file(api, repo)
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.create_commit(
            repo,
            [CommitOperationAdd("b.txt", b"b"), CommitOperationDelete("missing")],
            commit_message="Mixed",
        )
    assert hub.commits(repo)[0].sha == head
    assert "b.txt" not in hub.files(repo)


def test_deletions(hub, api, repo, folder):
    api.upload_folder(repo_id=repo, folder_path=folder)
    deletions = [CommitOperationDelete("config.json"), CommitOperationDelete("extra/")]
    api.create_commit(repo, deletions, commit_message="Clean up")
    assert set(hub.files(repo)) == {".gitattributes", "README.md", "model.safetensors"}


def test_paths_cannot_leave_the_repository(hub, api, repo):
    operation = CommitOperationAdd("a.txt", b"a")
    operation.path_in_repo = "../../a.txt"
    with pytest.raises(BadRequestError, match="Invalid path"):
        api.create_commit(repo, [operation], commit_message="Escape")


def test_who_may_commit(hub, api, repo):
    other = hub.add_user("visitor")
    with pytest.raises(HfHubHTTPError) as caught:
        commit_file(api, repo, token=other)
    assert caught.value.response.status_code == 403
    with pytest.raises(RepositoryNotFoundError) as caught:
        commit_file(api, repo, token=False)
    assert caught.value.response.status_code == 401
    assert len(hub.commits(repo)) == 1


def test_a_pull_request_leaves_main_alone(hub, api, repo):
    token = hub.add_user("contributor")
    operations = [CommitOperationAdd("b.txt", b"b"), CommitOperationAdd("b.bin", b"weights")]
    commit = api.create_commit(repo, operations, commit_message="Offer", create_pr=True, token=token)
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert set(hub.files(repo, "refs/pr/1")) == {".gitattributes", "b.txt", "b.bin"}
    assert set(hub.files(repo)) == {".gitattributes"}
    assert [(pr.title, pr.author) for pr in api.get_repo_discussions(repo)] == [("Offer", "contributor")]
    assert [ref.ref for ref in api.list_repo_refs(repo, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    commit_file(api, repo, "c.txt", revision="refs/pr/1")
    assert "c.txt" in hub.files(repo, "refs/pr/1")


def test_a_pull_request_can_be_opened_first(api, repo):
    opened = api.create_pull_request(repo, title="Draft")
    commit_file(api, repo, revision=opened.git_reference)
    assert "a.txt" in api.list_repo_files(repo, revision="refs/pr/1")


def test_branches_and_tags(api, repo):
    start = api.model_info(repo).sha
    api.create_branch(repo, branch="dev")
    head = commit_file(api, repo, revision="dev")
    api.create_tag(repo, tag="v1", revision="dev")
    refs = api.list_repo_refs(repo)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": start, "dev": head}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": head}
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(repo, branch="dev")
    api.delete_branch(repo, branch="dev")
    assert api.model_info(repo, revision="v1").sha == head
    with pytest.raises(HfHubHTTPError) as caught:
        api.delete_branch(repo, branch="main")
    assert caught.value.response.status_code == 403
    api.delete_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="v1")


# Reading


def test_model_info(api, repo, folder):
    sha = api.upload_folder(repo_id=repo, folder_path=folder).oid
    info = api.model_info(repo, files_metadata=True)
    assert (info.id, info.author, info.sha, info.private, info.gated) == (repo, "hfq-user", sha, False, False)
    assert info.pipeline_tag == "text-classification"
    assert info.config == {"model_type": "bert"}
    assert info.card_data.base_model == "org/base"
    assert info.card_data.eval_results[0].metric_value == 0.82
    assert {"int8", "license:apache-2.0", "base_model:quantized:org/base", "safetensors"} <= set(info.tags)
    weights = next(file for file in info.siblings if file.rfilename == "model.safetensors")
    assert (weights.size, weights.lfs.size) == (256000, 256000)
    assert api.model_info(repo, expand=["gated"]).sha is None


def test_listing(api, repo, folder):
    sha = api.upload_folder(repo_id=repo, folder_path=folder).oid
    top = [entry.path for entry in api.list_repo_tree(repo)]
    assert top == ["extra", ".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert [entry.path for entry in api.list_repo_tree(repo, "extra")] == ["extra/notes.txt"]
    attributes, notes, extra = api.get_paths_info(
        repo, [".gitattributes", "extra/notes.txt", "extra", "missing"], expand=True
    )
    assert (attributes.last_commit.title, notes.last_commit.oid) == ("initial commit", sha)
    assert extra.path == "extra"
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(repo, "missing"))


def test_download(api, repo, folder, tmp_path):
    sha = api.upload_folder(repo_id=repo, folder_path=folder).oid
    snapshot = Path(snapshot_download(repo, cache_dir=tmp_path / "cache"))
    assert snapshot.name == sha
    assert (snapshot / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (snapshot / "extra" / "notes.txt").read_text() == "n"


def test_metadata_of_files(hub, api, repo, folder):
    sha = api.upload_folder(repo_id=repo, folder_path=folder).oid
    entries = {entry.path: entry for entry in api.list_repo_tree(repo)}
    config = get_hf_file_metadata(hf_hub_url(repo, "config.json"))
    assert (config.commit_hash, config.etag, config.size) == (sha, entries["config.json"].blob_id, 39)
    weights = get_hf_file_metadata(hf_hub_url(repo, "model.safetensors"))
    assert (weights.etag, weights.size) == (entries["model.safetensors"].lfs.sha256, 256000)
    assert weights.xet_file_data is None


@pytest.mark.parametrize(
    ("wanted", "status", "received"),
    [
        ("bytes=0-3", 206, b"0123"),
        ("bytes=6-", 206, b"6789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=8-99", 206, b"89"),
        ("bytes=10-", 416, b""),
        ("lines=1-2", 200, b"0123456789"),
    ],
)
def test_ranges(hub, api, repo, wanted, status, received):
    commit_file(api, repo, "digits", b"0123456789")
    response = get_session().get(hf_hub_url(repo, "digits"), headers={"Range": wanted})
    assert (response.status_code, response.content) == (status, received)


def test_the_file_system_reads_the_middle_of_a_file(api, repo):
    commit_file(api, repo, "numbers.bin", bytes(range(256)))
    with HfFileSystem().open(f"{repo}/numbers.bin", block_size=16) as file:
        file.seek(100)
        assert file.read(3) == bytes([100, 101, 102])


def test_the_kinds_of_not_found(api, repo):
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("hfq-user/missing", "a.txt")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("gpt2")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo, "a.txt", revision="missing")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(repo, "a.txt")
    response = get_session().get(f"{api.endpoint}/api/no-such-thing")
    assert (response.status_code, list(response.json())) == (404, ["error"])


def test_a_private_repository_does_not_exist_for_others(hub, api):
    hub.create_repo("owner/private", private=True)
    owner, other = hub.add_user("owner"), hub.add_user("other")
    assert api.model_info("owner/private", token=owner).private
    for token, status in ((other, 404), (False, 401)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.model_info("owner/private", token=token)
        assert caught.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("owner/private", ".gitattributes", token=token)
        assert not api.repo_exists("owner/private", token=token)


def test_a_gated_repository_shows_itself_but_not_its_files(hub, api):
    hub.create_repo("meta/gated", gated=True)
    assert api.model_info("meta/gated").gated == "auto"
    for token, status in ((None, 403), (False, 401)):
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download("meta/gated", ".gitattributes", token=token)
        assert caught.value.response.status_code == status
    assert hf_hub_download("meta/gated", ".gitattributes", token=hub.add_user("meta"))


# Cards


def test_a_good_card(hub):
    ModelCard(CARD).validate()


def test_a_card_without_metadata_is_a_warning(api, repo):
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit_file(api, repo, "README.md", b"# Title")


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("license: apache-2.0", "license: {id: mit}", '"license" must be an array'),
        ("language: en", "language: English", '"language[0]" is not valid'),
        ("language: en", "language: [en", "YAML Metadata Error"),
        ("base_model: org/base", "base_model: 7", '"base_model" must be an array'),
        ("base_model: org/base", "base_model: [a/b/c]", '"base_model[0]" is not valid'),
        ("tion: quantized", "tion: shrunk", '"base_model_relation" Input should be'),
        ("pipeline_tag: text-classification", "pipeline_tag: guessing", '"pipeline_tag" must be one of'),
        ("tags: [int8]", "tags: [8]", '"tags[0]" must be a string'),
        ("- name: tiny", "- title: tiny", '"model-index[0].name" is required'),
        ("task: {type", "task: {kind", '"model-index[0].results[0].task.type" is required'),
        ("config: mrpc", "config: 1", '"model-index[0].results[0].dataset.config" must be a string'),
        ("value: 0.82", "value: null", '"model-index[0].results[0].metrics[0].value" is required'),
        ("metrics: [{", "metric: [{", '"model-index[0].results[0].metrics" is required'),
    ],
)
def test_a_bad_card(hub, good, bad, message):
    assert good in CARD
    response = get_session().post(
        f"{hub.url}/api/validate-yaml", json={"content": CARD.replace(good, bad), "repoType": "model"}
    )
    assert response.status_code == 400
    assert any(message in error["message"] for error in response.json()["errors"])


def test_metadata_must_be_a_mapping(api, repo):
    with pytest.raises(ValueError, match="must be a mapping"):
        commit_file(api, repo, "README.md", b"---\n- a\n---\n")


def test_a_bad_card_is_not_committed(hub, api, repo):
    with pytest.raises(ValueError, match="license"):
        commit_file(api, repo, "README.md", b"---\nlicense: 1\n---\n")
    assert len(hub.commits(repo)) == 1


# Faults


def test_an_injected_status_happens_as_often_as_asked(hub, api, repo):
    hub.fail("POST", "/commit/main", 503, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="Injected fault"):
            commit_file(api, repo)
    assert len(hub.commits(repo)) == 1
    commit_file(api, repo)
    assert [status for _, path, status in hub.requests if "/commit/" in path] == [503, 503, 200]


def test_the_client_tries_again_after_a_503(hub, api, repo):
    hub.fail("PUT", "/lfs/", 503, headers={"Retry-After": "0"})
    commit_file(api, repo, "weights.bin", b"some weights")
    assert methods(hub, "size=12") == ["PUT", "PUT"]
    assert hub.files(repo)["weights.bin"] == b"some weights"


def test_a_download_that_is_cut_off_is_resumed(hub, api, repo):
    content = bytes(range(256)) * 41 * 1024
    commit_file(api, repo, "model.safetensors", content)
    hub.fail("GET", "/resolve/.*/model.safetensors", cut_after=constants.DOWNLOAD_CHUNK_SIZE + 1000)
    assert Path(hf_hub_download(repo, "model.safetensors")).read_bytes() == content
    assert [s for method, path, s in hub.requests if method == "GET" and "/resolve/" in path] == [200, 206]


def test_a_commit_whose_answer_is_lost_has_happened(hub, api, repo):
    hub.fail("POST", "/commit/", cut_after=5)
    with pytest.raises(HTTPError):
        commit_file(api, repo)
    assert "a.txt" in hub.files(repo)


def test_a_fault_can_say_what_it_likes(hub, api):
    hub.fail("GET", "/api/whoami-v2", 429, headers={"X-Error-Message": "Slow down"}, body=b"{}")
    with pytest.raises(HfHubHTTPError) as caught:
        api.whoami()
    assert caught.value.response.headers["X-Error-Message"] == "Slow down"


# The libraries on top


def test_load_dataset(hub, tmp_path):
    from datasets import load_dataset

    (tmp_path / "pairs").mkdir()
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "test.csv").write_text("text,label\nc,1\n")
    (tmp_path / "pairs" / "train.csv").write_text("left,right\na,b\n")
    hub.commit_folder("org/plain", tmp_path, repo_type="dataset")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: single\n  default: true\n  data_files:\n"
        "  - {split: train, path: train.csv}\n  - {split: held_out, path: test.csv}\n"
        "- config_name: pairs\n  data_files: pairs/*.csv\n---\n"
    )
    sha = hub.commit_folder("org/configured", tmp_path, repo_type="dataset")

    assert load_dataset("org/plain", data_files={"test": "test.csv"})["test"][0] == {"text": "c", "label": 1}
    assert load_dataset("org/configured")["train"]["text"][:] == ["a", "b"]
    assert load_dataset("org/configured", split="held_out", revision=sha)["label"][:] == [1]
    assert load_dataset("org/configured", "pairs")["train"].column_names == ["left", "right"]
    assert HfApi().dataset_info("org/configured").card_data["configs"][1]["config_name"] == "pairs"


def test_from_pretrained(hub, api, repo, tmp_path):
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
        BertTokenizerFast,
    )

    config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]))
    BertTokenizerFast(str(vocabulary)).save_pretrained(tmp_path)
    api.upload_folder(repo_id=repo, folder_path=tmp_path)

    loaded = AutoModelForSequenceClassification.from_pretrained(repo)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(repo)("good bad")["input_ids"] == [2, 5, 6, 3]
    loaded.push_to_hub(f"{repo}-copy")
    assert "model.safetensors" in hub.files(f"{repo}-copy")


# Other hubs than the session's


def test_a_process_with_the_environment_uses_the_hub():
    code = "from huggingface_hub import whoami, create_repo; print(whoami()['name'], create_repo('child'))"
    with LocalHub() as hub:
        environment = {**os.environ, **hub.environment()}
        child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        assert child.stdout.decode().split() == ["hfq-user", f"{hub.url}/hfq-user/child"]


def test_a_hub_with_a_folder_remembers(tmp_path, folder):
    with LocalHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("kept", private=True)
        api.create_commit("hfq-user/kept", [CommitOperationAdd("a.bin", b"a")], commit_message="One", create_pr=True)
        sha = api.upload_folder(repo_id="hfq-user/kept", folder_path=folder).oid
        files = hub.files("hfq-user/kept")
    with LocalHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        info = api.model_info("hfq-user/kept")
        assert (info.sha, info.private) == (sha, True)
        assert hub.files("hfq-user/kept") == files
        assert hub.files("hfq-user/kept", "refs/pr/1")["a.bin"] == b"a"
        assert [pr.title for pr in api.get_repo_discussions("hfq-user/kept")] == ["One"]
        api.delete_repo("hfq-user/kept")
    with LocalHub(tmp_path / "hub") as hub, pytest.raises(HubError, match="not found"):
        hub.files("hfq-user/kept")


def test_a_folder_or_a_port_is_for_one_hub(tmp_path, hub):
    with LocalHub(tmp_path), pytest.raises(HubError, match="Another local Hub"):
        LocalHub(tmp_path)
    with pytest.raises(HubError, match="Port"):
        LocalHub(port=int(hub.url.rpartition(":")[2]))


def test_a_broken_state_is_named(tmp_path):
    with LocalHub(tmp_path) as hub:
        hub.create_repo("org/broken")
    path = tmp_path / "repos" / "models" / "org" / "broken.json"
    path.write_text("{")
    with pytest.raises(HubError, match=r"broken\.json"):
        LocalHub(tmp_path)


def test_nobody_answers_after_stop():
    with LocalHub() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.whoami()
    with pytest.raises(HTTPError):
        api.whoami()


def test_a_client_with_xet_does_not_use_lfs(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with LocalHub(advertise_xet=True) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("xet")
        with pytest.raises(ConnectionError):  # there is nothing behind the token
            commit_file(api, "hfq-user/xet", "a.bin")
        assert ("GET", "/api/models/hfq-user/xet/xet-write-token/main", 200) in hub.requests
        assert not methods(hub, "/lfs/")
        # A stream can only travel the old way.
        commit_file(api, "hfq-user/xet", "b.bin", io.BytesIO(b"b"))
        assert "PUT" in methods(hub, "/lfs/")
