"""`hfq run` with several recipes, and what `--engine` refuses before a run. The cluster itself is in `test_ray.py`."""

import json
import os
import pickle
from pathlib import Path

import pytest
import yaml
from support.command import CHECKPOINT, ROOT, Done, forkserver, hfq, write_outliers

from hfq.common.errors import GoalNotMetError, HfqError
from hfq.common.installation import installation
from hfq.hub.local import LocalHub
from hfq.recipe import Recipe
from hfq.runs.recipe_folder import read_recipes

FAST = {"dataset": "../data", "approach": "dynamic", "max_trials": 1}


def add_recipe(project: Path, name: str, **values: object) -> None:
    (project / "pipelines" / name).write_text(yaml.safe_dump({"checkpoint": str(CHECKPOINT), **FAST, **values}))


def run(project: Path, *arguments: object) -> Done:
    return forkserver().hfq("run", *arguments, cwd=project)


def test_every_recipe_of_a_folder_has_its_turn(hub: LocalHub, project: Path) -> None:
    write_outliers(project / "outliers")
    (project / "pipelines" / "broken.yaml").write_text("checkpoint: [")
    add_recipe(project, "hard.yaml", checkpoint="../outliers", tolerable_loss=0, output="hard", push=True)
    add_recipe(project, "kept.yaml", output="kept")
    add_recipe(project, "sent.yml", output="sent", push=True, to="runs-sent", branch="int8", tag="v1")
    done = run(project, "pipelines", "--json")
    assert done.code == 2, done.err  # the gravest: one recipe cannot be read
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["recipe"], row["state"], row["exit_code"]) for row in rows] == [
        ("broken.yaml", "failed", 2),
        ("hard.yaml", "missed", 3),
        ("kept.yaml", "done", 0),
        ("sent.yml", "published", 0),
    ]
    assert done.err.splitlines()[-1] == "hfq: Not done: broken.yaml, hard.yaml. What each lacks is said above."
    assert not (project / "hard").exists()
    assert json.loads((project / "kept" / "hfq.json").read_text())["command"] == "hfq run kept.yaml"
    commit, _ = hub.commits("hfq-user/runs-sent", "int8")
    assert commit.sha in rows[-1]["message"]
    report = json.loads(hub.files("hfq-user/runs-sent", "v1")["hfq.json"])
    assert report["command"] == "hfq run sent.yml --push"
    pushed = {path for method, path, _ in hub.requests if method == "POST" and "/commit/" in path}
    assert pushed == {"/api/models/hfq-user/runs-sent/commit/int8"}


def test_recipes_that_would_replace_each_other_are_refused_before_any_is_run(project: Path) -> None:
    add_recipe(project, "one.yaml", output="out")
    add_recipe(project, "two.yaml", output="out")
    done = run(project, "pipelines/one.yaml", "pipelines/two.yaml")
    assert done.code == 2
    assert "one.yaml has the same 'output' as two.yaml" in done.err
    assert "▸ Checkpoint" not in done.err


def test_recipes_may_share_a_repository_on_branches_of_their_own(hub: LocalHub, project: Path) -> None:
    for name, branch in (("one", "main"), ("two", "static"), ("three", "static"), ("four", None)):
        add_recipe(project, f"{name}.yaml", output=name, to="runs-shared", branch=branch)
    files = {name: project / "pipelines" / f"{name}.yaml" for name in ("one", "two", "three", "four")}
    found = read_recipes(list(files.values()), push=True, publish_all=False, token=None)
    said = {name: str(found[path]) for name, path in files.items()}
    assert "one.yaml has the same 'to' as four.yaml (hfq-user/runs-shared)" in said["one"]
    assert "two.yaml has the same 'to' as three.yaml (hfq-user/runs-shared, branch static)" in said["two"]
    found = read_recipes([files["one"], files["two"]], push=True, publish_all=False, token=None)
    assert all(isinstance(recipe, Recipe) for recipe in found.values())


def test_a_bad_token_costs_no_run(project: Path) -> None:
    add_recipe(project, "one.yaml", output="out")
    done = run(project, "pipelines", "--push", "--token", "wrong")
    assert (done.code, "the token is not valid" in done.err, "▸" in done.err) == (1, True, False)


def test_one_output_is_not_for_several_recipes(project: Path) -> None:
    add_recipe(project, "one.yaml")
    done = run(project, "pipelines", "--output", "out")
    assert (done.code, done.err) == (
        2,
        "hfq: --output is for one recipe. Several are written to the 'output' that each of them names.\n",
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ray-address", "head:6379"], "--ray-address is for --engine ray."),
        (["--engine", "ray", "--token", "hf_x"], "Ray cluster shows the command line of who uses it. Set HF_TOKEN."),
        (["--engine", "ray", "--ray-address", "local"], "'local' is no address of a Ray cluster. Expected host:port"),
        (["--engine", "ray", "--ray-address", "ray://head:1"], "'ray://head:1' is no address of a Ray cluster."),
    ],
)
def test_an_engine_that_cannot_be_had_is_refused(arguments: list[str], says: str, project: Path) -> None:
    add_recipe(project, "one.yaml")
    done = run(project, "pipelines/one.yaml", *arguments)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert says in done.err


def test_without_ray_the_message_says_how_to_get_it(project: Path) -> None:
    add_recipe(project, "one.yaml")
    (project / "ray.py").write_text("raise ModuleNotFoundError('ray')\n")
    done = hfq(
        "run", "pipelines/one.yaml", "--engine", "ray", cwd=project, env={"PYTHONPATH": f"{project}{os.pathsep}{ROOT}"}
    )
    assert (done.code, done.err) == (
        2,
        f"hfq: --engine ray needs Ray, which is not installed: {installation('ray')}.\n",
    )


@pytest.mark.parametrize("kind", [HfqError, *HfqError.__subclasses__()])
def test_errors_come_back_from_other_processes_as_they_were(kind: type) -> None:
    error = kind("why", details={"trials": [1]}) if kind is GoalNotMetError else kind("why")
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (kind, "why", vars(error))
