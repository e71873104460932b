"""One matmul for layers that read the same tensor, such as query, key and value."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.kernel import PostOp
from ..kernels.selection import select_kernel
from .linear import Int8Linear, PackedLinear
from .packed import PACKING, input_codes


class _Slice:
    """One layer's columns of a matmul that it shares: the first layer to be given a tensor computes it for all."""

    def __init__(self, shared: "SharedMatmul", start: int, stop: int) -> None:
        self.shared = shared
        self.start, self.stop = start, stop
        self.parameter = None

    def __call__(
        self, x: Tensor, post_op: PostOp | None, residual: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        y = self.shared(x, self.start)[..., self.start : self.stop]
        return y if residual is None else y + residual

    def alone(self, x: Tensor) -> Tensor:
        """Of what `x` is now: the layers before may have been given it before somebody changed it."""
        return self.shared.products(x, alone=True)[..., self.start : self.stop].contiguous()

    def unpack(self) -> Tensor:
        return self.shared.unpack()[
            self.start : self.stop
        ].clone()  # without the storage of all, which pickles would hold


class SharedMatmul:
    """One matmul of several layers, which are always given the same tensor and have equal input scales.

    It keeps the products of the last input until each layer has taken its columns. A thread has its own.
    """

    def __init__(self, modules: Sequence[Int8Linear]) -> None:
        self.modules = tuple(modules)
        self._packed: PackedLinear | None = None
        self._last = threading.local()
        for module in modules:
            module.unpack()
            module._group = self

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.modules, self._packed, self._last = state["modules"], None, threading.local()

    def pack(self) -> None:
        """Pack the rows of all layers as one weight."""
        self._packed = PackedLinear(self.modules, select_kernel())
        for module, start in zip(self.modules, self.starts, strict=True):
            if module._packed is None:
                module.hand_over(_Slice(self, start, start + module.out_features))

    def products(self, x: Tensor, *, alone: bool = False) -> Tensor:
        """float `[.., in]` to `[.., sum of out]`: what all layers return, side by side. `alone`: as if for nobody else."""
        packed = self._packed
        if packed is None or any(module._packed is None for module in self.modules):  # one has a new weight
            with PACKING:
                if not self.is_possible:
                    self.dissolve()
                    return torch.cat([module.forward(x) for module in self.modules], -1)
                if any(module._packed is None for module in self.modules):
                    self.pack()
                packed = self._packed
        assert packed is not None
        return packed.alone(x) if alone else packed(x, None)

    def unpack(self) -> Tensor:
        """The rows of all layers, int8 `[sum of out, in]`."""
        assert self._packed is not None
        return self._packed.unpack()

    def release(self) -> None:
        """Let go of the packed rows once every layer has taken its own back."""
        if all(module._packed is None for module in self.modules):
            self._packed = None

    def dissolve(self) -> None:
        """Give each layer back a matmul of its own."""
        for module in self.modules:
            module.unpack()
        for module in self.modules:
            module._group = None

    @property
    def is_possible(self) -> bool:
        """Whether weights are parameters, and inputs have one scale: somebody may have given a layer another since."""
        if not all(module.has_plain_weight for module in self.modules):
            return False
        return self.modules[0].activation != "static" or len(set(map(input_codes, self.modules))) == 1

    @property
    def is_used(self) -> bool:
        """Whether the layers have no matmuls of their own again."""
        return self.modules[0]._group is self

    @property
    def starts(self) -> list[int]:
        """The first column of each layer."""
        return [sum(module.out_features for module in self.modules[:i]) for i in range(len(self.modules))]

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        last = self._last
        if getattr(last, "input", None) is not x or layer in last.served:
            last.input, last.products, last.served = x, self.products(x), set()
        last.served.add(layer)
        products = last.products
        if len(last.served) == len(self.modules):
            last.input = last.products = None  # keep no activations alive between forwards
        return products
