"""oneDNN's int8 convolution, through torch, wherever it is exact."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from .kernel import Codes
from .selection import select_kernel

Sizes = tuple[int, ...]
Geometry = tuple[Sizes, Sizes, Sizes, int]  # stride, padding, dilation, groups
_PLAIN: Codes = (1.0, 0)


def prepack(weight: Tensor, *, zero_point: int, geometry: Geometry) -> Tensor:
    """int8 `[out, in / groups, *kernel]` in oneDNN's layout, for codes of `zero_point`."""
    scale = torch.ones(len(weight))  # the layout depends on there being scales, not on what they are
    packed: Tensor = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, zero_point, *geometry, None)
    return packed


def convolve(
    codes: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *, input_codes: Codes, geometry: Geometry
) -> Tensor:
    """uint8 `[batch, in, *size]`, codes of `input_codes`, to float32 `[batch, out, *size]`. `scale`: float32 `[out]`."""
    y: Tensor = torch.ops.onednn.qconv_pointwise(
        codes, *input_codes, packed, scale, no_zero_points(len(scale)), bias, *geometry,
        *_PLAIN, torch.float32, "none", [], "",
    )  # fmt: skip
    return y


@lru_cache(maxsize=64)
def no_zero_points(channels: int) -> Tensor:
    """Of weights, which are symmetric: int32 `[channels]`."""
    return torch.zeros(channels, dtype=torch.int32)


def is_exact(weight: Sizes, codes: Sizes, *, zero_point: int, geometry: Geometry) -> bool:
    """Whether oneDNN convolves codes of this shape exactly, by trying it with others.

    Its code for AMX (3.12, by verbose `brg_conv_fwd:*_amx`) is wrong where a wide kernel reads few channels, and at some
    widths where groups have a zero point. Which ones cannot be told beforehand; the shapes decide, and with them it is
    always right or always wrong. The first and the last image are looked at, which are the same here.
    """
    with (
        _disable_current_modes()
    ):  # whoever takes down a forward is not to see it, and packed weights do not work there
        return _is_exact(weight, codes, zero_point, geometry, torch.get_num_threads())


@lru_cache(maxsize=1024)
def _is_exact(weight: Sizes, codes: Sizes, zero_point: int, geometry: Geometry, threads: int) -> bool:
    if not runs_onednn() or 0 in codes:
        return False
    image, weights, scale = _codes((1, *codes[1:]), torch.uint8), _codes(weight, torch.int8), torch.ones(weight[0])
    given = image.expand(codes).contiguous()
    try:
        packed = prepack(weights, zero_point=zero_point, geometry=geometry)
        y = convolve(given, packed, scale, None, input_codes=(1.0, zero_point), geometry=geometry)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    expected = _in_floats(image.float() - zero_point, weights.float(), geometry)
    # Sums of float32 are rounded beyond 2^24, in an order of their own; what oneDNN gets wrong is far off.
    right = (torch.allclose(y[i], expected[0], rtol=1e-6, atol=16.0) for i in (0, -1))
    return y.shape[2:] == expected.shape[2:] and all(right)


def runs_onednn() -> bool:
    """Whether convolutions run in oneDNN here at all: `select_kernel` chose it, and it gives a packed weight back."""
    with _disable_current_modes():
        return select_kernel().name == "onednn" and _gives_back()


@lru_cache(maxsize=1)
def _gives_back() -> bool:
    """Whether a packed weight is the weight again. oneDNN has other code for one channel a group than for many."""
    for groups in (1, 32):
        weight = _codes((32, 32 // groups, 3, 3), torch.int8)
        try:
            packed = prepack(weight, zero_point=0, geometry=((1, 1), (1, 1), (1, 1), groups))
            if not torch.equal(packed.to_dense().view_as(weight), weight):
                return False
        except (RuntimeError, AttributeError, NotImplementedError):
            return False
    return True


def _codes(shape: Sizes, dtype: torch.dtype) -> Tensor:
    """Any codes, half of the channels of a weight the largest there are: their sums would saturate without VNNI."""
    bounds = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(bounds.min, bounds.max + 1, shape, dtype=dtype, generator=generator)
    if dtype == torch.int8:
        codes[::2] = bounds.max
    return codes


def _in_floats(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return (F.conv1d if x.dim() == 3 else F.conv2d)(x, weight, None, *geometry)
