"""Memory for packed weights, in huge pages where the kernel has them.

Each forward reads every weight once. In small pages that is tens of thousands of them, far more than a CPU keeps the
addresses of, and looking one up takes as long as reading part of it.
"""

import mmap
import threading
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 25  # bytes of address space that weights share; what is not written to is no memory
HUGE = 1 << 21  # bytes of a page
_ALIGNMENT = 64  # bytes, of a cache line


class WeightMemory:
    """Weights one after the other in blocks. A block goes when the last of its weights does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: weakref.ref[mmap.mmap] | None = None
        self._next = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightMemory, ()

    def end_block(self) -> None:
        """Take what comes next from another block."""
        with self._lock:
            self._block = None

    def take(self, count: int) -> Tensor:
        """int8 `[count]`, zeros."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
            return torch.zeros(count, dtype=torch.int8)
        with self._lock:
            block = self._block() if self._block else None
            if block is None or self._next + count > len(block):
                block = mmap.mmap(-1, max(BLOCK, count) + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                with suppress(OSError):  # a kernel without
                    block.madvise(mmap.MADV_HUGEPAGE)
                self._block = weakref.ref(block)
                self._next = -torch.frombuffer(block, dtype=torch.int8).data_ptr() % HUGE
            start, self._next = self._next, self._next + -(-count // _ALIGNMENT) * _ALIGNMENT
            # By one thread: where several meet a page that is not there yet, laying out a weight takes ten times as long.
            pages = slice(start, start + count, mmap.PAGESIZE)
            block[pages] = bytes(len(range(*pages.indices(len(block)))))
            return torch.frombuffer(block, dtype=torch.int8, count=count, offset=start)
