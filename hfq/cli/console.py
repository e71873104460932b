"""What commands write themselves: data on standard output, one message on standard error when they fail."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..common.redact import printable, redact
from ..tasks.base import FIDELITY

_HIDDEN = ("--token", "--engine", "--ray-address")


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, as a type that typer and Lightning do not know: each would end the command in its own way."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number  # as a shell has it


def write(text: str) -> None:
    """Write a line, or several, to standard output."""
    sys.stdout.write(text + "\n")


def write_json(value: Any) -> None:
    """Write JSON to be read by people too."""
    write(json.dumps(value, indent=2, ensure_ascii=False))


def write_line(value: Any) -> None:
    """Write JSON as one line, at once: somebody may be waiting for it."""
    write(json.dumps(value, ensure_ascii=False))
    sys.stdout.flush()


def show_tasks(tasks: Sequence[Mapping[str, Any]]) -> None:
    """Write what `hfq.tasks.registry.describe_tasks` found, as flags and what they take."""
    blocks = []
    for task in tasks:
        rows = [(f"--column {role}=…", what) for role, what in task["columns"].items()]
        if task["metrics"]:
            rows.append(
                ("--metric", f"{', '.join(task['metrics'])} (the first is the default); without labels: {FIDELITY}")
            )
        width = max(len(name) for name, _ in rows)
        head = f"{task['name']} (on the Hub: {', '.join([task['pipeline_tag'], *task['other_tags']])})"
        blocks.append("\n".join([head, *(f"  {name:{width}}  {what}" for name, what in rows)]))
    write("\n\n".join(blocks))


def command_line() -> str:
    """This command line, without the token, and without where things lie and run."""
    words, hide = [], False
    for word in sys.argv[1:]:
        if not (hide or word.startswith(_HIDDEN)):
            words.append(Path(word).name if word.startswith(("/", "~")) else word)
        hide = word in _HIDDEN
    return redact(shlex.join(["hfq", *words]))


def fail(message: str, code: int) -> NoReturn:
    """End the command with one message."""
    sys.stderr.write(f"hfq: {printable(message)}\n")
    sys.exit(code)
