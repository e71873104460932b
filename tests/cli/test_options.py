"""Flags that are made from the keys of a recipe, and what they say of tasks."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from support.command import CHECKPOINT, ROOT, forkserver, write_slice

from hfq.cli.commands import app
from hfq.recipe import Evaluation, Recipe, flag

OTHERS = {
    "quantize": {"--token", "--local-hub", "--save-recipe", "--resume", "--compile", "--verbose", "--json"},
    "eval": {"--token", "--compile", "--baseline", "--json"},
    "explain": {
        "--calibration-split",
        "--calibration-samples",
        "--tolerable-loss",
        "--criterion",
        "--layer",
        "--baseline",
        "--output",
        "--token",
        "--json",
    },
    "run": {"--output", "--push", "--engine", "--ray-address", "--resume", "--token", "--local-hub", "--verbose", "--json"},
    "push": {"--to", "--private", "--create-pr", "--force", "--branch", "--tag", "--token", "--local-hub", "--verbose"},
    "inspect": {"--revision", "--runtime", "--token", "--json"},
    "report": {"--revision", "--output", "--token"},
    "webhook": {"--queue", "--host", "--port", "--retry", "--token", "--verbose"},
    "bench": {"--threads", "--vs", "--peer-python", "--baseline", "--shapes", "--rounds", "--compile", "--growth", "--output", "--token", "--json"},
}  # fmt: skip
EVERY_KEY = [
    "--revision",
    "--task",
    "--dataset",
    "--subset",
    "--split",
    "--calibration-split",
    "--column",
    "--text-column",
    "--pooling",
    "--prompt",
    "--label-column",
    "--metric",
    "--approach",
    "--calibration-samples",
    "--tolerable-loss",
    "--criterion",
    "--confidence",
    "--layer",
    "--max-trials",
    "--timeout",
    "--explore",
    "--recover",
    "--explain",
    "--allow-loss",
    "--max-length",
    "--batch-size",
    "--seed",
    "--threads",
    "--accelerator",
    "--devices",
    "--strategy",
    "--output",
    "--push",
    "--to",
    "--private",
    "--create-pr",
    "--force",
    "--branch",
    "--tag",
    "--trust-remote-code",
]


def options(command: str) -> dict[str, Any]:
    """A command's options by their long spelling."""
    known: Any = typer.main.get_command(app)
    return {one.opts[0]: one for one in known.commands[command].params if one.param_type_name == "option"}


@pytest.mark.parametrize("command", OTHERS)
def test_commands_take_these_flags(command: str) -> None:
    of_recipe = {"quantize": Recipe, "eval": Evaluation, "explain": Evaluation}.get(command)
    keys = {flag(key) for key in of_recipe.model_fields if key != "checkpoint"} if of_recipe else set()
    assert set(options(command)) == keys | OTHERS[command]
    if command == "quantize":
        assert keys == set(EVERY_KEY)


def test_help_shows_the_default_and_the_choices_of_every_key() -> None:
    found = options("quantize")
    for key, field in Recipe.model_fields.items():
        if key == "checkpoint":
            continue
        one = found[flag(key)]
        assert one.help.startswith(field.description)
        assert re.fullmatch(r"[A-Z].*\.(  \\\[default: [^\]]+\])?", one.help)
        if field.default not in (None, [], {}) and field.annotation is not bool:
            assert one.help.endswith(f"  \\[default: {field.default}]")
    for spelling, default in (
        ("--tolerable-loss", "0.01"),
        ("--timeout", "0"),
        ("--criterion", "relative"),
        ("--max-length", "the model's limit"),
        ("--metric", "the task's first"),
        ("--to", "YOU/CHECKPOINT-int8"),
    ):
        assert found[spelling].help.endswith(f"  \\[default: {default}]")


def test_help_shows_the_choices(tmp_path: Path) -> None:
    wide = {"COLUMNS": "120"}
    shown = forkserver().hfq("quantize", "--help", cwd=tmp_path, env=wide)
    for row in (r"--approach +<auto\|static\|dynamic>", r"--criterion +<relative\|absolute>", r"--column +ROLE=NAME"):
        assert re.search(row, shown.out)
    refused = forkserver().hfq("quantize", "./nowhere", "--approach", "both", cwd=tmp_path, env=wide)
    assert refused.code == 2 and "'both' is not one of 'auto', 'static'" in refused.err


def test_help_needs_no_torch() -> None:
    code = "import sys; from hfq.cli import main; sys.argv = ['hfq', 'quantize', '--help']\ntry: main()\n"
    code += "except SystemExit: sys.exit(' '.join({'torch', 'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "\n"
    assert "--column" in done.stdout


def test_flags_become_the_recipe(tmp_path: Path) -> None:
    flags = [
        "--column",
        "text=premise",
        "--column",
        "text=hypothesis=1",
        "--column",
        "label=y",
        "--seed",
        "0",
        "--timeout",
        "0",
        "--explore",
    ]
    done = forkserver().hfq("quantize", "./nowhere", *flags, "--save-recipe", "r.yaml", cwd=tmp_path)
    assert done.code == 2  # there is no such checkpoint
    assert yaml.safe_load((tmp_path / "r.yaml").read_text()) == {
        "checkpoint": "./nowhere",
        "columns": {"text": ["premise", "hypothesis=1"], "label": ["y"]},
        "seed": 0,
        "explore": True,
    }


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--column", "text"],
            "--column 'text' is not ROLE=NAME, such as text=sentence1. `hfq tasks` lists the roles.",
        ),
        (["--column", "=text"], "--column '=text' is not ROLE=NAME"),
        (["--column", "text="], "--column 'text=' is not ROLE=NAME"),
        (["--column", "text=" + "a" * 5000], "columns is longer than 4096 characters"),
        (["--column", "te\nxt=a"], "columns holds a character that cannot be printed"),
        (["--column", "words=text"], "words is nothing that text-classification reads. Expected some of: text, label."),
        (["--column", "text=text", "--text-column", "text"], "--text-column and --column text=… say the same"),
        (["--column", "label=label", "--label-column", "text"], "--label-column and --column label=… say the same"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_refuses_columns_that_say_nothing(flags: list[str], says: str, tmp_path: Path) -> None:
    data = write_slice(tmp_path / "data", train=4, validation=4)
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", data, *flags, cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert says in done.err.splitlines()[-1]


def test_columns_are_read_by_role(tmp_path: Path) -> None:
    data = write_slice(tmp_path / "data", validation=30)
    file = data / "validation.csv"
    rows = file.read_text().split("\n", 1)[1]
    file.write_text(f"text,label\n{rows}")
    expected = forkserver().hfq("eval", CHECKPOINT, "--dataset", data, "--json", cwd=tmp_path)
    file.write_text(f"what,kind\n{rows}")
    flags = ["--column", "text=what", "--column", "label=kind"]
    found = forkserver().hfq("eval", CHECKPOINT, "--dataset", data, *flags, "--json", cwd=tmp_path)
    assert found.code == 0, found.err
    assert json.loads(found.out)["accuracy"] == json.loads(expected.out)["accuracy"] > 0.9


def test_tasks_are_shown_with_columns_and_metrics(tmp_path: Path) -> None:
    found = json.loads(forkserver().hfq("tasks", "--json", cwd=tmp_path).out)
    section = (ROOT / "README.md").read_text().split("\n## Tasks\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in row.split("|")] for row in section.splitlines() if row.startswith("|")][2:]
    in_readme = {row[1]: re.findall(r"\w+", row[4]) for row in rows}
    assert {task["name"]: task["metrics"] for task in found} == in_readme
    (classification,) = (task for task in found if task["name"] == "text-classification")
    assert classification["pipeline_tag"] == "text-classification"
    assert list(classification["columns"]) == ["text", "label"]
    shown = forkserver().hfq("tasks", cwd=tmp_path)
    assert (shown.code, shown.err) == (0, "")
    for task, block in zip(found, shown.out.split("\n\n"), strict=True):
        tags = ", ".join([task["pipeline_tag"], *task["other_tags"]])
        assert block.startswith(f"{task['name']} (on the Hub: {tags})\n")
        for role, what in task["columns"].items():
            assert re.search(rf"^  --column {role}=… +{re.escape(what)}$", block, re.MULTILINE)
        assert f"  {', '.join(task['metrics'])} (the first is the default)" in block
