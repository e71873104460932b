"""The process around a command: signals, libraries, and what goes wrong as one message and an exit code.

Exit codes: 0 done; 1 it could not be done; 2 wrong arguments; 3 no trial met the accuracy goal; 130 interrupted.
"""

import atexit
import logging
import os
import signal
import sys
from contextlib import suppress

from ..common.errors import HfqError
from ..common.redact import guard_streams, traceback_of
from .console import Interrupted, fail


def command() -> None:
    """`hfq` in a shell: `main`, and the end of the process without freeing one by one all that was imported."""
    code = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # nobody is there to read
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # first, so that it is called last
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


def main() -> None:
    """Run the command that the arguments name."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # pools end theirs so
    prepare_libraries()
    guard_streams()
    try:
        from .commands import app

        app()
    except HfqError as error:
        fail(str(error), error.exit_code)
    except Interrupted as interrupted:
        fail("Interrupted.", interrupted.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away: nothing left to say
        sys.exit(1)
    except OSError as error:
        _debug(error)
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except Exception as error:  # a traceback could show a stranger's text, or a token, and helps nobody but us
        _debug(error)
        if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):  # it has no class for a full disk
            fail(f"A file of what was computed cannot be written: {error}. Free space, or set TMPDIR.", 1)
        what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        fail(f"Unexpected {what.rstrip('.')}. This is an error of hfq: HFQ_DEBUG=1 shows where, for a report.", 1)


def prepare_libraries() -> None:
    """Quieten libraries before they are imported, by their environment and loggers. What the user set there stays."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
    quiet["DATASETS_VERBOSITY"] = "critical"  # its errors are raised too
    if not sys.stderr.isatty():
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    workers = {"TOKENIZERS_PARALLELISM": "false"}  # they are forked after the tokenizer ran
    for name, value in {**quiet, **workers}.items():
        os.environ.setdefault(name, value)
    for logger in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which warns of its GPU kernels
        logging.getLogger(logger).setLevel(logging.ERROR)


def _interrupt(number: int, _: object) -> None:
    raise Interrupted(number)


def _debug(error: Exception) -> None:
    if os.environ.get("HFQ_DEBUG"):
        sys.stderr.write(traceback_of(error))
