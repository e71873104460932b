"""Int8 twins of `nn.Conv1d` and `nn.Conv2d`, and of transformers' `Conv1D`, which is a Linear with its weight turned.

Not here: which layers have a twin, and how their scales are found (`hfq.ptq`).
"""

from contextlib import nullcontext
from functools import lru_cache
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv2d_input

from ..kernels.kernel import quantize_uint8
from ..kernels.selection import select_kernel
from .gradients import is_wanted, straight_through
from .linear import Int8Linear
from .packed import PackedModule, frozen, input_codes
from .recording import is_recorded, recorded_codes, unrecorded

ConvActivation = Literal["static", "weight-only"]
Sizes = tuple[int, ...]
Geometry = tuple[Sizes, Sizes, Sizes, int]  # stride, padding, dilation, groups


class Int8Conv(PackedModule):
    """A convolution with int8 weights, over float inputs quantized with one scale (static) or left as they are.

    State: `weight` int8 `[out, in / groups, *kernel]`, symmetric; `weight_scale` float32 `[out, 1, 1(, 1)]`; `bias`
    float `[out]` or absent; with static activations also `input_scale` float32 `[1]` and `input_zero_point` int8 `[1]`.
    `weight-only` computes in floats with the dequantized weight. A gradient flows through it, and none to its tensors.
    """

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
        even, self._extra = _even_padding(padding, kernel_size, dilation)
        self._geometry: Geometry = (stride, even, dilation, groups)
        self.activation = activation
        self.weight_shape = (out_channels, in_channels // groups, *kernel_size)
        self.weight_scale = frozen(torch.empty(out_channels, 1, *(1 for _ in kernel_size), device=device))
        self._parameters["weight"] = frozen(torch.empty(self.weight_shape, dtype=torch.int8, device=device))
        if activation == "static":
            self.input_scale = frozen(torch.empty(1, device=device))
            self.input_zero_point = frozen(torch.empty(1, dtype=torch.int8, device=device))
        self.register_parameter("bias", frozen(torch.empty(out_channels, device=device)) if bias else None)
        self._packed: _PackedConv | None = None

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
        if any(self._extra):
            x = F.pad(x, self._extra)
        if is_wanted(x):
            return straight_through(x, self, self._compute)
        with torch.no_grad():
            return self._compute(x)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """float32 of `shape`."""
        of_input = conv1d_input if len(self.kernel_size) == 1 else conv2d_input
        return of_input(shape, self.weight.float(), gradient, *self._geometry)

    def _compute(self, x: Tensor) -> Tensor:
        return self._static(x) if self.activation == "static" else self._weight_only(x)

    def _weight_only(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def _static(self, x: Tensor) -> Tensor:
        if is_recorded():
            return self._recorded(x)
        packed = self._packed or self.pack()
        input_scale, zero_point = input_codes(self)
        codes = quantize_uint8(x.float(), input_scale, zero_point)
        bias = None if self.bias is None else self.bias.float()
        if packed is not None:
            y = _qconv(
                codes,
                packed.weight,
                self.weight_scale.float().reshape(-1),
                bias,
                input_scale=input_scale,
                zero_point=zero_point,
                geometry=self._geometry,
            )
            if y.numel():  # else the other path: here an empty output's shape is wrong, and too small an input gets one
                return y.to(x.dtype)
        # Sums of codes are exact up to 2^24, which 518 of the largest products reach. Beyond it they are rounded as
        # float32 sums are: a convolution in float32 is no closer. Padding adds zeros, which code the zero point here.
        with torch.autocast("cpu", enabled=False):
            y = self._convolve(codes.float().sub_(zero_point), self.codes.float(), None)
        y = y.mul_(self.weight_scale.float()[:, 0] * input_scale)
        return (y if bias is None else y.add_(bias.view_as(self.weight_scale[:, 0]))).to(x.dtype)

    def _recorded(self, x: Tensor) -> Tensor:
        """The same, from its tensors alone and in operations that run anywhere."""
        with unrecorded() if self._packed is not None else nullcontext():
            weight = self.codes.float()
        y = self._convolve(recorded_codes(self, x), weight, None) * (self.weight_scale[:, 0] * self.input_scale)
        return (y if self.bias is None else y + self.bias.view_as(self.weight_scale[:, 0])).to(x.dtype)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
        return convolve(x, weight, bias, *self._geometry)

    def make_packed(self) -> "_PackedConv | None":
        """None where the plain weight is what runs: with weight-only layers, and where oneDNN would not be exact."""
        if self.activation != "static" or not runs_onednn():
            return None
        return _PackedConv(self.codes, zero_point=input_codes(self)[1], geometry=self._geometry)

    def extra_repr(self) -> str:
        stride, padding, dilation, groups = self._geometry
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={stride}, "
            f"padding={padding}, dilation={dilation}, groups={groups}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )


class _PackedConv:
    """A weight in oneDNN's layout."""

    def __init__(self, codes: Tensor, *, zero_point: int, geometry: Geometry) -> None:
        self.shape = codes.shape
        self.weight = _prepack(codes, zero_point=zero_point, geometry=geometry)

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


def runs_onednn() -> bool:
    """Whether static convolutions run in oneDNN here: `select_kernel` chose it, and it convolves exactly too."""
    return select_kernel().name == "onednn" and _qconv_is_exact()


@lru_cache(maxsize=1)
def _qconv_is_exact() -> bool:
    """Try the largest sums, which saturate without VNNI, the way back from a packed weight, and what is known to fail.

    oneDNN has other code for one channel a group than for many, so both are tried. Its code for AMX (3.12, by verbose
    `brg_conv_fwd:*_amx`) is wrong where a wide kernel reads few channels, and at some widths where groups have a zero
    point: which ones cannot be told beforehand, so it convolves nothing on a CPU where either is wrong.
    """
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int, dtype: torch.dtype) -> Tensor:
        bounds = torch.iinfo(dtype)
        return torch.randint(bounds.min, bounds.max + 1, shape, dtype=dtype, generator=generator)

    trials = []
    for groups in (1, 32):
        weight = some(32, 32 // groups, 3, 3, dtype=torch.int8)
        weight[::2] = 127
        trials.append((torch.full((1, 32, 5, 5), 255, dtype=torch.uint8), weight, 0, 1, groups))
    for channels, kernel, width, groups in ((8, 16, 21, 4), (16, 8, 21, 1), (48, 3, 50, 2)):
        weight = some(channels * groups, channels, 1, kernel, dtype=torch.int8)
        trials.append((some(1, channels * groups, 1, width, dtype=torch.uint8), weight, 218, 0, groups))
    for codes, weight, zero_point, padding, groups in trials:
        geometry = ((1, 1), (padding, padding), (1, 1), groups)
        scale = torch.ones(len(weight))
        try:
            packed = _prepack(weight, zero_point=zero_point, geometry=geometry)
            y = _qconv(codes, packed, scale, None, input_scale=1.0, zero_point=zero_point, geometry=geometry)
        except (RuntimeError, AttributeError, NotImplementedError):
            return False
        exact = F.conv2d(codes.double() - zero_point, weight.double(), padding=padding, groups=groups)
        if not torch.equal(y.double(), exact) or not torch.equal(packed.to_dense().view_as(weight), weight):
            return False
    return True


def _prepack(weight: Tensor, *, zero_point: int, geometry: Geometry) -> Tensor:
    scale = torch.ones(len(weight))  # the layout depends on there being scales, not on what they are
    return torch.ops.onednn.qconv_prepack(weight, scale, 1.0, zero_point, *geometry, None)


def _qconv(
    codes: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    input_scale: float,
    zero_point: int,
    geometry: Geometry,
) -> Tensor:
    weight_zero_points = torch.zeros(scale.numel(), dtype=torch.int32)
    return torch.ops.onednn.qconv_pointwise(
        codes, input_scale, zero_point, packed, scale, weight_zero_points, bias, *geometry,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


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
