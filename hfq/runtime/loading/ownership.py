"""Tensors of a model's own, where it was made with those of another: training that one must not move it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common.memory import drop_file_pages

_MAPS = Path("/proc/self/maps")
_LARGE = 1 << 20  # bytes that are worth a mapping


def own_tensors(model: nn.Module, other: nn.Module) -> None:
    """Replace, in place, the parameters and buffers that are also those of `other`; what modules share they share again.

    Of what lies in a checkpoint's file as it is there, the copy is the file mapped once more: it takes no memory.
    """
    theirs = {id(tensor) for tensor in [*other.parameters(), *other.buffers()]}
    owned: dict[int, Any] = {}
    mapped = cache(_file)
    for module in model.modules():
        tensors: dict[str, Any]
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) not in theirs:
                    continue
                if id(tensor) not in owned:
                    copy = _again_in_file(tensor, mapped)
                    copy = tensor.detach().clone() if copy is None else copy
                    is_parameter = isinstance(tensor, nn.Parameter)
                    owned[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
                tensors[name] = owned[id(tensor)]


def _file(path: str) -> Tensor:
    return torch.from_file(path, shared=False, size=Path(path).stat().st_size, dtype=torch.uint8)


def _again_in_file(tensor: Tensor, mapped: Callable[[str], Tensor]) -> Tensor | None:
    """The same bytes by another mapping of their file; None if they lie in none, or were changed since."""
    if tensor.nbytes < _LARGE or not tensor.is_contiguous() or tensor.device.type != "cpu" or not _MAPS.exists():
        return None
    for line in _MAPS.read_text().splitlines():
        if not line.endswith(".safetensors"):
            continue
        addresses, _, offset, _, _, path = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in addresses.split("-"))
        if start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= stop:
            begin = tensor.data_ptr() - start + int(offset, 16)
            try:
                copy = mapped(path)[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            except (OSError, RuntimeError):  # the file is gone, or a tensor begins where its type may not
                return None
            same = torch.equal(copy, tensor)
            drop_file_pages(copy)
            drop_file_pages(tensor)
            return copy if same else None
    return None
