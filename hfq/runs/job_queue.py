"""A queue of jobs in a folder, which a killed process leaves as it was: what was running is waiting again.

One process at a time takes jobs from it. A job is a file, whose name says which job it is: the same one twice is one.
"""

import hashlib
import json
import os
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from ..common.errors import UsageError
from ..common.files import write_text


@dataclass(frozen=True)
class Job:
    """A recipe, by file name, to be looked at because of a revision. `attempts`: how often it was begun."""

    recipe: str
    revision: str
    attempts: int = field(default=0, compare=False)

    @property
    def file_name(self) -> str:
        # A digest: what the Hub sends is not to choose a path.
        return hashlib.sha256(f"{self.recipe}\n{self.revision}".encode()).hexdigest() + ".json"


class JobQueue:
    """Jobs in `folder/waiting` and `folder/running`. Any thread may put, one thread takes.

    Args:
        retry_s: seconds until a job that failed is taken again; twice as many after each further attempt.

    Raises:
        UsageError: another process has the queue, or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, retry_s: float = 60) -> None:
        self._waiting, self._running = folder / "waiting", folder / "running"
        self._retry_s = retry_s
        self._due: dict[str, float] = {}  # by the monotonic clock, and only here: after a restart all are due
        self._changed = threading.Condition()
        try:
            for part in (self._waiting, self._running):
                part.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock", timeout=0)
            self._lock.acquire()
        except Timeout as error:
            raise UsageError(f"Another hfq works on the queue {folder}. Stop it, or choose another --queue.") from error
        except OSError as error:
            raise UsageError(
                f"The queue {folder} cannot be written: {error.strerror}. Choose another --queue."
            ) from error
        for path in self._running.glob("*.json"):
            path.replace(self._waiting / path.name)

    def close(self) -> None:
        """Let another process have the queue."""
        self._lock.release()

    def put(self, job: Job) -> bool:
        """Queue a job; False if it is queued or running already. It is on disk when this returns."""
        with self._changed:
            if any((part / job.file_name).exists() for part in (self._waiting, self._running)):
                return False
            self._write(job)
            self._changed.notify()
            return True

    def take(self) -> Job:
        """The job that has waited longest; waits for one if need be."""
        with self._changed:
            while True:
                now = time.monotonic()
                waiting = sorted(self._waiting.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
                path = next((path for path in waiting if self._due.get(path.name, now) <= now), None)
                if path is None:
                    due = [self._due[path.name] for path in waiting]
                    self._changed.wait(min(due) - now if due else None)
                    continue
                job = _read(path)
                if job is None or job.file_name != path.name:
                    path.unlink()  # not written by this version of hfq; who serves looks at every recipe at start
                    continue
                job = replace(job, attempts=job.attempts + 1)
                self._write(job)  # counted before it begins: one that kills the process is not begun for ever
                path.replace(self._running / path.name)
                return job

    def finish(self, job: Job) -> None:
        """Forget a job that was taken."""
        with self._changed:
            (self._running / job.file_name).unlink()
            self._due.pop(job.file_name, None)

    def retry(self, job: Job) -> float:
        """Let a job that was taken wait; return for how many seconds."""
        wait_s = self._retry_s * 2 ** (job.attempts - 1)
        with self._changed:
            self._due[job.file_name] = time.monotonic() + wait_s
            (self._running / job.file_name).replace(self._waiting / job.file_name)
        return wait_s

    def _write(self, job: Job) -> None:
        path = self._waiting / job.file_name
        write_text(path, json.dumps(asdict(job)) + "\n")
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too
        finally:
            os.close(folder)


def _read(path: Path) -> Job | None:
    try:
        return Job(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None
