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
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from . import __version__
from .errors import HfqError, SourceError, UsageError
from .files import write_text
from .output import TRIALS_FILE, Result, work_of
from .recipe import Recipe, is_path
from .resources import resource
from .ui import Reporter

CHUNK = 8 << 20  # bytes of a file in one event

# ("stage" | "note" | "warn", text), ("trials", text of the log), ("file", its path in the export), ("bytes", bytes of
# it), ("sha256", its digest), and last ("failed", HfqError) or ("done", None).
Event = tuple[str, Any]


@dataclass(frozen=True)
class Job:
    """A recipe with absolute paths. `trials`: its log so far; what that holds is not repeated."""

    recipe: Recipe
    command: str
    trials: str
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
    send(("note", f"on {socket.gethostname()}"))
    try:
        _check(job)
        _quantize(job, secret, output, send)
    except HfqError as error:
        send(("failed", error))
    except BaseException as error:  # of a type that may not exist, or not be pickled, where it goes
        text = f"{type(error).__name__}: {error}".replace(secret.token or "\0", "HF_TOKEN")
        send(("failed", HfqError(f"The worker on {socket.gethostname()} failed: {text}")))
    else:
        send(("done", None))


def _quantize(job: Job, secret: Secret, output: Path, send: Callable[[Event], None]) -> Result:
    import torch

    from .pipeline import quantize

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
        resume=True,
        command=job.command,
        copy_log=lambda text: send(("trials", text)),
    )


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
        self.warnings.append(text)
        self._send(("warn", text))


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
