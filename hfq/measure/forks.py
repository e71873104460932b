"""Processes forked from one that has imported the libraries: that takes milliseconds, and importing them takes seconds.

On Linux only. That one process, `python -m hfq.measure.forks`, has computed nothing, so it holds no threads that a fork
would lose; the process that uses hfq does.
"""

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from ..common.errors import HfqError

FORKS = sys.platform == "linux"
IMPORTED = (
    "safetensors.torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "compressed_tensors",
    "hfq.runtime.loading.quantizer",
    "hfq.measure.model_process",
)


class ForkServer:
    """Starts a process for each that is to be measured. It is there at once, and has imported what it forks with later."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed with the process
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
                [sys.executable, "-m", __name__], stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=self._log
            )
        atexit.register(self.close)

    def start(self, module: str, files: Sequence[int]) -> int:
        """Run the `main` of a module of ours, with `files` as standard input, output and error. Returns its process id."""
        request = {"module": module, "environ": dict(os.environ), "folder": str(Path.cwd())}
        return self._ask(request, files)

    def end(self, process: int) -> None:
        """Kill what `start` returned."""
        self._ask({"end": process})

    def close(self) -> None:
        """End the server, whatever it is importing. What it started ends with its standard input."""
        self._socket.close()
        self._process.kill()
        self._process.wait()
        self._log.close()
        atexit.unregister(self.close)

    def _ask(self, request: dict[str, Any], files: Sequence[int] = ()) -> int:
        try:
            text = json.dumps(request).encode() + b"\n"
            sent = socket.send_fds(self._socket, [text], files)
            self._socket.sendall(text[sent:])
            answer = self._socket.recv(64)
        except OSError:
            answer = b""
        if not answer:
            self._log.seek(0)
            tail = self._log.read().strip().splitlines()[-1:]
            raise HfqError(f"The process that measuring ones are forked from ended early: {' '.join(tail)}.")
        return int(answer)


def fork_server() -> ForkServer:
    """The one of this process. Whoever calls this early has it import while something else is done."""
    return _server_of(os.getpid())


@lru_cache(maxsize=1)
def _server_of(process: int) -> ForkServer:
    """A process that was forked has not the one of its parent: two would answer each other's questions."""
    return ForkServer()


def main() -> None:
    """Fork for each request, until nobody is there to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks hears it too, and decides
    asker = socket.socket(fileno=os.dup(0))
    for module in IMPORTED:
        import_module(module)
    gc.freeze()  # or each fork would copy all that was imported, to look for garbage in it
    started: set[int] = set()
    while received := _receive(asker):
        request, files = received
        if "end" in request:
            answer = request["end"]
            started.discard(answer)
            _end(answer)
        else:
            answer = os.fork()
            if answer == 0:
                asker.close()
                _become(request, files)
            started.add(answer)
            for file in files:
                os.close(file)
        asker.sendall(b"%d" % answer)
    for process in started:
        _end(process)


def _receive(asker: socket.socket) -> tuple[dict[str, Any], Sequence[int]] | None:
    text, files, _, _ = socket.recv_fds(asker, 1 << 16, 3)
    while text and not text.endswith(b"\n"):
        text += asker.recv(1 << 16)
    return (json.loads(text), files) if text else None


def _end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def _become(request: dict[str, Any], files: Sequence[int]) -> NoReturn:
    """Be a process that runs one module to its end."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environ"])
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        from ..common.memory import map_code

        map_code()
        import_module(request["module"]).main()
    except Exception:
        traceback.print_exc()
    finally:  # without the finalizers of all that was imported
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
