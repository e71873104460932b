"""`hfq watch`: what is new on a source is published once, and one recipe's trouble is not another's."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.command import CHECKPOINT, Done, Running, copy_checkpoint, forkserver, write_outliers
from support.factories import make_folder, make_report

from hfq.hub.local import LocalHub
from hfq.publish import push_folder
from hfq.recipe import PushOptions
from hfq.runs.recipe_folder import Outcome, exit_code

USER = "hfq-user"
COMMIT = "/commit/"
FAST = {"approach": "dynamic", "max_trials": 1}  # one trial: these tests are about what happens around it
MISSES = {**FAST, "tolerable_loss": 0}


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A source of its own for each test; the Hub is one for all. Its int8 model is `NAME-int8`."""
    return f"{USER}/{re.sub('[^a-z0-9]+', '-', request.node.name.removeprefix('test_'))[:60].strip('-')}"


def add_recipe(project: Path, name: str, **values: object) -> None:
    (project / "pipelines" / name).write_text(yaml.safe_dump({"dataset": "../data", **values}))


def watch_once(project: Path, *arguments: object) -> Done:
    return forkserver().hfq("watch", "pipelines", "--once", *arguments, cwd=project)


def states(done: Done) -> dict[str, str]:
    return {row["recipe"]: row["state"] for row in map(json.loads, done.out.splitlines())}


def publish(folder: Path, repo_id: str, revision: str, *, create_pr: bool = False) -> None:
    """What a run of hfq on that revision of the source has left on the Hub."""
    report = make_report()
    made = make_folder(folder, replace(report, checkpoint=replace(report.checkpoint, revision=revision)))
    options = {"default_name": repo_id, "token": None, "message": "INT8 export by hfq 0.0.1"}
    push_folder(made, repo_id=repo_id, options=PushOptions(create_pr=create_pr), **options)


def commits(hub: LocalHub, repo_id: str) -> int:
    """How many there are beside the one that the Hub makes in a new repository."""
    return len(hub.commits(repo_id)) - 1


def change(hub: LocalHub, name: str, folder: Path, text: str) -> str:
    """A new revision of a source: another README."""
    (folder / "README.md").write_text(text)
    return hub.commit_folder(name, folder)


def test_a_new_revision_becomes_one_commit_even_if_the_first_push_is_refused(
    hub: LocalHub, name: str, project: Path
) -> None:
    """In one process, which quantizes that revision once. What is not new makes no commit."""
    source = copy_checkpoint(project / "source")
    target = f"{name}-int8"
    publish(project / "old", target, hub.commit_folder(name, source))
    add_recipe(project, "good.yaml", checkpoint=name, **FAST)
    with Running("watch", "pipelines", "--interval", "1", "--json", cwd=project) as running:
        running.until("nothing to do")
        running.until("nothing to do")
        assert commits(hub, target) == 1
        hub.fail("POST", COMMIT, 403)
        revision = change(hub, name, source, "new")
        assert "may not do this" in running.until("! ")
        running.until(f"holds {name} at {revision[:19]}: commit")
        running.until("nothing to do")
        running.until("nothing to do")
        done = running.stop(signal.SIGINT)
    assert commits(hub, target) == 2
    assert done.err.count("▸ Trials") == 1
    assert (done.code, done.err.count("Interrupted")) == (130, 1)
    report = json.loads(hub.files(target)["hfq.json"])
    assert (report["checkpoint"]["id"], report["checkpoint"]["revision"]) == (name, revision)
    assert f"# {target.split('/')[1]}" in hub.files(target)["README.md"].decode()
    rounds = [json.loads(line)["state"] for line in done.out.splitlines()]
    assert list(dict.fromkeys(rounds)) == ["current", "failed", "published"]
    assert (rounds.count("failed"), rounds.count("published")) == (1, 1)
    assert os.environ["HF_TOKEN"] not in done.out + done.err


def test_a_missed_goal_is_not_tried_again_until_something_changes(hub: LocalHub, name: str, project: Path) -> None:
    hub.commit_folder(name, write_outliers(project / "source"))
    add_recipe(project, "hard.yaml", checkpoint=name, **MISSES)
    with Running("watch", "pipelines", "--interval", "1", cwd=project) as running:
        running.until("! No trial met the goal")
        line = running.until("! ")
        assert "Not tried again" in line and "neither it nor the recipe has changed" in line
        assert running.err.count("▸ Trials") == 1
        add_recipe(project, "hard.yaml", checkpoint=name, **MISSES, batch_size=16)
        running.until("! No trial met the goal")
    assert not any(method == "POST" for method, path, _ in hub.requests if COMMIT in path or "create" in path)


def test_the_exit_code_is_3_if_only_goals_were_missed(hub: LocalHub, name: str, project: Path) -> None:
    hub.commit_folder(name, write_outliers(project / "source"))
    publish(project / "old", f"{name}-fine", hub.commit_folder(f"{name}-source", CHECKPOINT))
    add_recipe(project, "fine.yaml", checkpoint=f"{name}-source", to=f"{name}-fine")
    add_recipe(project, "hard.yaml", checkpoint=name, **MISSES)
    done = watch_once(project, "--json")
    assert done.code == 3, done.err
    assert states(done) == {"fine.yaml": "current", "hard.yaml": "missed"}
    assert done.err.splitlines()[-1] == "hfq: Not published: hard.yaml. What each lacks is said above."


@pytest.mark.parametrize(("codes", "expected"), [([], 0), ([0, 0], 0), ([0, 3], 3), ([3, 2, 0], 2), ([2, 1, 3], 1)])
def test_the_exit_code_is_that_of_the_gravest_failure(codes: list[int], expected: int) -> None:
    assert exit_code([Outcome("a.yaml", "failed", "", code) for code in codes]) == expected


def test_recipes_that_cannot_be_run_are_told_apart_from_the_others(hub: LocalHub, name: str, project: Path) -> None:
    publish(project / "old", f"{name}-int8", hub.commit_folder(name, CHECKPOINT))
    add_recipe(project, "fine.yml", checkpoint=name)
    add_recipe(project, "typo.yaml", checkpoint=name, tolerance=1)
    (project / "pipelines" / "broken.yaml").write_text("checkpoint: [")
    (project / "pipelines" / "notes.txt").write_text("no recipe")
    done = watch_once(project, "--json")
    assert done.code == 2
    assert states(done) == {"broken.yaml": "failed", "fine.yml": "current", "typo.yaml": "failed"}
    assert "'tolerance' is no key of a recipe" in done.err
    assert "broken.yaml is not YAML" in done.err

    add_recipe(project, "gone.yaml", checkpoint=f"{name}-gone")
    done = watch_once(project)
    assert done.code == 1
    assert f"! {name}-gone is not on the Hub, or is private" in done.err


def test_two_recipes_for_one_repository_are_refused(hub: LocalHub, name: str, project: Path) -> None:
    hub.commit_folder(name, CHECKPOINT)
    add_recipe(project, "one.yaml", checkpoint=name, output="one")
    add_recipe(project, "two.yaml", checkpoint=name, output="two", to=f"{name}-int8")
    add_recipe(project, "three.yaml", checkpoint=name, output="two", to=f"{name}-other")
    done = watch_once(project)
    assert done.code == 2
    assert f"one.yaml has the same 'to' as two.yaml ({name}-int8)" in done.err
    assert "three.yaml has the same 'output' as two.yaml" in done.err
    assert "▸ Checkpoint" not in done.err


def test_a_repository_that_hfq_may_not_change_is_refused_before_the_run(
    hub: LocalHub, name: str, project: Path
) -> None:
    hub.commit_folder(name, CHECKPOINT)
    hub.commit_folder(f"{name}-int8", CHECKPOINT)
    publish(project / "old", f"{name}-public", "0" * 40)
    add_recipe(project, "foreign.yaml", checkpoint=name)
    add_recipe(project, "public.yaml", checkpoint=name, to=f"{name}-public", private=True, output="out")
    done = watch_once(project)
    assert done.code == 1
    assert f"{name}-int8 holds model.safetensors but no hfq.json" in done.err
    assert f"{name}-public is public already" in done.err
    assert "▸ Checkpoint" not in done.err


def test_a_revision_that_is_proposed_is_not_proposed_again(hub: LocalHub, name: str, project: Path) -> None:
    revision = hub.commit_folder(name, CHECKPOINT)
    publish(project / "old", f"{name}-int8", "0" * 40)
    publish(project / "new", f"{name}-int8", revision, create_pr=True)
    add_recipe(project, "careful.yaml", checkpoint=name, create_pr=True)
    done = watch_once(project, "--json")
    assert (done.code, states(done)) == (0, {"careful.yaml": "current"}), done.err


def test_only_the_revision_that_a_recipe_names_counts(hub: LocalHub, name: str, project: Path) -> None:
    source = copy_checkpoint(project / "source")
    pinned = hub.commit_folder(name, source)
    change(hub, name, source, "new")
    publish(project / "old", f"{name}-int8", pinned)
    add_recipe(project, "pinned.yaml", checkpoint=name, revision=pinned[:12])
    done = watch_once(project, "--json")
    assert (done.code, states(done)) == (0, {"pinned.yaml": "current"}), done.err


def test_a_folder_is_a_source_too(hub: LocalHub, name: str, project: Path) -> None:
    """Its revision is a digest of its weights, as in every report of a run on it."""
    shutil.copytree(CHECKPOINT, project / "pipelines" / "source")
    add_recipe(project, "local.yaml", checkpoint="./source", to=f"{name}-int8")
    inspected = forkserver().hfq("inspect", "pipelines/source", "--json", cwd=project)
    publish(project / "old", f"{name}-int8", json.loads(inspected.out)["revision"])
    done = watch_once(project, "--json")
    assert (done.code, states(done)) == (0, {"local.yaml": "current"}), done.err


def test_a_hub_that_cannot_say_what_is_published_starts_no_run(hub: LocalHub, name: str, project: Path) -> None:
    publish(project / "old", f"{name}-int8", hub.commit_folder(name, CHECKPOINT))
    add_recipe(project, "fine.yaml", checkpoint=name)
    hub.fail("HEAD", "hfq.json", 403, times=2)
    done = watch_once(project)
    assert done.code == 1
    assert f"Reading hfq.json of {name}-int8 failed" in done.err
    assert "▸ Checkpoint" not in done.err


@pytest.mark.parametrize(("folder", "says"), [("pipelines", "holds no recipe"), ("nowhere", "does not exist")])
def test_a_folder_without_recipes_is_refused(folder: str, says: str, project: Path) -> None:
    done = forkserver().hfq("watch", folder, cwd=project)
    assert (done.code, done.err) == (
        2,
        f"hfq: {folder} {says}. Expected a folder with YAML files such as pipelines/demo.yaml.\n",
    )
