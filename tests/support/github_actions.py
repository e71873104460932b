"""Runs the shell steps of a composite action as GitHub's runner does, and works out the expressions of a workflow.

As documented in "Workflow syntax" and "Evaluate expressions" of GitHub's manual: a step is a file given to
`bash --noprofile --norc -eo pipefail`, inputs reach it as its `env` says, and files named in the environment take
outputs and the summary.
"""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from support.command import PATIENCE, ROOT, environment, forkserver

ACTION = ROOT / ".github" / "actions" / "quantize"
WORKFLOWS = ROOT / ".github" / "workflows"
_EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
_PATH = re.compile(r"'(?:[^']|'')*'|[A-Za-z_][\w-]*(?:\.[\w-]+)*(?![\w.(-])")
_FUNCTIONS: dict[str, Any] = {
    "endsWith": lambda text, end: text.lower().endswith(end.lower()),
    "cancelled": lambda: False,
}


@dataclass(frozen=True)
class Ran:
    """What an action's steps left: the last one's exit code, its log, and what it told the runner."""

    code: int
    log: str
    summary: str
    outputs: dict[str, str] = field(default_factory=dict)


def load(path: Path) -> dict[Any, Any]:
    """A workflow or action. `on`, which YAML 1.1 takes for a boolean, is the key True."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def evaluate(text: Any, context: Mapping[str, Any]) -> Any:
    """A value of a workflow with its expressions worked out; a value that is one expression keeps its type."""
    if not isinstance(text, str):
        return text
    whole = _EXPRESSION.fullmatch(text.strip())
    if whole:
        return condition(whole[1], context)
    return _EXPRESSION.sub(lambda found: _string(condition(found[1], context)), text)


def condition(expression: str, context: Mapping[str, Any]) -> Any:
    """The value of an expression: paths, strings, `||`, `&&`, `!`, `==`, and `endsWith`."""

    def name(found: re.Match[str]) -> str:
        if found[0].startswith("'"):
            return repr(found[0][1:-1].replace("''", "'"))
        if found[0] in ("true", "false"):
            return found[0].title()
        return f"look_up({found[0]!r})"

    def look_up(path: str) -> Any:
        value: Any = context
        for key in path.split("."):
            value = value.get(key, "") if isinstance(value, Mapping) else ""
        return value

    python = _PATH.sub(name, " ".join(expression.split()))
    python = re.sub(r"!(?!=)", " not ", python.replace("||", " or ").replace("&&", " and "))
    return eval(python.strip(), {"look_up": look_up, **_FUNCTIONS})


def run_action(inputs: Mapping[str, Any], *, folder: Path, env: Mapping[str, str | None] | None = None) -> Ran:
    """Run the action's shell steps in `folder`, but for the one that installs hfq: it is installed here."""
    action = load(ACTION / "action.yml")
    given = {name: _string(inputs.get(name, what["default"])) for name, what in action["inputs"].items()}
    unknown = set(inputs) - set(given)
    assert not unknown, f"no inputs of the action: {unknown}"
    temp, outputs, summary = (folder.parent / name for name in ("runner-temp", "outputs", "summary"))
    temp.mkdir()
    runner = {
        "RUNNER_TEMP": str(temp),
        "GITHUB_OUTPUT": str(outputs),
        "GITHUB_STEP_SUMMARY": str(summary),
        "GITHUB_ACTION_PATH": str(ACTION),
        "GITHUB_WORKSPACE": str(folder),
        "PATH": f"{forkserver().programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for file in (outputs, summary):
        file.touch()
    log, code = "", 0
    for step in action["runs"]["steps"]:
        if "run" not in step or step.get("id") == "install":
            continue
        values = {name: _string(evaluate(value, {"inputs": given})) for name, value in step.get("env", {}).items()}
        script = temp / "step.sh"
        script.write_text(step["run"], encoding="utf-8")
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
            cwd=folder,
            env=environment({"HF_TOKEN": None, **runner, **(env or {}), **values}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        log, code = log + done.stdout, done.returncode
        if code:
            break
    pairs = dict(line.split("=", 1) for line in outputs.read_text(encoding="utf-8").splitlines())
    return Ran(code, log, summary.read_text(encoding="utf-8"), pairs)


def _string(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
