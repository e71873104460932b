"""What int8 layers have in common: a weight that is handed to a kernel, in whose layout it is kept, and to nobody else.

A module's `state_dict` is its checkpoint entry, whatever that layout is.
"""

import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from multiprocessing.context import get_spawning_popen
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...common.memory import drop_file_pages
from ..kernels.selection import select_kernel
from .recording import is_recorded, unrecorded

PACKING = threading.RLock()  # a weight is packed once, even if the first two requests come at the same time


class PackedModule(nn.Module):
    """A module that hands its int8 `weight` to a kernel and keeps no second copy of it.

    State and attributes show the plain weight all the same.
    """

    weight_scale: nn.Parameter
    weight_shape: tuple[int, ...]
    _packed: "PackedWeight | None"
    _in_file_at: int | None = None  # address of a weight that lies in a mapped checkpoint file

    def make_packed(self) -> "PackedWeight | None":
        """The weight in the layout of this CPU's kernel; None where the plain weight is what runs."""
        raise NotImplementedError

    def pack(self) -> Any:
        """Hand the weight over, and return what it became. The first forward does it, unless `pack_all` did."""
        with PACKING:
            if self._packed is None and not self.has_plain_weight:
                return self.make_packed()
            if self._packed is None and (packed := self.make_packed()) is not None:
                self.hand_over(packed)
            return self._packed

    @property
    def has_plain_weight(self) -> bool:
        """Whether it is the module's parameter; else torch computes it anew for each forward, from parametrizations or a mask."""
        return self._packed is not None or "weight" in self._parameters

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module's. Who puts another parameter beside the weight, a mask say, wants to find it as it was."""
        if self.__dict__.get("_packed") is not None:
            self.free_weight()
        super().register_parameter(name, param)

    def free_weight(self) -> None:
        """Have the weight for itself, as a plain parameter."""
        self.unpack()

    def hand_over(self, packed: "PackedWeight") -> None:
        """Take `packed` in the place of the plain weight."""
        self._packed = packed  # first: another thread may look at the weight
        weight = self._parameters.pop("weight")
        if weight is not None and weight.data_ptr() == self._in_file_at:
            drop_file_pages(weight)

    def unpack(self) -> None:
        """Take the weight back as a plain parameter."""
        if self._packed is not None:
            self._parameters["weight"] = _plain(self._packed)
            self._packed = None

    def __getattr__(self, name: str) -> Any:
        packed: PackedWeight | None = self.__dict__.get("_packed")
        if name == "parametrizations":  # whoever asks for them looks for the weight next, among parameters
            self.free_weight()
        if name == "weight" and packed is not None:
            with unrecorded() if is_recorded() else nullcontext():
                return _plain(packed)  # for model code that looks at a weight's dtype or device
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the plain weight: packed tensors are opaque and belong to this CPU."""
        state = self.__dict__.copy()
        if self._packed is not None:
            weight = _plain(self._packed)
            is_made = self._packed.parameter is None and get_spawning_popen() is not None
            state["_parameters"] = {**self._parameters, "weight": _ByValue(weight) if is_made else weight}
            state["_packed"] = None
        return state

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedModule":
        moved = fn(self.weight_scale)
        if moved.device != self.weight_scale.device or moved.dtype != self.weight_scale.dtype:
            self.unpack()  # what was packed was made from the tensors as they were
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._packed is not None:
            destination[f"{prefix}weight_scale"] = None  # keeps its place, which is before the weight's
            destination[f"{prefix}weight"] = self._packed.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args)


class _ByValue:
    """A weight that is written into the pickle for a process that is being started.

    torch would hand over a descriptor of its memory, when all is pickled: too late for a tensor made for the pickle.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __reduce__(self) -> tuple[Any, ...]:
        return _weight_of, (self._weight.detach().numpy(),)


class PackedWeight(Protocol):
    """What a kernel computes with. `unpack` gives the int8 weight back, bit for bit.

    `parameter`: the plain weight itself where that is what runs, as it may be an embedding's too; else None.
    """

    @property
    def parameter(self) -> nn.Parameter | None: ...

    def unpack(self) -> Tensor: ...


def memory_mib(model: nn.Module) -> float:
    """Parameters and buffers in memory, MiB. A packed weight counts as the int8 weight it holds."""
    packed = [m for m in model.modules() if isinstance(m, PackedModule) and m._packed is not None]
    plain = [m._packed.parameter for m in packed if m._packed is not None and m._packed.parameter is not None]
    seen = {id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *plain]}
    opaque = sum(math.prod(m.weight_shape) for m in packed) - sum(weight.numel() for weight in plain)
    return (sum(seen.values()) + opaque) / 2**20


def state_mib(model: nn.Module) -> float:
    """What of a model is saved, MiB."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 2**20


def pack_all(model: nn.Module) -> None:
    """Pack every int8 layer now, so that the first forward is as fast as the second."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.pack()
    select_kernel().end_block()


def unpack_all(model: nn.Module) -> None:
    """Take every weight back from its kernel, one after the other: the state then holds no second copy of them."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.unpack()


def note_files(model: nn.Module, mapped: Sequence[range]) -> None:
    """Have int8 layers know which of their weights lie in `mapped` files: packing lets go of those pages."""
    for module in model.modules():
        if isinstance(module, PackedModule) and module._packed is None:
            address = module.weight.data_ptr()
            module._in_file_at = address if any(address in file for file in mapped) else None


def input_codes(module: PackedModule) -> tuple[float, int]:
    """Scale and zero point of `module`'s input as uint8 codes: the int8 zero point on disk is shifted by 128."""
    return module.input_scale.item(), int(module.input_zero_point.item()) + 128


def _weight_of(numbers: Any) -> nn.Parameter:
    return frozen(torch.from_numpy(numbers))


def _plain(packed: PackedWeight) -> nn.Parameter:
    return frozen(packed.unpack()) if packed.parameter is None else packed.parameter


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
