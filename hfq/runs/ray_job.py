"""What a worker of a Ray cluster does: it runs a recipe as this machine would, and sends back what comes of it.

It has no disk in common with who asked: messages, the trial log and the exported files all leave as events, in order.
It publishes nothing.
"""

import hashlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from filelock import FileLock, Timeout
from rich.console import Console

from ..common.errors import HfqError, SourceError, UsageError
from ..common.files import write_text
from ..common.names import TRIALS_FILE, is_path
from ..common.redact import redact, remember
from ..common.resources import resource
from ..common.ui import Reporter
from ..common.version import __version__
from ..output import work_of
from ..recipe import Recipe
from ..report.report import Result

if TYPE_CHECKING:
    from ..data.session import Session
    from ..pipeline import TrialContext
    from ..ptq.scheme import Plan
    from ..tuning.search import Score

CHUNK = 8 << 20  # bytes of a file in one event

# ("stage" | "note" | "warn", text), ("trials", text of the log), ("file", its path in the export), ("bytes", bytes of
# it), ("sha256", its digest), and last ("failed", HfqError) or ("done", None).
Event = tuple[str, Any]


@dataclass(frozen=True)
class Job:
    """A recipe with absolute paths. `trials`: its log so far; what that holds is not repeated.

    `alone`: no other recipe waits for the cluster, so that its trials may be spread too.
    """

    recipe: Recipe
    command: str
    trials: str
    alone: bool
    version: str = __version__


@dataclass(frozen=True)
class Secret:
    """A token that no `repr` shows: Ray and tracebacks print arguments."""

    token: str | None

    def __repr__(self) -> str:
        return "Secret(…)"


def run_recipe(job: Job, secret: Secret) -> Iterator[Event]:
    """Run a recipe, and yield what happens when it does."""
    events: SimpleQueue[Event] = SimpleQueue()
    with _place() as place:
        output = place / job.recipe.output_folder.name
        # In a thread, as what happens is told by calls, and has to be yielded from here.
        threading.Thread(target=_run, args=(job, secret, output, events.put), daemon=True).start()
        while True:
            kind, value = events.get()
            if kind == "done":
                yield from _files(output)
            yield kind, value
            if kind in ("done", "failed"):
                return


def _run(job: Job, secret: Secret, output: Path, send: Callable[[Event], None]) -> None:
    """Send the events of a run, and at last whether it is done or has failed."""
    remember(secret.token)
    send(("note", _here()))
    try:
        _check(job)
        _quantize(job, secret, output, send)
    except HfqError as error:
        send(("failed", error))
    except BaseException as error:  # of a type that may not exist, or not be pickled, where it goes
        text = redact(f"{type(error).__name__}: {error}")
        send(("failed", HfqError(f"The worker on {socket.gethostname()} failed: {text}")))
    else:
        send(("done", None))


def _quantize(job: Job, secret: Secret, output: Path, send: Callable[[Event], None]) -> Result:
    import torch

    from ..pipeline import Execution, quantize

    # Workers run several recipes, one after the other. Ray gives each as many CPUs as it has threads.
    torch.set_num_threads(job.recipe.threads or 1)
    work = work_of(output)
    work.mkdir()
    write_text(work / TRIALS_FILE, job.trials)
    return quantize(
        job.recipe.model_copy(update={"output": str(output)}),
        recipes=resource("pipelines"),
        ui=_Sender(send),
        token=secret.token,
        execution=Execution(
            job.command,
            resume=True,
            copy_log=lambda text: send(("trials", text)),
            helped_by=partial(_Helpers, job.recipe, secret, send) if job.alone else None,
        ),
    )


class _Helpers:
    """Other workers of the cluster, which evaluate trials of this one's recipe (`hfq.tuning.lookahead.Helpers`)."""

    def __init__(self, recipe: Recipe, secret: Secret, send: Callable[[Event], None], context: "TrialContext") -> None:
        import ray

        self._ray = ray
        self._send = send
        self._context = context
        self._arguments = ray.put((recipe, secret))
        threads = recipe.threads or 1
        self._room = int(ray.available_resources().get("CPU", 0)) // threads
        self._task = ray.remote(score_trial).options(
            name=f"hfq trial of {recipe.name}",
            num_cpus=threads,
            num_returns="streaming",
            max_retries=0,
            scheduling_strategy="SPREAD",
        )
        self._begun: list[Any] = []

    def begin(self, plan: "Plan") -> Any | None:
        self._begun = [one for one in self._begun if not self._ray.wait([one.completed()], timeout=0)[0]]
        if len(self._begun) >= self._room:
            return None
        # In a list, so that it is unpacked, and torch imported, only when the task has said that it has begun.
        self._begun.append(self._task.remote(self._arguments, [self._ray.put((plan, self._context))]))
        return self._begun[-1]

    def score(self, begun: Any) -> "Score | None":
        if not begun.next_ready():  # it waits for room that somebody else has taken
            self.drop(begun)
            return None
        try:
            place, score = (self._ray.get(found) for found in begun)
        except self._ray.exceptions.RayError:
            return None
        self._send(("note", f"evaluated {place}:"))
        return score

    def drop(self, begun: Any) -> None:
        self._ray.cancel(begun, force=True)


def score_trial(arguments: tuple[Recipe, Secret], trial: list[Any]) -> Iterator["str | Score"]:
    """Evaluate a plan of another worker's run. Where is said first: then it has begun."""
    yield _here()
    import ray
    import torch

    from ..pipeline import run_trial

    recipe, secret = arguments
    remember(secret.token)
    torch.set_num_threads(recipe.threads or 1)
    plan, context = ray.get(trial[0])
    yield run_trial(_session(recipe.model_dump_json(), secret), plan, context)


@lru_cache(maxsize=1)  # a worker that is asked again is mostly asked about the same run
def _session(recipe: str, secret: Secret) -> "Session":
    from ..data.session import open_session

    quiet = Reporter(Console(quiet=True))
    return open_session(Recipe.model_validate_json(recipe), recipes=resource("pipelines"), ui=quiet, token=secret.token)


class _Sender(Reporter):
    """A reporter whose lines are events."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        super().__init__()
        self._send = send

    def stage(self, text: str) -> None:
        self._send(("stage", text))

    def note(self, text: str) -> None:
        self._send(("note", text))

    def warn(self, text: str) -> None:
        self.warnings.append(redact(text))
        self._send(("warn", text))


def _here() -> str:
    return f"on {socket.gethostname()}, process {os.getpid()}"


def _check(job: Job) -> None:
    host = socket.gethostname()
    if job.version != __version__:
        raise UsageError(
            f"The worker on {host} has hfq {__version__}, and this is {job.version}. Install the same on the cluster."
        )
    for key in ("checkpoint", "dataset"):
        value = getattr(job.recipe, key)
        if value and is_path(value) and not Path(value).exists():
            raise SourceError(
                f"The {key} {value} is not on {host}, where a worker of the Ray cluster looked for it. Expected a "
                "folder that all nodes have under this path, or a Hub id; --engine local runs it here."
            )


def _files(folder: Path) -> Iterator[Event]:
    """Every file of a folder, in pieces."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield "file", path.relative_to(folder).as_posix()
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
                yield "bytes", piece
        yield "sha256", digest.hexdigest()


@contextmanager
def _place() -> Iterator[Path]:
    """A folder for one run. What a killed worker left is taken away by the next one on its machine."""
    root = Path(tempfile.gettempdir()) / f"hfq-ray-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    with FileLock(root / ".lock"):
        for left in root.iterdir():
            if left.is_dir() and _is_free(left):
                shutil.rmtree(left, ignore_errors=True)
        place = root / uuid4().hex
        place.mkdir()
        lock = FileLock(place / ".lock")
        lock.acquire()
    try:
        yield place
    finally:
        lock.release()
        shutil.rmtree(place, ignore_errors=True)


def _is_free(folder: Path) -> bool:
    try:
        with FileLock(folder / ".lock", timeout=0):
            return True
    except Timeout:
        return False
