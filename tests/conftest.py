"""One local Hub for the whole session, which every client library takes for the real one.

They read these variables when they are imported, so the hub starts with this file, before any test is.
"""

import atexit
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import execnet
import pytest
from support.command import LIBRARY_PYTHON, forkserver, library_python, write_slice

from hfq.hub.local import LocalHub

LONGEST = (
    "test_ray.py",
    "test_compile.py",
    "test_cli.py",
    "test_faults.py",
    "test_bad_input.py",
    "test_certainty.py",
    "test_rewriting.py",
    "test_warming.py",
    "test_token_classification.py",
    "test_regression.py",
    "test_fidelity.py",
    "test_documents.py",
    "test_fit.py",
)

_home = tempfile.TemporaryDirectory(prefix="hfq-tests-")
_hub = LocalHub()
_hub.start()
atexit.register(_home.cleanup)
atexit.register(_hub.stop)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other core is the other worker's
os.environ.update(
    _hub.environment(),
    HF_HOME=_home.name,
    HF_DATASETS_CACHE=f"{_home.name}/datasets",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HFQ_HUB_PATIENCE="1",
    AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL="O0",  # what calls the kernels; they are optimized as a user's are
    TORCHINDUCTOR_VEC_ISA_OK="1",  # else it builds a library in each empty cache to see what the compiler knows
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For the whole suite one process more than there are cores, each with a file of tests at a time: tests wait a third
    of their time for processes that they started.

    What somebody names, a file or a keyword, runs in this process: more would only import the libraries again.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 2) + 1 if whole and cores > 1 and not config.option.keyword else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[execnet.XSpec]) -> None:
    """Workers, and what they start, are forked from a process that has imported what all of them need."""
    os.environ[LIBRARY_PYTHON] = library_python()
    specs[:] = [execnet.XSpec(f"popen//id={spec.id}//python={os.environ[LIBRARY_PYTHON]}") for spec in specs]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes first, or one worker would be left with them while the other waits."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> None:
    """In a worker, which was forked with its imports frozen, later ones are frozen too, file by file.

    hfq looks for garbage between trials, where nothing is frozen only among what is new: here that would be all that was
    imported meanwhile, for half a second each time.
    """
    if gc.get_freeze_count():
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Processes that hfq starts from this one, to measure or to compile, are forked from one that imported all.

    What they say of time and memory means nothing then.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(forkserver().programs / "python"))
        yield


@pytest.fixture
def cwd(tmp_path: Path) -> Iterator[Path]:
    """Where a command runs that is to fail. Whatever the test, it leaves nothing there."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """The local Hub, with a clean request log and no faults left from another test. Repositories stay."""
    _hub.reset()
    yield _hub
    _hub.reset()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with `data` and an empty folder `pipelines`."""
    write_slice(tmp_path / "data", train=100, validation=50)
    (tmp_path / "pipelines").mkdir()
    return tmp_path
