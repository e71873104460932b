"""What a process keeps resident: freed activations, which are wanted again at once, and pages of a checkpoint file.

Linux and glibc only; elsewhere nothing is done, and nothing but speed and memory depends on it.
"""

import ctypes
import os
import platform
from functools import lru_cache
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Let glibc keep freed activations instead of returning them to the kernel after every layer.

    Large float outputs otherwise pay for page faults on every forward, which costs about as much as the
    int8 matmuls that produce them. Process-wide, once; `HFQ_KEEP_MEMORY=0` leaves the allocator alone.

    Returns: whether the allocator was changed (glibc on Linux only).
    """
    if os.environ.get("HFQ_KEEP_MEMORY") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold = -1, -3
    return bool(libc.mallopt(m_mmap_threshold, 1 << 30) and libc.mallopt(m_trim_threshold, (1 << 31) - 1))


def return_freed_memory() -> None:
    """Give back what glibc kept while a model was loaded and packed: once, so it costs no forward anything."""
    if keep_freed_memory():
        ctypes.CDLL(None).malloc_trim(0)


def checkpoint_files() -> list[range]:
    """The addresses at which this process has safetensors files mapped."""
    if not _MAPS.exists():
        return []
    lines = [line.split() for line in _MAPS.read_text().splitlines() if line.endswith(".safetensors")]
    return [range(*(int(address, 16) for address in line[0].split("-"))) for line in lines]


def drop_file_pages(tensor: Tensor) -> None:
    """Leave the pages of a tensor that lies in a mapped file to the page cache, where other processes share them.

    Who reads it again reads the file again, so what was changed in memory since is lost.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _DONTNEED)
