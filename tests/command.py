"""The `hfq` command in tests: as a user starts it, or forked from a process that has imported the libraries.

Importing them takes four seconds, so the second way is for the many runs that are over soon. It is the same `main`
in a process of its own, with its own working folder, environment, standard output and standard error.
"""

import atexit
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

HFQ = str(Path(sys.executable).with_name("hfq"))
ROOT = Path(__file__).parent.parent
DEMO = ROOT / "pipelines" / "demo"
CHECKPOINT = DEMO / "bert-mini-sms-spam"


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


def hfq(*args: object, cwd: Path, env: Mapping[str, str | None] | None = None, command: str = HFQ) -> Done:
    """Run the command as a user does. `env`: changes to the environment; None takes a variable away."""
    done = subprocess.run(
        [command, *map(str, args)], cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=300
    )
    return Done(done.returncode, done.stdout, done.stderr)


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment with changes; None takes a variable away. One thread: more only wait here."""
    changed = {"OMP_NUM_THREADS": "1", **os.environ, **(changes or {})}
    return {name: value for name, value in changed.items() if value is not None}


class Running:
    """The command while it runs, killed at the end of the `with` block if it has not ended."""

    def __init__(
        self, *args: object, cwd: Path, env: Mapping[str, str | None] | None = None, seconds: float = 120
    ) -> None:
        self.process = subprocess.Popen(
            [HFQ, *map(str, args)],
            cwd=cwd,
            env=environment(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.err = ""
        self._timer = threading.Timer(seconds, self.process.kill)
        self._timer.start()

    def until(self, text: str) -> str:
        """Wait for a line on standard error that holds `text`; return it."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.err += line
            if text in line:
                return line
        raise AssertionError(f"It ended without {text!r}: {self.err}")

    def stop(self, number: signal.Signals) -> Done:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> Done:
        """Wait for the end."""
        out, err = self.process.communicate()
        self.err += err
        return Done(self.process.returncode, out, self.err)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.process.kill()
        self.process.communicate()


class Forkserver:
    """Runs the command in forks of a process that has imported the libraries, and nothing else, before."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hfq(self, *args: object, cwd: Path, env: Mapping[str, str | None] | None = None) -> Done:
        """Like `hfq` above. Variables that a library reads when it is imported, as HF_ENDPOINT, cannot be changed."""
        assert self._process.stdin and self._process.stdout
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            request = {
                "args": [str(arg) for arg in args],
                "cwd": str(cwd),
                "env": environment(env),
                "out": str(out),
                "err": str(err),
            }
            print(json.dumps(request), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            return Done(code, out.read_text(), err.read_text())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@cache
def forkserver() -> Forkserver:
    """The one for all tests, started for the first that asks."""
    server = Forkserver()
    atexit.register(server.close)
    return server


def copy_checkpoint(to: Path) -> Path:
    """The demo checkpoint, to be changed."""
    return Path(shutil.copytree(CHECKPOINT, to))


def write_outliers(to: Path) -> Path:
    """A checkpoint that answers as the demo's does in float, and that one scale a token cannot hold.

    Every second channel between value and output projection is 10,000 times larger, and made small again after.
    """
    folder = copy_checkpoint(to)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if ".attention.self.value." in name:
            tensor[::2] *= 1e4
        elif name.endswith(".attention.output.dense.weight"):
            tensor[:, ::2] /= 1e4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_slice(to: Path, **rows: int) -> Path:
    """The demo's data, cut to so many rows a split: `write_slice(path, train=100, validation=50)`."""
    to.mkdir(parents=True)
    for split, count in rows.items():
        lines = (DEMO / "data" / f"{split}.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        (to / f"{split}.csv").write_text("".join(lines[: count + 1]), encoding="utf-8")
    return to


def _serve() -> None:
    from hfq.cli import main, prepare_libraries

    prepare_libraries()
    import datasets  # noqa: F401
    from optimum.exporters.tasks import TasksManager  # noqa: F401
    from transformers import AutoTokenizer, BertForSequenceClassification  # noqa: F401

    import hfq.pipeline  # noqa: F401

    gc.freeze()  # or each fork would copy all that was imported, to look for garbage in it
    answers = os.dup(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
            main()
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))


def _become(request: Mapping[str, Any]) -> None:
    """Give this process what the command is to find."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["hfq", *request["args"]]


if __name__ == "__main__":
    _serve()
