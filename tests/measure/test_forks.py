"""Processes that measure are there at once, have their own standard streams, and end when they are closed."""

import os
import signal
from pathlib import Path

import pytest
from support.command import until

from hfq.common.errors import HfqError
from hfq.measure.forks import FORKS
from hfq.measure.process import Process

MODULE = "hfq.measure.model_process"
forked = pytest.mark.skipif(not FORKS, reason="libraries survive a fork on Linux only")
pytestmark = [forked, pytest.mark.usefixtures("forked_workers")]


def test_an_answer_is_for_who_asked() -> None:
    with Process(MODULE, "one", forked=True) as one, Process(MODULE, "two", forked=True) as two:
        for process in (one, two):
            with pytest.raises(HfqError, match=f"{process.name} cannot be loaded .*KeyError"):
                process.ask({"do": "open"})


def test_a_process_that_ended_by_itself_is_said_and_closed() -> None:
    with Process("hfq.measure.no_such_module", "it", forked=True) as process, pytest.raises(HfqError, match="no_such"):
        process.ask({"do": "open"})


def test_it_has_the_folder_and_the_signals_of_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = Process(MODULE, "it", forked=True)
    until(lambda: len(_in_folder(tmp_path)) == 2)
    (worker,) = _in_folder(tmp_path) - {os.getpid()}
    os.kill(worker, signal.SIGINT)
    until(lambda: _folder(worker) is None)
    with pytest.raises(HfqError, match="ended early"):
        process.ask({"do": "open"})
    process.close()


def _in_folder(folder: Path) -> set[int]:
    """Processes whose working folder it is."""
    processes = {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()}
    return {process for process in processes if _folder(process) == folder}


def _folder(process: int) -> Path | None:
    try:
        return Path(f"/proc/{process}/cwd").readlink()
    except OSError:
        return None
