"""`--engine ray`: recipes run on the workers of a Ray cluster that is there already, and their results come here.

Each recipe is one task. This process keeps its trial log, writes its output folder and publishes it; a task that dies
with its worker or node is given to another, with the trials that were logged. So nothing is published twice, and a
worker needs no token but to pull from the Hub: it gets that as an object, which no list of tasks shows.
"""

import hashlib
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from huggingface_hub import get_token

from ..common.errors import ExportError, HfqError, UsageError
from ..common.files import user_path, write_text
from ..common.installation import installation
from ..common.names import EXPORT, TRIALS_FILE, is_path
from ..output import check_output, finish, work_folder
from ..recipe import Recipe
from ..report.report import Report, Result, read_report
from ..source.checkpoint import pull
from .local import Ended, Run
from .ray_job import Job, Secret, run_recipe

ATTEMPTS = 4  # as many as Ray's own tasks have
AHEAD = 16  # events that a worker may be ahead of us: 128 MiB of a file
_SETTINGS = (
    "HF_ENDPOINT",
    "HF_HUB_DISABLE_XET",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_VERBOSITY",
    "DATASETS_VERBOSITY",
    "HF_HUB_VERBOSITY",
)


def run_on_ray(
    runs: Sequence[Run], *, address: str | None, token: str | None, resume: bool
) -> Generator[Ended, None, None]:
    """Run all at once, as far as the cluster has room, and yield each when it ends. Nothing is published.

    Args:
        address: of the cluster; None for the one that RAY_ADDRESS names, or that runs on this machine.
        token, resume: as of `hfq.runs.local.run_here`.

    Raises:
        UsageError: Ray is not installed, or no cluster answers.
    """
    with _connected(address) as ray:
        secret = ray.put(Secret(token or get_token()))
        ended: SimpleQueue[Ended] = SimpleQueue()
        tasks = [_Task(run, ray, secret, resume=resume, alone=len(runs) == 1) for run in runs]
        threads = [threading.Thread(target=task.run, args=(ended.put,), daemon=True) for task in tasks]
        try:
            for thread in threads:
                thread.start()
            for _ in runs:
                yield ended.get()
        finally:
            for task in tasks:
                task.cancel()
            for thread in threads:
                if thread.is_alive():
                    thread.join()


class _Cancelled(BaseException):
    """The task of a run that is not wanted any more. Not an `Exception`: its work folder stays, for `--resume`."""


class _Task:
    """One run: its task on the cluster, and its folders here."""

    def __init__(self, run: Run, ray: Any, secret: Any, *, resume: bool, alone: bool) -> None:
        self._of = run
        self._ray = ray
        self._secret = secret
        self._resume = resume
        self._alone = alone
        self._lock = threading.Lock()
        self._cancelled = False
        self._events: Any = None

    def run(self, tell: Callable[[Ended], None]) -> None:
        """Tell the result, or what it failed with."""
        found: Result | Exception
        try:
            found = self._result()
        except _Cancelled:
            return
        except Exception as error:
            found = error
        tell((self._of, found))

    def cancel(self) -> None:
        """Stop the task if it is not over; then nothing is told."""
        with self._lock:
            self._cancelled = True
            if self._events is not None:
                self._ray.cancel(self._events, force=True)

    def _result(self) -> Result:
        output = self._of.recipe.output_folder
        check_output(output)
        self._warn_of_size()
        with work_folder(output) as work:
            if not self._resume:
                (work / TRIALS_FILE).unlink(missing_ok=True)
            self._attempt(work)
            report = check_received(work / EXPORT, self._of.recipe)
            finish(output, work)
        return Result(output, report)

    @property
    def _cpus(self) -> int:
        return self._of.recipe.threads or 1

    def _warn_of_size(self) -> None:
        """Ray itself waits without a word."""
        largest = max((node["Resources"].get("CPU", 0) for node in self._ray.nodes() if node["Alive"]), default=0)
        if self._cpus > largest:
            self._of.ui.warn(
                f"{self._of.name} has 'threads: {self._cpus}', and no node of the Ray cluster has more than {largest:g} "
                "CPUs: it waits until one does"
            )

    def _attempt(self, work: Path) -> None:
        """Fill the work folder, by another worker if one is lost."""
        failed = self._ray.exceptions
        lost = (
            failed.WorkerCrashedError,
            failed.NodeDiedError,
            failed.LocalRayletDiedError,
            failed.ObjectLostError,
            failed.OutOfMemoryError,
        )
        for _ in range(ATTEMPTS):
            try:
                return self._receive(self._submit(work), work)
            except (*lost, failed.TaskCancelledError) as error:
                if self._cancelled:
                    raise _Cancelled from error
                if not isinstance(error, lost):
                    raise HfqError(f"{self._of.name} was cancelled on the Ray cluster. Run it again.") from error
                self._of.ui.warn(f"Its worker was lost ({type(error).__name__}); another goes on with it")
            except failed.RayError as error:
                raise HfqError(
                    f"A worker of the Ray cluster cannot run {self._of.name}: {_last_line(error)}"
                ) from error
            finally:
                with self._lock:
                    self._events = None
        raise HfqError(
            f"{self._of.name} lost its worker {ATTEMPTS} times. Workers that run out of memory are lost like this: look "
            "at the cluster's logs, and give it larger nodes, or run it with --engine local."
        )

    def _submit(self, work: Path) -> Any:
        """A new task, as the generator of its events."""
        log = work / TRIALS_FILE
        job = Job(
            _absolute(self._of.recipe), self._of.command, log.read_text() if log.exists() else "", alone=self._alone
        )
        task = self._ray.remote(run_recipe).options(
            name=f"hfq {self._of.name}",
            num_cpus=self._cpus,
            num_returns="streaming",
            max_retries=0,  # by us, with the trials that were logged
            scheduling_strategy="SPREAD",
            _generator_backpressure_num_objects=AHEAD,
        )
        with self._lock:
            if self._cancelled:
                raise _Cancelled
            self._events = task.remote(job, self._secret)
            return self._events

    def _receive(self, events: Any, work: Path) -> None:
        """Do what the events say until the last one."""
        shutil.rmtree(work / EXPORT, ignore_errors=True)
        export = Received(work / EXPORT)
        for event in events:
            kind, value = self._ray.get(event)
            try:
                if kind in ("stage", "note", "warn"):
                    getattr(self._of.ui, kind)(value)
                elif kind == "trials":
                    write_text(work / TRIALS_FILE, value)
                elif kind == "failed":
                    raise value
                elif kind != "done":
                    getattr(export, kind)(value)
            except OSError as error:
                raise ExportError(
                    f"{work} cannot be written: {error.strerror or error}. Free space or choose another --output."
                ) from error


class Received:
    """Writes files that arrive in pieces. Its methods are named as the events are (`hfq.runs.ray_job.Event`)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder
        self._digest = hashlib.sha256()

    def file(self, name: str) -> None:
        self._path = self._folder / name
        if not self._path.resolve().is_relative_to(self._folder.resolve()):
            raise ExportError(
                f"A worker of the Ray cluster sent a file called {name!r}, which leads out of {self._folder}."
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        self._digest = hashlib.sha256()

    def bytes(self, piece: bytes) -> None:
        self._digest.update(piece)
        with self._path.open("ab") as file:
            file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    def sha256(self, expected: str) -> None:
        if self._digest.hexdigest() != expected:
            raise ExportError(f"{self._path} is not what the worker wrote: it was damaged on its way. Run it again.")


def check_received(export: Path, recipe: Recipe) -> Report:
    """The report of an export that another machine sent, once its files are what such files are.

    Raises:
        ExportError, SourceError: they are not.
    """
    pull(str(export.resolve()), trust_remote_code=recipe.trust_remote_code)
    report = read_report(export)
    if report.of_object:
        raise ExportError(f"{export} is not what a recipe makes. Run it again.")
    return report


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster for the length of the block. None is ever started here."""
    try:
        import ray
        from ray._private import services, worker
    except ImportError as error:
        raise UsageError(f"--engine ray needs Ray, which is not installed: {installation('ray')}.") from error
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        try:
            address = str(services.canonicalize_bootstrap_address(address))
        except ConnectionError as error:
            raise UsageError(_no_cluster("auto", _last_line(error))) from error
    _check_address(address)
    # Raylets tell every driver of workers that are lost, on standard output, which is for data.
    worker._worker_logs_enabled = False
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            runtime_env={"env_vars": _settings()},
        )
    except (Exception, SystemExit) as error:
        raise UsageError(_no_cluster(address, _last_line(error))) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself tries for two minutes, and takes "local" as leave to start a cluster."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise UsageError(
            f"{address!r} is no address of a Ray cluster. Expected host:port as `ray start --head` shows it, on a "
            "machine that is a node of the cluster, or 'auto' for the one that runs on this machine."
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UsageError(_no_cluster(address, error.strerror or str(error))) from error


def _no_cluster(address: str, reason: str) -> str:
    return (
        f"No Ray cluster answers at {address!r} ({reason}). Start one with `ray start --head`, name it with --ray-address "
        "or RAY_ADDRESS, or run with --engine local."
    )


def _settings() -> dict[str, str]:
    """Variables of this process that change what a run does. Ray shows them to whoever looks: no token is among them."""
    names = [*_SETTINGS, *(name for name in os.environ if name.startswith("HFQ_"))]
    return {name: os.environ[name] for name in names if name in os.environ}


def _absolute(recipe: Recipe) -> Recipe:
    """Its folders as every node has to have them."""
    paths = {
        key: str(user_path(value).resolve())
        for key in ("checkpoint", "dataset")
        if (value := getattr(recipe, key)) and is_path(value)
    }
    return recipe.model_copy(update=paths)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
