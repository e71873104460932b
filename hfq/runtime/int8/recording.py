"""Int8 layers while somebody takes down what is computed: a trace, an export, or a graph that hfq compiles."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..kernels.kernel import token_scale

if TYPE_CHECKING:
    from .packed import PackedModule


def is_recorded() -> bool:
    """Whether somebody takes down what is computed, to run it elsewhere: packed weights are of no use there."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() and not _ahead.of_packed)


class _Ahead(threading.local):
    of_packed = False


_ahead = _Ahead()


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """For the length of the block, what is exported is to be compiled for the packed weights of this machine."""
    _ahead.of_packed = True
    try:
        yield
    finally:
        _ahead.of_packed = False


def recorded_codes(module: "PackedModule", x: Tensor) -> Tensor:
    """Codes of `x` without their zero point, float32."""
    zero_point = module.input_zero_point.float()
    return ((x.float() / module.input_scale).round() + zero_point).clamp(-128, 127) - zero_point


def rounded_input(module: "PackedModule", x: Tensor) -> Tensor:
    """What codes of `x` stand for, float32; of a weight-only layer `x` itself."""
    if module.activation == "weight-only":
        return x
    if module.activation == "dynamic":
        scale = token_scale(x.float())
        return (x.float() / scale).round().clamp(-128, 127) * scale
    codes: Tensor = recorded_codes(module, x) * module.input_scale
    return codes


@contextmanager
def unrecorded() -> Iterator[None]:
    """For the length of the block, what is computed is a constant to whoever records."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
