"""Copies of modules that torch itself refuses to copy."""

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def deep_copy(module: Module, *, shared: Mapping[int, object] | None = None) -> Module:
    """A copy of `module`, in which tensors that were computed from others (old `weight_norm`) are constants until recomputed.

    `shared`: what stands for a tensor or a module in the copy, by its id.
    """
    memo: dict[int, object] = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and (not value.is_leaf or value.is_inference())
    }
    return copy.deepcopy(module, {**memo, **(shared or {})})
