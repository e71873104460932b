"""Int8 twins of `nn.Conv1d` and `nn.Conv2d`, and of transformers' `Conv1D`, which is a Linear with its weight turned.

Not here: which layers have a twin, and how their scales are found (`hfq.ptq`).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv2d_input

from ..kernels.convolution import Geometry, Sizes, convolve, is_exact, prepack, runs_onednn
from ..kernels.kernel import quantize_uint8
from ..kernels.selection import select_kernel
from .gradients import is_wanted, straight_through
from .linear import Int8Linear, PackedLinear
from .packed import PackedModule, frozen, input_codes
from .recording import is_recorded, recorded_codes, unrecorded

ConvActivation = Literal["static", "weight-only"]


class Int8Conv(PackedModule):
    """A convolution with int8 weights, over float inputs quantized with one scale (static) or left as they are.

    State: `weight` int8 `[out, in / groups, *kernel]`, symmetric; `weight_scale` float32 `[out, 1, 1(, 1)]`; `bias`
    float `[out]` or absent; with static activations also `input_scale` float32 `[1]` and `input_zero_point` int8 `[1]`.
    `weight-only` computes in floats with the dequantized weight. A gradient flows through it, and none to its tensors.
    What `is_matmul` is multiplied as a Linear is, which is exact wherever that is.
    """

    padding_mode = "zeros"
    feeds_group_norm = False  # over a sequence, which torch's reads a channel after the other
    _reader = narrowing = None  # of a Linear: nothing is fused with what this returns
    input_scale: nn.Parameter
    input_zero_point: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: Sizes,
        stride: Sizes,
        padding: Sizes | str,
        dilation: Sizes,
        groups: int,
        bias: bool,
        activation: ConvActivation,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.groups = groups
        self.stride, self.padding, self.dilation = stride, padding, dilation  # models ask for them
        even, self._extra = _even_padding(padding, kernel_size, dilation)
        self.geometry: Geometry = (stride, even, dilation, groups)
        self.activation = activation
        self.weight_shape = (out_channels, in_channels // groups, *kernel_size)
        self.weight_scale = frozen(torch.empty(out_channels, 1, *(1 for _ in kernel_size), device=device))
        self._parameters["weight"] = frozen(torch.empty(self.weight_shape, dtype=torch.int8, device=device))
        if activation == "static":
            self.input_scale = frozen(torch.empty(1, device=device))
            self.input_zero_point = frozen(torch.empty(1, dtype=torch.int8, device=device))
        self.register_parameter("bias", frozen(torch.empty(out_channels, device=device)) if bias else None)
        self._packed: _PackedConv | PackedLinear | None = None

    @classmethod
    def like(
        cls, layer: nn.Conv1d | nn.Conv2d, *, activation: ConvActivation, device: torch.device | None = None
    ) -> "Int8Conv":
        """A twin of the shape of `layer`, its tensors yet to be filled."""
        return cls(
            layer.in_channels,
            layer.out_channels,
            kernel_size=layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
            activation=activation,
            device=device,
        )

    @property
    def is_matmul(self) -> bool:
        """Whether each output is one row's product: with a kernel of one pixel, or one that moves over a sequence."""
        stride, padding, _, groups = self.geometry
        pointwise = self.kernel_size == stride == (1, 1) and padding == (0, 0)
        return groups == 1 and (pointwise or len(self.kernel_size) == 1)

    @property
    def in_features(self) -> int:
        """Numbers of the input that one of the output is computed from."""
        return math.prod(self.weight_shape[1:])

    @property
    def weight(self) -> Tensor:
        """The float weight that is computed with. Vision models ask it for its dtype, and cast their pixels to that."""
        codes = self.codes
        return codes * self.weight_scale.detach().to(codes.device)  # while a checkpoint loads, one may be on meta still

    @property
    def codes(self) -> Tensor:
        """The int8 weight, as the state has it."""
        if self._packed is not None:
            return self._packed.unpack()
        return cast(Tensor, self._parameters["weight"]).detach()

    def forward(self, x: Tensor) -> Tensor:
        """float `[batch, in, *size]`, or `[in, *size]`, to the same dtype, `[batch, out, *size]`.

        oneDNN returns the channels last in memory, as `nn.Conv2d` does in that format: what flattens the output
        into tokens is faster so, and turning it back would take longer than the convolution.
        """
        if x.dim() == len(self.kernel_size) + 1:
            return self(x[None])[0]
        if self.pads_unevenly:
            x = F.pad(x, self._extra)
        if is_wanted(x):
            return straight_through(x, self, self._compute)
        with torch.no_grad():
            return self._compute(x)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """float32 of `shape`."""
        of_input = conv1d_input if len(self.kernel_size) == 1 else conv2d_input
        return of_input(shape, self.weight.float(), gradient, *self.geometry)

    def _compute(self, x: Tensor) -> Tensor:
        return self._static(x) if self.activation == "static" else self._weight_only(x)

    def _weight_only(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def _static(self, x: Tensor) -> Tensor:
        if is_recorded():
            return self._recorded(x)
        packed = self._packed or self.pack()
        if torch.compiler.is_compiling() and packed is not None and self.is_matmul:
            products: Tensor = cast(PackedLinear, packed)(self.rows(x.float()), None)
            return products.movedim(-1, 1).to(x.dtype)
        input_scale, zero_point = input_codes(self)
        # What a matmul returned has its channels last already: quantized so, its rows need no other order.
        last = len(self.kernel_size) == 1 and x.stride(1) == 1
        given = x.float().transpose(1, 2) if last else x.float()
        codes = quantize_uint8(given, input_scale, zero_point)
        codes = codes.transpose(1, 2) if last else codes
        if isinstance(packed, PackedLinear):
            y: Tensor = packed(self.rows(codes), None)
            return (_turned(y) if self.feeds_group_norm else y.movedim(-1, 1)).to(x.dtype)
        bias = None if self.bias is None else self.bias.float()
        if packed is not None and self.runs_packed(codes.shape):
            scale, inputs = self.weight_scale.float().reshape(-1), (input_scale, zero_point)
            y = convolve(codes, packed.weight, scale, bias, input_codes=inputs, geometry=self.geometry)
            return y.to(x.dtype)
        # Sums of codes are exact up to 2^24, which 518 of the largest products reach. Beyond it they are rounded as
        # float32 sums are: a convolution in float32 is no closer. Padding adds zeros, which code the zero point here.
        with torch.autocast("cpu", enabled=False):
            y = self._convolve(codes.float().sub_(zero_point), self.codes.float(), None)
        y = y.mul_(self.weight_scale.float()[:, 0] * input_scale)
        return (y if bias is None else y.add_(bias.view_as(self.weight_scale[:, 0]))).to(x.dtype)

    def rows(self, codes: Tensor) -> Tensor:
        """What is multiplied, if it `is_matmul`: `[batch, in, *size]` to `[batch, *size of the output, in_features]`.

        Floats, or the uint8 codes of this layer's input.
        """
        if len(self.kernel_size) == 2:
            return codes.permute(0, 2, 3, 1).contiguous()
        (kernel,), ((stride,), (padding,), (dilation,), _) = self.kernel_size, self.geometry
        zero = 0 if codes.is_floating_point() else input_codes(self)[1]
        codes = _turned(codes)
        codes = F.pad(codes, (0, 0, padding, padding), value=zero) if padding else codes
        windows = codes.unfold(1, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        return windows.transpose(2, 3).flatten(2)

    def output_shape(self, shape: Sizes) -> Sizes:
        """Of what it returns for `[batch, in, *size]`, or `[in, *size]`."""
        size = shape[len(shape) - len(self.kernel_size) :]
        extra = [sum(self._extra[i : i + 2]) for i in reversed(range(0, len(self._extra), 2))]
        places = zip(size, extra, self.kernel_size, *self.geometry[:3], strict=True)
        found = (
            (n + more + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for n, more, kernel, stride, padding, dilation in places
        )
        return (*shape[: len(shape) - len(size) - 1], self.out_channels, *found)

    def weight_rows(self) -> tuple[Tensor, Tensor]:
        """int8 `[out, in_features]` and float32 `[out]`, as kernels of matmuls take them."""
        return self.codes.movedim(1, -1).flatten(1).contiguous(), self.weight_scale.detach().float().reshape(-1)

    @property
    def as_stored(self) -> Callable[[Tensor], Tensor]:
        """What lays out `weight_rows` as the state has them."""
        return partial(_as_convolved, shape=self.weight_shape)

    def runs_packed(self, codes: Sizes) -> bool:
        """Whether oneDNN convolves codes of this shape exactly with this layer's weight."""
        zero_point = input_codes(self)[1]
        return is_exact(self.weight_shape, tuple(codes), zero_point=zero_point, geometry=self.geometry)

    def _recorded(self, x: Tensor) -> Tensor:
        """The same, from its tensors alone and in operations that run anywhere."""
        with unrecorded() if self._packed is not None else nullcontext():
            weight = self.codes.float()
        y = self._convolve(recorded_codes(self, x), weight, None) * (self.weight_scale[:, 0] * self.input_scale)
        return (y if self.bias is None else y + self.bias.view_as(self.weight_scale[:, 0])).to(x.dtype)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
        return convolve(x, weight, bias, *self.geometry)

    def make_packed(self) -> "_PackedConv | PackedLinear | None":
        """None where the plain weight is what runs: with weight-only layers, and where oneDNN would not be exact."""
        if self.activation != "static" or not runs_onednn():
            return None
        if self.is_matmul:
            return PackedLinear([self], select_kernel())
        return _PackedConv(self.codes, zero_point=input_codes(self)[1], geometry=self.geometry)

    @property
    def pads_unevenly(self) -> bool:
        """Whether what it pads is not alike on both sides."""
        return any(self._extra)

    def extra_repr(self) -> str:
        stride, padding, dilation, groups = self.geometry
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={stride}, "
            f"padding={padding}, dilation={dilation}, groups={groups}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )


def _turned(matrices: Tensor) -> Tensor:
    """`[batch, m, n]` to `[batch, n, m]`, contiguous."""
    turned = matrices.transpose(1, 2)
    if torch.compiler.is_compiling() or turned.is_contiguous():
        return turned
    found = torch.empty(turned.shape, dtype=matrices.dtype)
    for matrix, out in zip(turned, found, strict=True):  # torch turns one by blocks, and several number by number
        out.copy_(matrix)
    return found


def _as_convolved(rows: Tensor, shape: Sizes) -> Tensor:
    """int8 `[out, in_features]` to `shape`."""
    return rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


class _PackedConv:
    """A weight in oneDNN's layout."""

    def __init__(self, codes: Tensor, *, zero_point: int, geometry: Geometry) -> None:
        self.shape = codes.shape
        self.weight = prepack(codes, zero_point=zero_point, geometry=geometry)
        self.parameter = None

    def unpack(self) -> Tensor:
        return self.weight.to_dense().reshape(self.shape)


class Int8Conv1D(Int8Linear):
    """The int8 twin of GPT-2's `transformers.pytorch_utils.Conv1D`: `y = x W + b`.

    State as `Int8Linear`'s, but `weight` int8 `[in, out]` and `weight_scale` float32 `[1, out]`: as transformers lays
    the weight out, so that scale times weight is the float weight. The kernels get it turned, when it is packed.
    """

    @property
    def is_plain(self) -> bool:
        """Never: what is shared is stacked and taken apart as `Int8Linear` lays weights out."""
        return False

    def weight_rows(self) -> tuple[Tensor, Tensor]:
        return self.weight.detach().t().contiguous(), self.weight_scale.detach().float().reshape(-1)

    @staticmethod
    def stored_shapes(in_features: int, out_features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (in_features, out_features), (1, out_features)

    @staticmethod
    def as_stored(weight: Tensor) -> Tensor:
        return weight.t().contiguous()


def _even_padding(padding: Sizes | str, kernel_size: Sizes, dilation: Sizes) -> tuple[Sizes, list[int]]:
    """Padding alike on both sides of each dimension, and what `F.pad` must add after them first.

    `"same"` with an even kernel wants one more element at the end.
    """
    if padding == "valid":
        padding = (0,) * len(kernel_size)
    if not isinstance(padding, str):
        return tuple(padding), [0, 0] * len(kernel_size)
    totals = [step * (size - 1) for size, step in zip(kernel_size, dilation, strict=True)]
    extra = [amount for total in reversed(totals) for amount in (0, total % 2)]
    return tuple(total // 2 for total in totals), extra
