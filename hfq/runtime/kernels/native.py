"""This machine and torch's C interface, for what is kept on disk or made outside of torch."""

import ctypes
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(handle, None, None) for handle in handles])


def bytes_of(packed: Tensor, count: int) -> Tensor:
    """int8 `[count]` over the memory of `packed`, which it keeps."""
    memory: Any = (ctypes.c_char * count).from_address(torch.ops.mkldnn.data_ptr(packed))
    memory.owner = packed
    return torch.frombuffer(memory, dtype=torch.int8)


def packed_tensor(address: int, *, shape: Sequence[int], descriptor: bytes) -> Tensor:
    """An int8 tensor in a layout of oneDNN's, over memory that the caller keeps for as long as the tensor lives.

    Args:
        descriptor: oneDNN's own, as `torch.ops.mkldnn._get_mkldnn_serialized_md` gives it. oneDNN takes its word.

    Raises:
        OSError, AttributeError, RuntimeError: this torch cannot do it, or made something else.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    sizes = ctypes.c_int64 * len(shape)
    handle = ctypes.c_void_p()
    status = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(address), ctypes.c_int64(len(shape)), sizes(*shape), sizes(), ctypes.c_int64(0),
        library.aoti_torch_dtype_int8(), library.aoti_torch_device_type_cpu(), 0, ctypes.byref(handle),
        library.aoti_torch_layout__mkldnn(), descriptor, ctypes.c_int64(len(descriptor)),
    )  # fmt: skip
    if status:
        raise RuntimeError("torch made no tensor of a packed weight")
    (tensor,) = take_tensors([handle.value])
    found = tensor.is_mkldnn and (tensor.dtype, list(tensor.shape), torch.ops.mkldnn.data_ptr(tensor))
    if found != (torch.int8, list(shape), address):
        raise RuntimeError(f"torch made another tensor of a packed weight: {found}")
    return tensor


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
