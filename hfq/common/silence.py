"""What libraries say to their developers, and a user has no use for, left out for a while."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

EXPORTING = ("torch.export", "torch.fx.experimental.symbolic_shapes")  # which tell of what they cannot export


@contextmanager
def silent(*loggers: str) -> Iterator[None]:
    """Without warnings, and without what `loggers` log below an error."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def exporting() -> Iterator[None]:
    """Without what torch.export writes of a model that it cannot export: its graph, line by line."""
    with silent(*EXPORTING), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
