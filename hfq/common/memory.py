"""What a process keeps resident: freed activations, which are wanted again at once, and pages of a checkpoint file.

Linux and glibc only; elsewhere nothing is done, and nothing but speed and memory depends on it.
"""

import ctypes
import gc
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_MAPS = Path("/proc/self/maps")
_PAGES = Path("/proc/self/pagemap")  # 8 bytes a page
_OF_A_FILE = 1 << 61  # bits of them
_SWAPPED = 1 << 62
_DONTNEED = 4
_POPULATE_READ = 22  # from Linux 5.14 on
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_SMALL = 1 << 16  # bytes of a weight that is not worth the trouble
FEW_ROWS = 256  # a layer given fewer is done sooner than its pages are mapped again, and its activations are small


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Let glibc keep freed activations instead of returning them to the kernel after every layer.

    Large float outputs otherwise pay for page faults on every forward, which costs about as much as the
    int8 matmuls that produce them. Process-wide, once; `HFQ_KEEP_MEMORY=0` leaves the allocator alone.

    Returns: whether the allocator was changed (glibc on Linux only).
    """
    libc = _glibc()
    if os.environ.get("HFQ_KEEP_MEMORY") == "0" or libc is None:
        return False
    return bool(libc.mallopt(_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))


def return_freed_memory() -> None:
    """Give back what glibc kept: after a stage that needed much, where the next is long enough to pay for new pages."""
    libc = _glibc()
    if os.environ.get("HFQ_KEEP_MEMORY") != "0" and libc is not None:
        libc.malloc_trim(0)


def free_at_once() -> None:
    """Let glibc return what is freed, for a process that widens weights one by one: they would leave gaps between them."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)


def map_code() -> None:
    """Have the code of libraries resident that this process was forked with: else it would seem to be what is run next.

    A fork maps files anew, page by page as they are used.
    """
    if not _MAPS.exists():
        return
    libc = ctypes.CDLL(None)
    for line in _MAPS.read_text().splitlines():
        if " r-xp " in line and ".so" in line:
            start, stop = (int(address, 16) for address in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _POPULATE_READ)


class LargestInput:
    """The most tokens that a model was given so far. The activations of twice as many do not fit where theirs were."""

    def __init__(self) -> None:
        self._tokens = 0

    @contextmanager
    def of(self, tokens: int) -> Iterator[None]:
        """Give back what smaller inputs left, if `tokens` are so many more, and then what is left between theirs."""
        if tokens < 2 * self._tokens:
            yield
            return
        self._tokens = tokens
        return_freed_memory()
        yield
        return_freed_memory()


def free_unused() -> None:
    """Free what only refers to itself, as a fused model does, and give its memory back.

    In a thread of its own: an interruption is raised in the main one, and would be lost in somebody's finalizer.
    """
    collecting = threading.Thread(target=gc.collect)
    collecting.start()
    collecting.join()
    return_freed_memory()


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """While the block runs, garbage is looked for only among what it made.

    Else `free_unused` goes over all that the libraries made when they were imported, each time, for half a second.
    """
    if gc.get_freeze_count():  # by somebody who wants it to stay so
        yield
        return
    free_unused()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def checkpoint_files() -> list[range]:
    """The addresses at which this process has safetensors files mapped."""
    if not _MAPS.exists():
        return []
    lines = [line.split() for line in _MAPS.read_text().splitlines() if line.endswith(".safetensors")]
    return [range(*(int(address, 16) for address in line[0].split("-"))) for line in lines]


def drop_file_pages(tensor: Tensor) -> None:
    """Leave the pages of a tensor that lies in a mapped file to the page cache, where other processes share them.

    Who reads it again reads the file again. Memory of its own, and that is also a page which somebody wrote to, stays.
    """
    if tensor.device.type == "cpu":
        _drop_pages(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def drop_checkpoint_pages() -> None:
    """The same for all that lies in mapped safetensors files, if this process has written to none of it."""
    for file in checkpoint_files():
        _drop_pages(file.start, file.stop)


@contextmanager
def weights_left_in_file(*models: nn.Module, from_rows: int = FEW_ROWS) -> Iterator[None]:
    """While the block runs `models`, their weights that lie in a mapped file do not stay resident after their layer.

    A float model is as large as its file, and one layer of it is used at a time. `from_rows`: not where a layer's
    output has fewer rows than that.
    """
    drop = partial(_drop_weights, from_rows)
    files = checkpoint_files()
    owners: dict[int, nn.Module] = {}
    for module in (module for model in models for module in model.modules()):
        for weight in module.parameters(recurse=False):
            if weight.nbytes >= _SMALL and any(weight.data_ptr() in file for file in files):
                drop_file_pages(weight)
                owners[id(module)] = module
    handles = [module.register_forward_hook(drop) for module in owners.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in owners.values():
            for weight in module.parameters(recurse=False):
                drop_file_pages(weight)


@lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc. Asking which it is reads the interpreter's file."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _drop_weights(from_rows: int, module: nn.Module, _: object, output: Any) -> None:
    if torch.compiler.is_compiling() or not isinstance(output, Tensor):
        return
    if output.dim() and output.numel() >= from_rows * output.shape[-1]:
        for weight in module.parameters(recurse=False):
            drop_file_pages(weight)


def _drop_pages(start: int, stop: int) -> None:
    if not _PAGES.exists():
        return
    size = os.sysconf("SC_PAGE_SIZE")
    first, last = -(-start // size), stop // size
    if last > first and _only_of_a_file(first, last):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first * size), ctypes.c_size_t((last - first) * size), _DONTNEED)


def _only_of_a_file(first: int, last: int) -> bool:
    """Whether none of these pages, of the numbers from `first` to before `last`, is this process's own."""
    try:
        with _PAGES.open("rb", buffering=0) as file:
            file.seek(8 * first)
            entries = torch.frombuffer(bytearray(file.read(8 * (last - first))), dtype=torch.int64)
    except OSError:
        return False
    own = entries.lt(0).logical_and_(entries.bitwise_and(_OF_A_FILE).eq(0))
    return len(entries) == last - first and not bool(own.logical_or_(entries.bitwise_and(_SWAPPED).ne(0)).any())
