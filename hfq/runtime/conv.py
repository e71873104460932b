"""Int8 twins of `nn.Conv1d`, `nn.Conv2d` and of transformers' `Conv1D`, which is a Linear stored transposed."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels import quantize_uint8, select_kernel
from .modules import Activation, Int8Linear, PackedModule, frozen, input_codes

Convolution = nn.Conv1d | nn.Conv2d


def why_not(layer: nn.Module) -> str | None:
    """Why a convolution has no int8 twin; None if it has one."""
    mode = getattr(layer, "padding_mode", "zeros")
    return None if mode == "zeros" else f"pads with {mode!r}, int8 convolutions with zeros only"


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input, each by dimension of space."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """In float."""
        convolve = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
        return convolve(self.pad(x, 0), weight, bias, self.stride, 0, self.dilation, self.groups)

    def pad(self, x: Tensor, value: int) -> Tensor:
        """`x` with `value` around it."""
        sides = [side for both in reversed(self._sides()) for side in both]
        return F.pad(x, sides, value=value) if any(sides) else x

    def _sides(self) -> list[tuple[int, int]]:
        """Of each dimension, before and after."""
        if self.padding == "valid":
            return [(0, 0)] * len(self.kernel_size)
        if self.padding == "same":  # what is odd goes behind, as torch has it
            spans = [step * (size - 1) for step, size in zip(self.dilation, self.kernel_size, strict=True)]
            return [(span // 2, span - span // 2) for span in spans]
        return [(int(side), int(side)) for side in self.padding]


class Int8Conv(PackedModule):
    """`nn.Conv1d` or `nn.Conv2d` with int8 weights (per output channel) and int8 activations, or float ones.

    State: `weight` int8 `[out, in / groups, *kernel]`, `weight_scale` float32 `[out, 1]`, `bias` float `[out]` or
    absent; with static activations also `input_scale` float32 `[1]` and `input_zero_point` int8 `[1]`.
    Inference only: no gradient flows through it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, geometry: Geometry, *, bias: bool, activation: Activation
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.geometry = in_channels, out_channels, geometry
        self.activation = activation
        self.weight_shape = (out_channels, in_channels // geometry.groups, *geometry.kernel_size)
        self.weight = frozen(torch.empty(self.weight_shape, dtype=torch.int8))
        self.weight_scale = frozen(torch.empty(out_channels, 1))
        if activation == "static":
            self.input_scale = frozen(torch.empty(1))
            self.input_zero_point = frozen(torch.empty(1, dtype=torch.int8))
        self.register_parameter("bias", frozen(torch.empty(out_channels)) if bias else None)
        self._packed: Any = None

    @classmethod
    def like(cls, layer: Convolution, *, activation: Activation) -> "Int8Conv":
        """One of the sizes of `layer`, its tensors yet to be filled. Dynamic activations stay float."""
        geometry = Geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        return cls(
            layer.in_channels,
            layer.out_channels,
            geometry,
            bias=layer.bias is not None,
            activation="static" if activation == "static" else "weight-only",
        )

    def forward(self, x: Tensor) -> Tensor:
        """float `[batch, in, *space]`, or without the batch, to the same dtype, `[batch, out, *space]`."""
        packed = self._packed or self.pack()
        with torch.no_grad():
            return packed(x)

    def make_packed(self) -> "_Unfolded | _Widened":
        """Groups are small matmuls, which the int8 kernels lose; they and weight-only layers compute in float."""
        return _Unfolded(self) if self.activation == "static" and self.geometry.groups == 1 else _Widened(self)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, {self.geometry}, bias={self.bias is not None}, "
            f"activation={self.activation}"
        )


class _Unfolded:
    """Every window of the input's codes as a row of one int8 matmul."""

    def __init__(self, module: Int8Conv) -> None:
        self.geometry = module.geometry
        self.kernel = select_kernel()
        self.shape = module.weight_shape
        self.scale = module.weight_scale.detach().float().reshape(-1).clone()
        self.bias = None if module.bias is None else module.bias.detach().float().clone()
        self.input_scale, self.zero_point = input_codes(module)
        self.weight = self.kernel.pack(module.weight.detach().flatten(1), self.scale)

    def __call__(self, x: Tensor) -> Tensor:
        geometry, space = self.geometry, len(self.shape) - 2
        codes = quantize_uint8(x.float().contiguous(), self.input_scale, self.zero_point)
        windows = geometry.pad(codes, self.zero_point)
        channel = x.dim() - space - 1
        for i, size in enumerate(self.shape[2:]):
            span = geometry.dilation[i] * (size - 1) + 1
            windows = windows.unfold(channel + 1 + i, span, geometry.stride[i])[..., :: geometry.dilation[i]]
        # [.., in, *space, *kernel] to [.., *space, in * kernel]
        rows = windows.movedim(channel, channel + space).flatten(channel + space)
        y = self.kernel.static(
            rows.contiguous(),
            self.weight,
            self.scale,
            self.bias,
            input_scale=self.input_scale,
            zero_point=self.zero_point,
            post_op=None,
            output=None,
        )
        y = y.view(*rows.shape[:-1], len(self.scale))  # oneDNN drops dimensions of an empty input
        return y.movedim(-1, channel).contiguous().to(x.dtype)

    def unpack(self) -> Tensor:
        depth = math.prod(self.shape[1:])
        return self.kernel.unpack(self.weight, self.scale, depth).view(self.shape)


class _Widened:
    """A float convolution with the weight widened at each call; with static activations, of their codes."""

    def __init__(self, module: Int8Conv) -> None:
        self.geometry = module.geometry
        self.weight = module.weight.detach().clone()
        self.scale = module.weight_scale.detach().float().view(-1, *[1] * (self.weight.dim() - 1))
        self.bias = None if module.bias is None else module.bias.detach()
        self.codes = input_codes(module) if module.activation == "static" else None

    def __call__(self, x: Tensor) -> Tensor:
        weight = (self.weight * self.scale).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.codes is not None:
            scale, zero_point = self.codes
            x = (quantize_uint8(x.float().contiguous(), scale, zero_point).to(x.dtype) - zero_point) * scale
        return self.geometry.convolve(x, weight, bias)

    def unpack(self) -> Tensor:
        return self.weight


class Int8Conv1D(Int8Linear):
    """transformers' `Conv1D`, `y = x W + b`, with int8 weights and activations.

    State as an `Int8Linear`'s, but `weight` is `[in, out]` and `weight_scale` `[1]`: stock transformers takes the
    scale of a row, which here would be an input's, so one scale for all is what it reads right.
    """

    def __init__(self, in_features: int, out_features: int, *, activation: Activation) -> None:
        super().__init__(in_features, out_features, bias=True, activation=activation)
        self.nf, self.nx = out_features, in_features
        self.weight_shape = (in_features, out_features)
        self.weight = frozen(torch.empty(self.weight_shape, dtype=torch.int8))
        self.weight_scale = frozen(torch.empty(1))

    def weight_rows(self) -> tuple[Tensor, Tensor]:
        return self.weight.detach().t().contiguous(), self.weight_scale.detach().float().expand(self.out_features)

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous()
