"""Gradients through int8 layers, for what is trained or explained around them: of the float layer with the same weight.

Rounding has no gradient, so it is passed over (straight-through). An int8 layer's own tensors get none.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Layer(Protocol):
    """One that knows what the gradient of its input, of `shape`, is, given that of its output."""

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor: ...


def is_wanted(x: Tensor) -> bool:
    """Whether a gradient is wanted of what is computed from `x`."""
    return torch.is_grad_enabled() and x.requires_grad


def straight_through(x: Tensor, layer: Layer, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What `function` makes of `x`, with the gradient that `layer` says."""
    y: Tensor = _StraightThrough.apply(x, layer, function)
    return y


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.layer.input_gradient(gradient.float(), ctx.shape).to(ctx.dtype), None, None
