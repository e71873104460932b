"""Stock transformers, beside hfq: what opens a checkpoint where hfq is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_STOCK = ContextVar("stock", default=False)


@contextmanager
def stock_transformers() -> Iterator[None]:
    """While the block runs, in this thread, `from_pretrained` opens int8 checkpoints without hfq's quantizer."""
    token = _STOCK.set(True)
    try:
        yield
    finally:
        _STOCK.reset(token)


def is_stock() -> bool:
    """Whether hfq's quantizer is not to be used now."""
    return _STOCK.get()
