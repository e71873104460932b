"""This machine and torch's C interface, for what is kept on disk or made outside of torch."""

import ctypes
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def machine() -> list[str]:
    """What machine code and weight layouts are made for."""
    found = [platform.machine(), platform.system(), torch.backends.cpu.get_cpu_capability()]
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    return [*found, next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])]


def take_tensors(handles: Sequence[int | None]) -> list[Tensor]:
    """The tensors of handles that torch's C interface made, which are freed.

    Torch's function of the same name for one handle does not free it, and its tensor would stay for ever.
    """
    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(
        [_capsule(handle, None, None) for handle in handles]
    )


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
