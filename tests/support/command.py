"""The `hfq` command in tests: as a user starts it, or forked from a process that has imported the libraries.

Importing them takes four seconds, so the second way is for the many runs that are over soon. It is the same `main`
in a process of its own, with its own working folder, environment, standard output and standard error.
"""

import atexit
import gc
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from safetensors.torch import load_file, save_file

PATIENCE = 1200.0  # seconds that only what hangs takes, also on a machine that does ten times as much beside
MEMORY = 1 << 30
SECONDS = 60
LIBRARY_PYTHON = "HFQ_TESTS_PYTHON"  # the variable that holds `library_python`
LIBRARIES = (
    "matplotlib.backends.backend_agg",
    "pandas",
    "pyarrow.dataset",
    "scipy.io",
    "sklearn.metrics",
    "sympy.tensor.tensor",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
)
RUNS = 1 << 20  # in place of the exit code of a process that has not ended
DEPENDS_ON_TIME = ("created", "baseline_pass_s", "duration_s", "examples_per_s", "load_s", "peak_memory_mib")
HFQ = str(Path(sys.executable).with_name("hfq"))
ROOT = Path(__file__).parents[2]
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
        [command, *map(str, args)], cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=PATIENCE
    )
    return Done(done.returncode, done.stdout, done.stderr)


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment with changes; None takes a variable away. One thread: more only wait here."""
    changed = {"OMP_NUM_THREADS": "1", **os.environ, **(changes or {})}
    return {name: value for name, value in changed.items() if value is not None}


def hfq_in(env: Mapping[str, str | None], *args: object, cwd: Path) -> Done:
    """`hfq` with changes to what libraries of the Hub read when they are imported, which a fork does then."""
    return hfq(*args, cwd=cwd, env=env, command=str(Path(library_python()).with_name("hfq")))


def until(true: Callable[[], bool]) -> None:
    """Wait for something to become so."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.01)


class Running:
    """The command while it runs, killed at the end of the `with` block if it has not ended.

    `fresh`: as a user starts it; else it is forked from the server for all tests.
    """

    def __init__(
        self,
        *args: object,
        cwd: Path,
        env: Mapping[str, str | None] | None = None,
        fresh: bool = False,
    ) -> None:
        self.process: subprocess.Popen[str] | Forked
        if fresh:
            self.process = subprocess.Popen(
                [HFQ, *map(str, args)],
                cwd=cwd,
                env=environment(env),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        else:
            self.process = forkserver().start(*args, cwd=cwd, env=env)
        self.err = ""
        self._timer = threading.Timer(PATIENCE, self.process.kill)
        self._timer.start()

    def until(self, text: str) -> str:
        """Wait for a line on standard error that holds `text`; return it."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.err += line
            if text in line:
                return line
        raise AssertionError(f"It ended without {text!r}: {self.err}")

    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def stop(self, number: signal.Signals) -> Done:
        """Send a signal to it and what it started, and wait for the end."""
        os.killpg(self.process.pid, number)
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


class Forked:
    """A process of a `Forkserver`, with those methods of `subprocess.Popen` that `Running` needs."""

    def __init__(self, pid: int, folder: "tempfile.TemporaryDirectory[str]", ask: Callable[[object], int]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stderr = (Path(folder.name) / "err").open()  # waits until the other side is opened
        self._folder = folder
        self._ask = ask

    def poll(self) -> int | None:
        return self._wait("poll")

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        if self.stderr.closed:
            return "", ""
        with self.stderr, self._folder:
            err = self.stderr.read()
            self._wait("wait")
            return (Path(self._folder.name) / "out").read_text(), err

    def _wait(self, how: str) -> int | None:
        if self.returncode is None:
            code = self._ask({"do": how, "pid": self.pid})
            self.returncode = None if code == RUNS else code
        return self.returncode


class Forkserver:
    """Runs the command in forks of a process that has imported the libraries, and nothing else, before."""

    def __init__(
        self, env: Mapping[str, str | None] | None = None, *, fork_workers: bool = False, imports: str = "hfq"
    ) -> None:
        """`env`: changes to its environment. `fork_workers`: of the processes too in which hfq measures; their figures
        mean nothing then. `imports`: what its forks know. "stock": transformers, and no hfq. "libraries": what these
        stand on; where `LIBRARY_PYTHON` names a server of that, others are forked from it.
        """
        self._env = dict(env or {})
        self._folder = tempfile.TemporaryDirectory(prefix="hfq-forkserver-")
        python = os.environ.get(LIBRARY_PYTHON, sys.executable)
        self._process = subprocess.Popen(
            [python, __file__, imports, *([self._folder.name] if fork_workers else [])],
            env=environment(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hfq(
        self,
        *args: object,
        cwd: Path,
        env: Mapping[str, str | None] | None = None,
        kill_at: str | None = None,
        limited: bool = False,
        command: str = "hfq",
    ) -> Done:
        """Like `hfq` above. Variables that a library reads when it is imported, as HF_ENDPOINT, cannot be changed.

        `kill_at`: send SIGKILL once standard error holds this. `limited`: it may have `MEMORY` more than the process
        it is forked from, and `SECONDS` of CPU time; one that takes more ends by an error or a signal. `command`: or
        "optimum-cli".
        """
        with tempfile.TemporaryDirectory() as folder:
            request = self._request(args, folder, cwd, env)
            code = self._ask({**request, "do": "run", "kill_at": kill_at, "limited": limited, "command": command})
            return Done(code, (Path(folder) / "out").read_text(), (Path(folder) / "err").read_text())

    def start(self, *args: object, cwd: Path, env: Mapping[str, str | None] | None = None) -> Forked:
        """Start the command, in a session of its own, and do not wait for it."""
        folder = tempfile.TemporaryDirectory()
        os.mkfifo(Path(folder.name) / "err")
        request = self._request(args, folder.name, cwd, env)
        pid = self._ask({**request, "do": "start", "limited": False, "command": "hfq"})
        return Forked(pid, folder, self._ask)

    def _request(
        self, args: tuple[object, ...], folder: str, cwd: Path, env: Mapping[str, str | None] | None
    ) -> dict[str, Any]:
        return {
            "args": [str(arg) for arg in args],
            "cwd": str(cwd),
            "env": environment({**self._env, **(env or {})}),
            "out": f"{folder}/out",
            "err": f"{folder}/err",
        }

    def _ask(self, request: object) -> int:
        assert self._process.stdin and self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    @property
    def programs(self) -> Path:
        """A folder of programs that are forked: `hfq`, and `python -m hfq.MODULE`; of stock transformers, `python -c CODE`;
        of the libraries, all of these. Other Python is started by `python`.
        """
        self._ask({"do": "answer"})  # they are there once it does
        return Path(self._folder.name)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._folder.cleanup()


@cache
def forkserver() -> Forkserver:
    """The one for all tests, started for the first that asks. What it says of time and memory means nothing."""
    server = Forkserver(fork_workers=True)
    atexit.register(server.close)
    return server


@cache
def stock_python() -> str:
    """`stock_python() -c CODE` is Python that has imported transformers, and never hfq."""
    server = Forkserver(fork_workers=True, imports="stock")
    atexit.register(server.close)
    return str(server.programs / "python")


@cache
def library_python() -> str:
    """Python for the processes of tests, each with an environment that libraries of the Hub read when it imports them."""
    server = Forkserver(fork_workers=True, imports="libraries")
    atexit.register(server.close)
    return str(server.programs / "python")


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


def timeless(value: Any) -> Any:
    """A report without what differs between two runs."""
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name not in DEPENDS_ON_TIME}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def write_slice(to: Path, **rows: int) -> Path:
    """The demo's data, cut to so many rows a split: `write_slice(path, train=100, validation=50)`."""
    to.mkdir(parents=True)
    for split, count in rows.items():
        lines = (DEMO / "data" / f"{split}.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        (to / f"{split}.csv").write_text("".join(lines[: count + 1]), encoding="utf-8")
    return to


def _serve() -> None:
    imports, *folder = sys.argv[1:] or ["hfq"]
    _IMPORTS[imports]()
    # Or each fork would copy all that was imported, to look for garbage in it and at what is to be done when it ends.
    gc.freeze()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    answers = os.dup(1)
    if folder:
        sys.executable = _fork_workers(Path(folder[0]), _FORKS[imports])
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] in ("run", "start"):
            child = os.fork()
            if child == 0:
                _become(request)
                _end(_call(_command(request["command"])))
            answer = child if request["do"] == "start" else _wait(child, request["kill_at"], Path(request["err"]))
        elif request["do"] == "answer":
            answer = 0
        else:
            ended, status = os.waitpid(request["pid"], os.WNOHANG if request["do"] == "poll" else 0)
            answer = os.waitstatus_to_exitcode(status) if ended else RUNS
        os.write(answers, b"%d\n" % answer)


def _import_libraries() -> None:
    """What takes longest, and asks no variable of the Hub's."""
    for module in LIBRARIES:
        import_module(module)
    assert "huggingface_hub" not in sys.modules


def _import_hfq() -> None:
    from hfq.cli.main import prepare_libraries

    prepare_libraries()
    import compressed_tensors.linear.compressed_linear  # noqa: F401
    import datasets  # noqa: F401
    import scipy.io  # noqa: F401 - by datasets
    import sentence_transformers  # noqa: F401
    import sympy.tensor.tensor  # noqa: F401 - by torch.export
    import torch._inductor.compile_fx  # noqa: F401
    from torchmetrics import functional  # noqa: F401

    import hfq.cli.commands
    import hfq.data.rows
    import hfq.hub.local
    import hfq.measure.validation
    import hfq.pipeline
    import hfq.runs.local
    import hfq.runtime.loading.quantizer
    import hfq.source.positions  # noqa: F401
    from hfq.tasks.registry import tasks

    tasks()
    _use_once()


def _import_stock() -> None:
    import compressed_tensors.linear.compressed_linear  # noqa: F401
    import transformers.pipelines
    import transformers.quantizers.quantizer_compressed_tensors  # noqa: F401


def _command(name: str) -> Callable[[], object]:
    if name == "hfq":
        from hfq.cli.main import main
    else:
        from optimum.commands.optimum_cli import main
    main_: Callable[[], object] = main
    return main_


def _use_once() -> None:
    """What libraries import and prepare only when they are used, which each fork would do again, for a second."""
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with torch.random.fork_rng(), torch.inference_mode():
        model = AutoModelForSequenceClassification.from_pretrained(CHECKPOINT)
        batch = AutoTokenizer.from_pretrained(CHECKPOINT)(["one", "two"], return_tensors="pt")
        torch.export.export(model, (), dict(batch), strict=False)
    figure = Figure()
    figure.add_subplot().set_title("text")
    FigureCanvasAgg(figure).draw()
    Image.preinit()


def _fork_workers(folder: Path, forks: tuple[str, ...]) -> str:
    """Start a process that forks for those who call programs in `folder`; return the one in place of python."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen()
    alive, held = os.pipe()  # closed when the last process that uses the workers has ended
    if os.fork() == 0:
        os.close(held)
        for number in (0, 1):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
        while alive not in select.select([listener, alive], [], [])[0]:
            connection, _ = listener.accept()
            request, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
            if request and os.fork() == 0:  # who asks may be killed before
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, file in enumerate(files):
                    os.dup2(file, number)
                code = _be(*json.loads(request), programs=folder)
                with suppress(OSError):  # who asks may be killed meanwhile
                    connection.send(bytes([code]))
                _end(code)
            for file in (*files, connection.detach()):
                os.close(file)
        os._exit(0)
    for name in ("hfq", "python"):
        launcher = folder / name
        launcher.write_text(_LAUNCHER.format(python=sys.executable, socket=folder / "socket", forks=forks))
        launcher.chmod(0o700)
    return str(folder / "python")


def _be(words: list[str], environ: Mapping[str, str], folder: str, *, programs: Path) -> int:
    """Be a module of Python's, or `hfq`, with its arguments. Returns its exit code."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    how, *sys.argv = words[words[0] == "-u" :]
    if how == "-c":
        code, sys.argv[0] = sys.argv[0], how
        return _call(partial(exec, code, {"__name__": "__main__"}))
    if how == "-m":
        return _call(partial(runpy.run_module, sys.argv[0], run_name="__main__", alter_sys=True))
    sys.argv = words
    if how == __file__:
        return _call(_serve)
    sys.executable = str(programs / "python")  # in which it measures
    return _call(_command(how))


def _call(program: Callable[[], object]) -> int:
    """Run it to its end. Returns its exit code."""
    try:
        program()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> NoReturn:
    """End as a process does, but for freeing every object there is: most are the server's, and each would be copied."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_IMPORTS = {"hfq": _import_hfq, "stock": _import_stock, "libraries": _import_libraries}
_FORKS = {
    "hfq": ("-m hfq.", "-m support."),
    "stock": ("-c ",),  # any code
    "libraries": (__file__, "-m hfq.", "-c ", "-u -c "),  # the last as pytest-xdist starts its workers
}
_LAUNCHER = """#!{python} -IS
import json, os, socket, sys
program, *words = sys.argv
if not program.endswith("python"):
    words = ["hfq", *words]
elif not " ".join(words).startswith({forks}):
    os.execv("{python}", ["{python}", *words])
connection = socket.socket(socket.AF_UNIX)
connection.connect("{socket}")
socket.send_fds(connection, [json.dumps([words, dict(os.environ), os.getcwd()]).encode()], [0, 1, 2])
for number in (0, 1, 2):
    os.close(number)
sys.exit((connection.recv(1) or b"?")[0])  # waits until the other side ends; it may be killed
"""


def _wait(child: int, kill_at: str | None, err: Path) -> int:
    """The exit code of a child that has ended, by itself or because it was to be killed."""
    while kill_at:
        if err.is_file() and kill_at in err.read_text():
            os.kill(child, signal.SIGKILL)
            break
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(request: Mapping[str, Any]) -> None:
    """Give this process what the command is to find."""
    if request["do"] == "start":
        os.setsid()
    os.chdir(request["cwd"])
    if request["limited"]:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    os.environ.clear()
    os.environ.update(request["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [request["command"], *request["args"]]


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    _serve()
