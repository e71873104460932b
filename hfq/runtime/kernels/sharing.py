"""Packed weights in files that the processes of one user on one host map, with `HFQ_SHARE=1`.

The first process packs a weight and writes it, the others map the file: they hold one copy, in the page cache.
A file that is found is only used if nobody else can have written it; whatever is wrong, the weight is packed as without it.
"""

import ctypes
import hashlib
import json
import logging
import mmap
import os
import secrets
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ...common.version import __version__
from .cpu import onednn_settings
from .kernel import Kernel
from .native import machine, packed_tensor
from .onednn import OneDnnKernel
from .packing import descriptor_of

_NUMBER = 4  # bytes of the checksum of what follows it, then of the length of the facts that come next
_log = logging.getLogger(__name__)


def pack(kernel: Kernel, weights: Sequence[Tensor], scale: Tensor, *, from_file: bool) -> Tensor:
    """What `kernel.pack` returns of `weights`, one below the other; in a mapped file if the user wants that.

    Args:
        from_file: the weight is a checkpoint's, which other processes load too, and the user lets files be mapped. Those
            of candidates, of which a search makes many, stay in memory.
    """
    if not (from_file and os.environ.get("HFQ_SHARE") == "1" and kernel.name == OneDnnKernel.name):
        return kernel.pack(torch.cat(list(weights)), scale)
    packed = None
    try:
        with _folder() as folder:
            name = _name(weights)
            try:
                return _map(folder, name)
            except FileNotFoundError:
                pass
            except (ValueError, KeyError) as error:
                _log.info("%s is replaced: %s", name, error)
                os.unlink(name, dir_fd=folder)  # who has it mapped keeps it
            packed = kernel.pack(torch.cat(list(weights)), scale)
            _write(folder, name, packed)
            return _map(folder, name)
    except (OSError, ValueError, AttributeError, RuntimeError) as error:  # from a full disk to another torch
        _log.info("A packed weight is not shared: %s", error)
    return kernel.pack(torch.cat(list(weights)), scale) if packed is None else packed


@contextmanager
def _folder() -> Iterator[int]:
    """The folder, made if need be, as a descriptor: what is checked is what is used.

    Raises:
        OSError: it cannot be made or opened.
        ValueError: others may write to it.
    """
    from huggingface_hub import constants

    path = Path(constants.HF_HOME) / "hfq" / "packed"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _refuse_if_others_write(folder, str(path))
        yield folder
    finally:
        os.close(folder)


def _refuse_if_others_write(descriptor: int, name: str) -> None:
    found = os.fstat(descriptor)
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{name} is not this user's alone to write")


def _name(weights: Sequence[Tensor]) -> str:
    """A file's name, by all that decides what is in it."""
    shape = [sum(map(len, weights)), weights[0].shape[1]]
    threads = torch.get_num_threads()  # which oneDNN lays a weight out for
    digest = hashlib.sha256(json.dumps([_setting(), threads, shape]).encode())
    for weight in weights:
        digest.update(weight.reshape(-1).numpy().data)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _setting() -> list[str]:
    """What decides a layout beside the weight: the code that packs, what it was told, and the CPU."""
    built = torch.__config__.show()  # oneDNN's version is in it
    return [__version__, torch.__version__, str(torch.version.git_version), built, *onednn_settings(), *machine()]


def _map(folder: int, name: str) -> Tensor:
    """The packed weight of a file, read-only.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not as `_write` left it.
        OSError, AttributeError, RuntimeError: it cannot be mapped, or this torch cannot use it.
    """
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        _refuse_if_others_write(file, name)
        size = os.fstat(file).st_size
        if size < 2 * _NUMBER:
            raise ValueError("it is too short")
        # Not Python's mmap: that one keeps a descriptor open for each weight.
        mapped = torch.from_file(f"/proc/self/fd/{file}", shared=False, size=size, dtype=torch.uint8)
    finally:
        os.close(file)
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(size), mmap.PROT_READ)
    content = mapped.numpy().data
    if zlib.crc32(content[_NUMBER:]) != int.from_bytes(content[:_NUMBER], "little"):
        raise ValueError("its checksum is wrong")
    length = int.from_bytes(content[_NUMBER : 2 * _NUMBER], "little")
    facts = json.loads(bytes(content[2 * _NUMBER : 2 * _NUMBER + length]))
    start = _start(length)
    if facts["name"] != name or facts["bytes"] != size - start:
        raise ValueError("it is another file")
    descriptor = bytes.fromhex(facts["descriptor"])
    packed = packed_tensor(mapped.data_ptr() + start, shape=facts["shape"], descriptor=descriptor)
    packed._mapped = mapped  # type: ignore[attr-defined]  # which unmaps when it goes
    return packed


def _write(folder: int, name: str, packed: Tensor) -> None:
    """A file that appears whole or not at all. If another process was faster, its file is as good, and it is mapped.

    Raises:
        OSError, AttributeError: it cannot be written, or this torch does not say what is in a packed weight.
    """
    size = torch.ops.mkldnn._nbytes(packed)
    facts = {"name": name, "shape": list(packed.shape), "descriptor": descriptor_of(packed).hex(), "bytes": size}
    text = json.dumps(facts).encode()
    head = (len(text).to_bytes(_NUMBER, "little") + text).ljust(_start(len(text)) - _NUMBER, b"\0")
    content = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
    unfinished = f".{secrets.token_hex(8)}"
    file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    try:
        with os.fdopen(file, "wb") as out:
            out.write(zlib.crc32(content, zlib.crc32(head)).to_bytes(_NUMBER, "little") + head)
            out.write(content)
        with suppress(FileExistsError):
            os.link(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.unlink(unfinished, dir_fd=folder)


def _start(length: int) -> int:
    """Where the weight begins after `length` bytes of facts: on a page, as oneDNN reads whole cache lines."""
    return -(-(2 * _NUMBER + length) // mmap.PAGESIZE) * mmap.PAGESIZE
