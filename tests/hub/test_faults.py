"""What goes wrong around a run, in one place: on the Hub, on the way to it, and on this machine.

| fault | here, or in |
|---|---|
| 401, 403, 404, 409, 412, 413, 429, 500-504 at every request of a push | here; what is said: `test_push.py` |
| gated, private, missing, refused sources | `test_bad_input.py` |
| a connection cut before, in and after every request; a lost answer; no answer | here |
| files truncated, flipped, damaged in the cache or on the Hub | here; local files: `test_bad_input.py` |
| 429 with Retry-After, as seconds and as a date of a clock that is wrong | here |
| Hubs that lack endpoints and fields, or do it another way | here |
| concurrent pushes, repositories that appear meanwhile | here and in `test_push.py` |
| SIGKILL at every stage, then `--resume` | here; between trials: `test_cli.py` |
| SIGINT | `test_cli.py`, `test_push.py`, `test_watch.py` |
| full disk, read-only output, two processes on one output | `test_bad_input.py` |
| any of these in a whole run, at random | here, and `campaign.py` |
"""

import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx2
import pytest
from campaign import Campaign, small_checkpoint
from huggingface_hub import HfApi, constants
from support.factories import make_folder
from support.faulty_proxy import QUIRKS, Fault, FaultyProxy

from hfq.common.errors import HubError, SourceError
from hfq.hub import client as network
from hfq.hub.local import LocalHub
from hfq.publish import PushResult, published_revisions, push_folder
from hfq.recipe import PushOptions
from hfq.report.report import read_report
from hfq.source.checkpoint import pull, pull_report

USER = "hfq-user"
COMMIT = "/commit/"
PASSING = ("503", "500", "429", "504", "cut before", "cut in upload", "late 504", "lost", "cut in body", "truncated")
FAST = [
    "--approach",
    "dynamic",
    "--max-trials",
    "1",
    "--calibration-samples",
    "8",
    "--max-length",
    "16",
    "--allow-loss",
]
FINAL = ("401", "403", "404")


@pytest.fixture
def repo_id(request: pytest.FixtureRequest) -> str:
    """A repository of its own for each test; the Hub is one for all."""
    return f"{USER}/{re.sub('[^a-z0-9]+', '-', request.node.name.removeprefix('test_'))[:80].strip('-')}"


@pytest.fixture
def folder(tmp_path: Path, repo_id: str) -> Path:
    """An export whose weights no other test has uploaded."""
    return make_folder(tmp_path / "out", weights=repo_id.encode() * 1000)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_HUB_PATIENCE", "4")


@pytest.fixture
def proxy(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What the client takes for the Hub, in this process."""
    with FaultyProxy(hub.url) as proxy:
        monkeypatch.setattr(constants, "ENDPOINT", proxy.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, proxy.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield proxy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for what is pulled."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def push(folder: Path, repo_id: str, **changes: Any) -> PushResult:
    options = {
        "default_name": "x",
        "token": None,
        "message": "INT8 export by hfq",
    }
    chosen = {field.name: changes.pop(field.name) for field in fields(PushOptions) if field.name in changes}
    return push_folder(folder, repo_id=repo_id, options=PushOptions(**chosen), **{**options, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(hub: LocalHub, repo_id: str) -> dict[str, bytes] | None:
    """The files in a repository but for the Hub's own; None if there is no repository."""
    if not HfApi(endpoint=hub.url, token=hub.token).repo_exists(repo_id):
        return None
    return {name: content for name, content in hub.files(repo_id).items() if name != ".gitattributes"}


def commits(hub: LocalHub, repo_id: str) -> int:
    return len(hub.commits(repo_id)) - 1


# Pushes


def test_a_push_survives_whatever_passes_at_any_request(
    hub: LocalHub, proxy: FaultyProxy, folder: Path, repo_id: str
) -> None:
    push(folder, f"{repo_id}-first")
    count = len(proxy.requests)
    assert count > 10
    for at in range(count):
        (folder / "model.safetensors").write_bytes(b"%d" % at * 1000)
        wanted = (*PASSING[at % len(PASSING) :], *PASSING)
        proxy.begin(Fault(lambda kinds, wanted=wanted: next(kind for kind in wanted if kind in kinds), at=at))  # type: ignore[misc]
        push(folder, f"{repo_id}-{at}")
        assert proxy.requests[at][2][1:] in PASSING
        assert published(hub, f"{repo_id}-{at}") == contents(folder)
        assert commits(hub, f"{repo_id}-{at}") == 1


@pytest.mark.parametrize("status", FINAL)
def test_a_push_that_is_refused_at_any_request_leaves_all_or_nothing(
    hub: LocalHub, proxy: FaultyProxy, folder: Path, repo_id: str, status: str
) -> None:
    push(folder, f"{repo_id}-first")
    for at in range(len(proxy.requests)):
        proxy.begin(Fault(lambda _: status, at=at))
        try:
            push(folder, f"{repo_id}-{at}")
        except HubError:
            assert published(hub, f"{repo_id}-{at}") is None
            push(folder, f"{repo_id}-{at}")
        assert published(hub, f"{repo_id}-{at}") == contents(folder)
        assert commits(hub, f"{repo_id}-{at}") == 1


@pytest.mark.parametrize("kind", ["lost", "late 504", "truncated"])
@pytest.mark.parametrize("create_pr", [False, True])
def test_a_commit_whose_answer_is_lost_is_found_and_not_repeated(
    hub: LocalHub, proxy: FaultyProxy, folder: Path, repo_id: str, kind: str, create_pr: bool
) -> None:
    push(folder, repo_id)
    (folder / "config.json").write_text("{}\n")
    proxy.begin(Fault(lambda _: kind, where=COMMIT))
    assert push(folder, repo_id, create_pr=create_pr).changed
    assert [how for _, path, how in proxy.requests if COMMIT in path] == [f"!{kind}"]
    assert commits(hub, repo_id) == (1 if create_pr else 2)
    assert len(list(HfApi(endpoint=hub.url).get_repo_discussions(repo_id))) == create_pr


def test_a_repository_whose_creation_was_not_answered_is_filled_or_taken_back(
    hub: LocalHub, proxy: FaultyProxy, folder: Path, repo_id: str
) -> None:
    proxy.begin(Fault(lambda _: "lost", where="/api/repos/create"))
    assert push(folder, repo_id).created
    proxy.begin(Fault(lambda _: "late 504", where="/api/repos/create", times=1000))
    with pytest.raises(HubError, match="the Hub itself failed"):
        push(folder, f"{repo_id}-other")
    assert published(hub, f"{repo_id}-other") is None


def test_a_repository_that_somebody_else_makes_meanwhile_is_theirs(
    hub: LocalHub, proxy: FaultyProxy, folder: Path, tmp_path: Path, repo_id: str
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "pytorch_model.bin").write_bytes(b"precious")
    hub.commit_folder(repo_id, theirs)
    hub.create_repo(f"{repo_id}-empty")
    for name in (repo_id, f"{repo_id}-empty"):
        hub.fail("POST", COMMIT, 413)
        proxy.begin(Fault(lambda _: "404", where=f"GET /api/models/{name}"))  # as if it were not there yet
        with pytest.raises(HubError):
            push(folder, name)
        assert published(hub, name) == ({"pytorch_model.bin": b"precious"} if name == repo_id else {})


def test_an_interrupted_upload_is_not_sent_again(hub: LocalHub, proxy: FaultyProxy, folder: Path, repo_id: str) -> None:
    proxy.begin(Fault(lambda _: "403", where=COMMIT))
    with pytest.raises(HubError, match="may not do this"):
        push(folder, repo_id)
    assert any(method == "PUT" for method, _, _ in proxy.requests)
    proxy.begin()
    assert push(folder, repo_id).changed
    assert not any(method == "PUT" for method, _, _ in proxy.requests)


def test_a_hub_that_asks_for_a_long_wait_is_not_waited_for(hub: LocalHub, folder: Path, repo_id: str) -> None:
    for address in ("/preupload/", "PUT /lfs/", COMMIT):
        method, _, path = address.rpartition(" ")
        hub.fail(method or "POST", path, 429, headers={"Retry-After": "3600"})
        with pytest.raises(HubError, match="Wait 3600 seconds, then push again"):
            push(folder, repo_id)
    hub.fail("POST", COMMIT, 429, headers={"Retry-After": "1"})
    assert push(folder, repo_id).changed


def test_a_hub_that_does_not_answer_is_asked_again(
    proxy: FaultyProxy, folder: Path, repo_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "TIMEOUT_S", 0.5)
    proxy.begin(Fault(lambda _: "delay", where="/api/models/"))
    assert push(folder, repo_id).created


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "Wed, 21 Oct 1998 07:28:00 GMT", "Date": "Wed, 21 Oct 1998 07:27:00 GMT"}, 60),
        ({"Retry-After": "Wed, 21 Oct 2099 07:26:00 GMT", "Date": "Wed, 21 Oct 2099 07:27:00 GMT"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}, None),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({}, None),
    ],
)
def test_a_wait_until_a_moment_counts_by_the_clock_of_the_hub(headers: dict[str, str], seconds: float | None) -> None:
    assert network.retry_after_s(httpx2.Response(429, headers=headers)) == seconds


# Pulls


def test_a_pull_survives_whatever_passes_at_any_request(
    hub: LocalHub, proxy: FaultyProxy, checkpoint: Path, cache: Path, repo_id: str
) -> None:
    revision = hub.commit_folder(repo_id, checkpoint)
    pull(repo_id)
    for at in range(len(proxy.requests)):
        shutil.rmtree(cache)
        wanted = (
            ("flipped", "truncated", "cut in body", "cut before", "500") if at % 2 else ("cut in body", "lost", "503")
        )
        proxy.begin(Fault(lambda kinds, wanted=wanted: next(kind for kind in wanted if kind in kinds), at=at))  # type: ignore[misc]
        found = pull(repo_id)
        assert found.info.revision == revision
        assert contents(found.path) == contents(checkpoint)


@pytest.mark.parametrize("kind", ["flipped", "truncated"])
def test_a_file_that_is_damaged_each_time_is_refused_and_not_kept(
    hub: LocalHub, proxy: FaultyProxy, checkpoint: Path, cache: Path, repo_id: str, kind: str
) -> None:
    hub.commit_folder(repo_id, checkpoint)
    proxy.begin(Fault(lambda _: kind, where="GET /" + repo_id + "/resolve", times=1000))
    with pytest.raises(SourceError) as caught:
        pull(repo_id)
    assert "model.safetensors" in str(caught.value) or "Consistency check failed" in str(caught.value)
    proxy.begin()
    assert contents(pull(repo_id).path) == contents(checkpoint)


def test_a_file_that_was_damaged_in_the_cache_is_pulled_again(
    hub: LocalHub, proxy: FaultyProxy, checkpoint: Path, cache: Path, repo_id: str
) -> None:
    hub.commit_folder(repo_id, checkpoint)
    for name in ("model.safetensors", "config.json"):
        file = (pull(repo_id).path / name).resolve()
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        assert contents(pull(repo_id).path) == contents(checkpoint)


@pytest.mark.parametrize("read_by", ["watch", "report"])
def test_a_published_report_that_arrives_damaged_does_not_pass_for_another(
    hub: LocalHub, proxy: FaultyProxy, folder: Path, cache: Path, repo_id: str, read_by: str
) -> None:
    push(folder, repo_id)
    proxy.begin(Fault(lambda _: "flipped", where=f"GET /{repo_id}/resolve"))
    if read_by == "watch":
        assert published_revisions(repo_id, PushOptions(), token=None) == {"a" * 40}
    else:
        assert read_report(pull_report(repo_id)) == read_report(folder)
    assert "!flipped" in [how for _, _, how in proxy.requests]


@pytest.mark.parametrize("status", FINAL)
def test_a_pull_that_is_refused_at_any_request_says_so_once(
    hub: LocalHub, proxy: FaultyProxy, checkpoint: Path, cache: Path, repo_id: str, status: str
) -> None:
    hub.commit_folder(repo_id, checkpoint)
    for at in range(10):  # two to know what there is, and two for each of four files
        proxy.begin(Fault(lambda _: status, at=at))
        with pytest.raises(SourceError, match=f"{status}|could not be pulled"):
            pull(repo_id)
        shutil.rmtree(cache, ignore_errors=True)
    assert contents(pull(repo_id).path) == contents(checkpoint)


# Other Hubs


@pytest.mark.parametrize(
    "quirks", [*([name] for name in QUIRKS), list(QUIRKS)], ids=lambda quirks: quirks[0] if len(quirks) == 1 else "all"
)
def test_works_with_a_hub_that_has(
    quirks: list[str], hub: LocalHub, proxy: FaultyProxy, folder: Path, checkpoint: Path, cache: Path, repo_id: str
) -> None:
    proxy.quirks = quirks
    hub.commit_folder(f"{repo_id}-source", checkpoint)
    assert contents(pull(f"{repo_id}-source").path) == contents(checkpoint)
    assert push(folder, repo_id).created
    assert not push(folder, repo_id).changed
    (folder / "config.json").write_text("{}\n")
    assert push(folder, repo_id, tag="v1").changed
    assert commits(hub, repo_id) == 2
    assert published(hub, repo_id) == contents(folder)
    assert published_revisions(repo_id, PushOptions(create_pr=True), token=None) == {"a" * 40}


# Whole runs


@pytest.fixture(scope="module")
def campaign() -> Iterator[Campaign]:
    with Campaign(seed=0) as campaign:
        yield campaign


def test_a_run_that_is_killed_at_every_stage_goes_on(campaign: Campaign, tmp_path: Path) -> None:
    words = [
        "quantize",
        campaign.model,
        "--dataset",
        campaign.data,
        *FAST,
        "--output",
        "out",
        "--push",
        "--to",
        "killed",
    ]
    for stage in ("Checkpoint", "Calibration", "Trials", "Export", "Measure", "Publish"):
        done = campaign.server.hfq(*words, "--resume", cwd=tmp_path, kill_at=f"▸ {stage}")
        assert done.code == -signal.SIGKILL, done.err
        assert not published(campaign.hub, f"{USER}/killed")
    done = campaign.server.hfq(*words, "--resume", cwd=tmp_path)
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert published(campaign.hub, f"{USER}/killed") == contents(tmp_path / "out")
    assert commits(campaign.hub, f"{USER}/killed") == 1


def test_runs_with_a_fault_each_end_whole_or_not_at_all_and_then_succeed(campaign: Campaign) -> None:
    """The beginning of `python tests/campaign.py --seed 0`."""
    told = [campaign.run(number) for number in range(4)]
    assert campaign.broken == [], "\n".join(told)
