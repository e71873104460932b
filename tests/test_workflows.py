"""The workflows and the composite action: what they may do, what reaches the shell, and what a run of them leaves."""

import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from support.command import CHECKPOINT, write_outliers, write_slice
from support.github_actions import ACTION, WORKFLOWS, condition, evaluate, load, run_action

from hfq.hub.local import LocalHub
from hfq.report.summary import plain, summarize

FILES = [*sorted(WORKFLOWS.glob("*.yml")), ACTION / "action.yml"]
PINNED = re.compile(r"uses: [\w-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
PUBLISHED = {".gitattributes", "README.md", "config.json", "hfq.json", "model.safetensors"}


def steps(file: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    """Of all jobs, or of an action."""
    for job in file["jobs"].values() if "jobs" in file else [file["runs"]]:
        yield from job["steps"]


# What they may do


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_uses_only_actions_that_are_pinned_by_commit_or_lie_here(path: Path) -> None:
    lines = [line.strip().removeprefix("- ") for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line.startswith("uses:"):
            assert PINNED.fullmatch(line) or line == "uses: ./.github/actions/quantize", line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_expression_is_pasted_into_a_shell(path: Path) -> None:
    for step in steps(load(path)):
        assert "${{" not in step.get("run", ""), step


@pytest.mark.parametrize("path", FILES[:-1], ids=lambda path: path.name)
def test_a_workflow_may_read_the_repository_and_no_more(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    assert "group" in workflow["concurrency"]
    for job in workflow["jobs"].values():
        more = {"security-events": "write"} if path.name == "codeql.yml" else {}
        publishes = job.get("environment") == "pypi"  # by trusted publishing, and it reads no repository
        allowed = {"id-token": "write"} if publishes else {"contents": "read", **more}
        assert job.get("permissions", {}) in ({}, allowed)
        assert job["timeout-minutes"] < 360
    for step in steps(workflow):
        if "actions/checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def test_the_token_comes_from_a_secret_and_only_the_run_has_it() -> None:
    for step in steps(load(WORKFLOWS / "quantize.yml")):
        text = str(step)
        assert text.count("secrets.") == text.count("'token': '${{ secrets.HF_TOKEN }}'")
    holders = [step["id"] for step in steps(load(ACTION / "action.yml")) if "inputs.token" in str(step)]
    assert holders == ["quantize"]


def test_a_release_is_published_after_its_wheel_ran_the_demo_and_with_one_version() -> None:
    release = load(WORKFLOWS / "release.yml")
    assert release[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+*"]}}
    jobs = release["jobs"]
    assert (jobs["demo"]["needs"], jobs["publish"]["needs"]) == ("build", "demo")
    assert "secrets." not in str(release)
    build, demo = ("\n".join(step.get("run", "") for step in jobs[name]["steps"]) for name in ("build", "demo"))
    assert 'ls "dist/hfq-${GITHUB_REF_NAME#v}-py3-none-any.whl" "dist/hfq-${GITHUB_REF_NAME#v}.tar.gz"' in build
    assert "dist/*.whl" in demo and "hfq run pipelines/demo.yaml --local-hub" in demo
    for what in ("hfq --version", "hfq.json", "README.md"):
        assert any(what in line and "${GITHUB_REF_NAME#v}" in line for line in demo.splitlines())
    assert [step["uses"].split("@")[0] for step in jobs["publish"]["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]


# What starts a job, and with what

WEBHOOK = {
    "event": {"action": "update", "scope": "repo.content"},
    "repo": {"type": "model", "name": "stranger/spam", "headSha": "a" * 40},
}


def dispatched(**changes: Any) -> dict[str, Any]:
    payload = {**WEBHOOK, **changes}
    return {"github": {"event_name": "repository_dispatch", "event": {"client_payload": payload}}}


@pytest.mark.parametrize(
    ("context", "starts"),
    [
        ({"github": {"event_name": "workflow_dispatch"}}, "model"),
        ({"github": {"event_name": "schedule"}}, "recipes"),
        (dispatched(), "model"),
        (dispatched(repo={**WEBHOOK["repo"], "type": "dataset"}), None),
        (dispatched(repo={**WEBHOOK["repo"], "name": "me/spam-int8"}), None),
        (dispatched(event={"action": "create", "scope": "discussion"}), None),
        (dispatched(repo={}), None),
    ],
)
def test_starts_a_job_for_what_concerns_it(context: dict[str, Any], starts: str | None) -> None:
    jobs = load(WORKFLOWS / "quantize.yml")["jobs"]
    assert [name for name, job in jobs.items() if condition(job["if"], context)] == ([starts] if starts else [])


def inputs_of(job: str, context: dict[str, Any]) -> dict[str, Any]:
    """What the workflow gives to the action."""
    (step,) = (step for step in load(WORKFLOWS / "quantize.yml")["jobs"][job]["steps"] if "./" in step.get("uses", ""))
    return {name: evaluate(value, context) for name, value in step["with"].items()}


def test_of_a_webhook_only_the_model_and_its_commit_are_used() -> None:
    context = dispatched(dataset="x/y", to="victim/model", tolerable_loss="1")
    given = {name: value for name, value in inputs_of("model", context).items() if value not in ("", None)}
    assert given == {"model": "stranger/spam", "revision": "a" * 40, "push": True}


def test_what_is_filled_in_by_hand_reaches_the_action() -> None:
    form = load(WORKFLOWS / "quantize.yml")[True]["workflow_dispatch"]["inputs"]
    values = {name: f"value of {name}" for name in form}
    given = inputs_of("model", {"github": {"event_name": "workflow_dispatch"}, "inputs": values})
    assert {name: given[name] for name in form} == values


# Runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the action runs, with data in it."""
    path = tmp_path / "workspace"
    write_slice(path / "data", train=100, validation=60)
    return path


@pytest.fixture
def to(hub: LocalHub) -> str:
    """A repository that is not there yet."""
    return f"hfq-user/target-{secrets.token_hex(4)}"


def test_publishes_and_shows_the_benchmark(folder: Path, hub: LocalHub, to: str) -> None:
    commit = hub.commit_folder("stranger/spam", CHECKPOINT)
    given = {"model": "stranger/spam", "revision": commit, "dataset": "./data", "approach": "dynamic"}
    done = run_action({**given, "push": True, "to": to, "token": hub.token}, folder=folder)
    assert done.code == 0, done.log
    assert set(hub.files(to)) >= PUBLISHED
    assert done.outputs["exit-code"] == "0"
    assert (folder / done.outputs["folder"] / "hfq.json").is_file()
    assert "| Info Type | Baseline FP32 | Quantized INT8 |" in done.summary
    for row in ("Accuracy \\(validation\\)", "Duration", "Memory", "Size on disk", "Peak memory"):
        assert f"| {row}" in done.summary
    assert hub.token not in done.log + done.summary + Path(done.outputs["report"]).read_text(encoding="utf-8")


def test_a_missed_goal_ends_in_3_and_publishes_nothing(
    folder: Path, hub: LocalHub, to: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shutil.copytree(write_outliers(tmp_path_factory.mktemp("outliers") / "outliers"), folder / "model")
    given = {"model": "./model", "dataset": "./data", "approach": "dynamic", "max-trials": "1", "tolerable-loss": "0"}
    done = run_action({**given, "push": "true", "create-pr": "true", "to": to, "token": hub.token}, folder=folder)
    assert done.code == 3, done.log
    assert done.outputs["exit-code"] == "3"
    assert "folder" not in done.outputs
    assert "The accuracy goal was missed: nothing was published" in done.summary
    assert "| Trial | Accuracy | Loss |" in done.summary
    assert not HfApi().repo_exists(to)
    assert {method for method, _, _ in hub.requests} <= {"GET", "HEAD"}


HOSTILE = [
    "; touch {0}",
    "$(touch {0})",
    "`touch {0}`",
    "x\ntouch {0}\n",
    '" && touch {0} #',
    "' | touch {0} #",
    "${{IFS+$(touch {0})}}",
    "a[$(touch {0})]",
    "--help",
    "--version",
]
TEXTS = ("model", "revision", "dataset", "subset", "split", "calibration-split", "output", "to")


@pytest.mark.parametrize("payload", HOSTILE)
def test_nothing_of_a_hostile_input_is_executed(payload: str, folder: Path, hub: LocalHub) -> None:
    before = sorted(folder.rglob("*"))
    canary = folder / "executed"
    hostile = payload.format(canary)
    done = run_action({**dict.fromkeys(TEXTS, hostile), "push": "true", "token": hub.token}, folder=folder)
    assert done.code in (1, 2), done.log
    assert not canary.exists()
    assert sorted(folder.rglob("*")) == before
    assert set(done.outputs) == {"exit-code", "report"}
    assert "Nothing was published" in done.summary
    assert {method for method, _, _ in hub.requests} <= {"GET", "HEAD"}


@pytest.mark.parametrize("name", ["model", "recipes"])
def test_a_name_is_no_command_to_the_runner(name: str, folder: Path, hub: LocalHub) -> None:
    done = run_action({name: "::error::forged\n::set-output name=folder::/etc"}, folder=folder)
    assert done.code in (1, 2), done.log
    first, *middle, last = done.log.splitlines()
    stop = first.removeprefix("::stop-commands::")
    assert len(stop) == 64
    assert last == f"::{stop}::"
    assert stop not in "".join(middle)


# The summary


def test_a_name_stays_text_in_the_summary() -> None:
    name = "a|b`c` <img src=x> [x](http://y)\n# heading"
    shown = plain(name)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)[|`<>\[\]()#]", shown)
    assert shown.replace("\\", "") == " ".join(name.split())


def test_the_summary_shows_each_recipe() -> None:
    row = '{"recipe": "r.yaml", "state": "failed", "message": "no | token", "exit_code": 1}'
    for text in (row, f"{row}\n{row}"):
        assert "| r\\.yaml | failed | no \\| token |" in summarize(text, exit_code=1)
