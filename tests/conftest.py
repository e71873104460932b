"""One local Hub for the whole session, which every client library takes for the real one.

They read these variables when they are imported, so the hub starts with this file, before any test is.
"""

import atexit
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import write_slice

from hfq.local_hub import LocalHub

_home = tempfile.TemporaryDirectory(prefix="hfq-tests-")
_hub = LocalHub()
_hub.start()
atexit.register(_home.cleanup)
atexit.register(_hub.stop)
os.environ.update(
    _hub.environment(),
    HF_HOME=_home.name,
    HF_DATASETS_CACHE=f"{_home.name}/datasets",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
)


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """The local Hub, with a clean request log and no faults left from another test. Repositories stay."""
    _hub.reset()
    yield _hub
    _hub.reset()


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """A folder with `data` and an empty folder `pipelines`."""
    write_slice(tmp_path / "data", train=100, validation=50)
    (tmp_path / "pipelines").mkdir()
    return tmp_path
