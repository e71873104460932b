"""Processes that measure: one asks, in JSON lines, and another answers. Both ends are here, and what a process takes.

Their own processes, so that memory is that of a user's program and no model profits from another's allocator settings.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ..common.errors import HfqError
from .forks import FORKS, fork_server

P = TypeVar("P", bound="Process")
S = TypeVar("S")


# hfq's modules where hfq itself is not installed: without its own hooks in transformers.
_ELSEWHERE = """
import runpy, sys, types
package = types.ModuleType("hfq")
package.__path__ = [sys.argv[1]]
sys.modules["hfq"] = package
runpy.run_module(sys.argv[2], run_name="__main__")
"""


class Process:
    """`python -m MODULE`, which answers each JSON line with another. `name`: of what it measures, for messages.

    `forked`: where that is possible, from a process that has imported the libraries. What importing takes is not to be
    measured then. `python`: an interpreter of another environment, with other packages.
    """

    def __init__(self, module: str, name: str, *, forked: bool = False, python: str | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed with the process; a pipe would fill up
        theirs, ours = os.pipe()
        self._requests = os.fdopen(ours, "w")
        ours, answers = os.pipe()
        self._answers = os.fdopen(ours)
        files = (theirs, answers, self._log.fileno())
        try:
            self._end = _fork(module, files) if forked and FORKS else _start(module, files, python)
        finally:
            os.close(theirs)
            os.close(answers)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        self.tell(request)
        return self.hear()

    def tell(self, request: dict[str, Any]) -> None:
        """Send one request."""
        with suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(request), file=self._requests, flush=True)

    def hear(self) -> dict[str, Any]:
        """Wait for the answer to one request."""
        line = self._answers.readline()
        if not line:
            self._log.seek(0)
            tail = self._log.read().strip().splitlines()[-1:]
            raise HfqError(f"The process that measures {self.name} ended early: {' '.join(tail) or 'no message'}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise HfqError(f"{self.name} cannot be loaded and run in a fresh process: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process and its pipes."""
        self._end()
        with suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()
        self._log.close()

    def __enter__(self: P) -> P:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start(module: str, files: Sequence[int], python: str | None) -> Callable[[], None]:
    """Start a module in a process of its own. Returns what ends it."""
    own = [sys.executable, "-m", module]
    elsewhere = [python, "-c", _ELSEWHERE, str(Path(__file__).parents[1]), module] if python else None
    environ = {**os.environ, **({"PYTHONPATH": ""} if python else {})}
    request, answer, log = files
    process = subprocess.Popen(  # noqa: S603 - our own module
        elsewhere or own, stdin=request, stdout=answer, stderr=log, env=environ
    )

    def end() -> None:
        process.kill()
        process.wait()

    return end


def _fork(module: str, files: Sequence[int]) -> Callable[[], None]:
    """The same from a process that has imported the libraries."""
    server = fork_server()
    return partial(server.end, server.start(module, files))


def serve(opened: Callable[[dict[str, Any]], S], answer: Callable[[S, dict[str, Any]], dict[str, Any]]) -> None:
    """Answer each request line; the first one opens the session that answers them all, itself included."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print, in C++ too; only answers may go to the asker
    sys.stdout = sys.stderr
    session: S | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            session = opened(request) if session is None else session
            found = answer(session, request)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


def peak_mib() -> float:
    """Resident peak of this process so far, MiB. `ru_maxrss` would count what the parent held before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def resident_mib() -> dict[str, float]:
    """Resident memory of this process now, MiB: `private` to it, and `shared` with others, which have it mapped too."""
    import psutil

    found = psutil.Process().memory_full_info()  # on Linux, from smaps
    return {"private": found.uss / 2**20, "shared": max(0, found.rss - found.uss) / 2**20}
