"""The steps of a forward: an int8 convolution with what follows it, what goes between them as codes, and any operation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..int8.conv import Int8Conv
from ..int8.linear import PackedLinear
from ..int8.packed import input_codes
from ..kernels.convolution import no_zero_points
from ..kernels.kernel import Codes, quantize_uint8
from .program import OfBatch, Value

Values = list[Tensor | None]  # by number
_PLAIN: Codes = (1.0, 0)


class Step(Protocol):
    """Reads values by their numbers, and writes others."""

    @property
    def reads(self) -> list[int]: ...

    @property
    def writes(self) -> list[int]: ...

    def __call__(self, values: Values) -> None: ...


@dataclass(frozen=True)
class PostOp:
    """An activation function as oneDNN's convolutions know it, and in torch."""

    name: str
    scalars: tuple[float, ...]
    function: Callable[[Tensor], Tensor]


@dataclass
class Convolution:
    """`post_op(scale * (weight * x) + offset + residual)`, of codes, to floats or to codes.

    `layer`: whose weight it is. `scale`, `offset`: float32 `[out]`, the layer's own with what is folded into them.
    `source`, `residual`, `target`: numbers of values. `output`: what codes it writes. `keeps`: the residual is read
    again; else the sum takes its memory, as oneDNN does it.
    """

    layer: Int8Conv
    source: int
    target: int
    scale: Tensor
    offset: Tensor | None
    residual: int | None = None
    post_op: PostOp | None = None
    output: Codes | None = None
    keeps: bool = False
    inputs: Codes = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = input_codes(self.layer)

    @property
    def reads(self) -> list[int]:
        return [self.source] if self.residual is None else [self.source, self.residual]

    @property
    def writes(self) -> list[int]:
        return [self.target]

    def __call__(self, values: Values) -> None:
        codes = values[self.source]
        residual = None if self.residual is None else values[self.residual]
        assert codes is not None
        packed = self.layer._packed or self.layer.pack()
        is_exact = packed is not None and (self.layer.is_matmul or self.layer.runs_packed(codes.shape))
        if packed is None or not is_exact:
            values[self.target] = self._in_floats(codes, residual)
            return
        if residual is not None and self.keeps:
            residual = residual.clone()
        if isinstance(packed, PackedLinear):
            values[self.target] = self._multiplied(packed.weight, self.layer.rows(codes), residual)
            return
        given = (codes, *self.inputs, packed.weight, self.scale, no_zero_points(len(self.scale)))
        written, post_op = (*self.layer.geometry, *self._written), self._post_op
        if residual is None:
            y = torch.ops.onednn.qconv_pointwise(*given, self.offset, *written, *post_op)
        else:
            y = torch.ops.onednn.qconv2d_pointwise.binary(
                *given, residual, self.offset, *written, *_PLAIN, "sum", 1.0, *post_op
            )
        values[self.target] = y

    def _multiplied(self, weight: Tensor, rows: Tensor, residual: Tensor | None) -> Tensor:
        """The same as a matmul, where it is one."""
        given = (rows, *self.inputs, weight, self.scale, no_zero_points(1))
        if residual is None:
            y = torch.ops.onednn.qlinear_pointwise(*given, self.offset, *self._written, *self._post_op)
        else:
            added = residual.permute(0, 2, 3, 1).contiguous()
            y = torch.ops.onednn.qlinear_pointwise.binary(
                *given, added, self.offset, *self._written, *_PLAIN, "sum", 1.0, *self._post_op
            )
        return y.permute(0, 3, 1, 2)

    @property
    def _written(self) -> tuple[float, int, torch.dtype]:
        """Scale, zero point and type of what oneDNN writes."""
        return (*self.output, torch.uint8) if self.output else (*_PLAIN, torch.float32)

    @property
    def _post_op(self) -> tuple[str, Sequence[float], str]:
        """As oneDNN's operations take it."""
        return ("none", (), "") if self.post_op is None else (self.post_op.name, self.post_op.scalars, "")

    def _in_floats(self, codes: Tensor, residual: Tensor | None) -> Tensor:
        """The same where oneDNN does not convolve exactly. Padding adds zeros, which code the zero point here."""
        with torch.autocast("cpu", enabled=False):
            weight = self.layer.codes.float()
            y = F.conv2d(codes.float().sub_(self.inputs[1]), weight, None, *self.layer.geometry)
        y = y.mul_((self.scale * self.inputs[0]).view(-1, 1, 1))
        y = y if self.offset is None else y.add_(self.offset.view(-1, 1, 1))
        y = y if residual is None else y.add_(residual)
        y = y if self.post_op is None else self.post_op.function(y)
        return y if self.output is None else quantize_uint8(y, *self.output)


@dataclass
class _OfOne:
    """What makes one value of another. `source`, `target`: their numbers."""

    source: int
    target: int

    @property
    def reads(self) -> list[int]:
        return [self.source]

    @property
    def writes(self) -> list[int]:
        return [self.target]


@dataclass
class Quantization(_OfOne):
    """Codes of floats, the channels last in memory."""

    output: Codes

    def __call__(self, values: Values) -> None:
        x = values[self.source]
        assert x is not None
        codes = quantize_uint8(x.float(), *self.output)
        values[self.target] = codes.contiguous(memory_format=torch.channels_last)


@dataclass
class MaxPool(_OfOne):
    """`max_pool2d` of codes: the code of the largest number is the largest code. `window`: what it takes after them."""

    window: tuple[Any, ...]

    def __call__(self, values: Values) -> None:
        codes = values[self.source]
        assert codes is not None
        kernel, stride, padding, dilation, ceil_mode = self.window
        if hasattr(torch.ops.quantized, "max_pool2d") and hasattr(torch, "_make_per_tensor_quantized_tensor"):
            quantized = torch._make_per_tensor_quantized_tensor(codes, *_PLAIN)
            pooled = torch.ops.quantized.max_pool2d(quantized, kernel, stride, padding, dilation, ceil_mode)
            values[self.target] = pooled.int_repr()
        else:  # torch's own of these, where channels are last, counts positions in uint8
            values[self.target] = F.max_pool2d(codes.float(), *self.window).to(torch.uint8)


@dataclass
class Operation:
    """Any call, as the model makes it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: list[int]
    writes: list[int]

    def __call__(self, values: Values) -> None:
        args = [_given(arg, values) for arg in self.args]
        kwargs = {name: _given(arg, values) for name, arg in self.kwargs.items()}
        output = self.function(*args, **kwargs)
        if len(self.writes) == 1:
            values[self.writes[0]] = output[0] if isinstance(output, tuple | list) else output
        else:
            for number, tensor in zip(self.writes, output, strict=True):
                values[number] = tensor


def _given(argument: Any, values: Values) -> Any:
    if type(argument) is Value:
        return values[argument.number]
    if type(argument) is OfBatch:
        image = values[0]
        assert image is not None
        return argument.times * len(image)
    if isinstance(argument, list | tuple):
        return [_given(item, values) for item in argument]
    return argument
