"""What to do to a model, as data: which layers run in int8, and with which activation scales."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from ..common.memory import drop_file_pages
from .observers import CODES, Range, affine

if TYPE_CHECKING:
    from .rotation import Rotation

Approach = Literal["static", "dynamic", "weight-only"]


@dataclass(frozen=True)
class LayerScheme:
    """Int8 weights; activations with one scale (static), one a token (dynamic), or in float (weight-only).

    `per_tensor`: one weight scale for the layer instead of one for each output channel.
    """

    approach: Approach
    input_scale: float = 0.0
    input_zero_point: int = 0
    per_tensor: bool = False

    @classmethod
    def static(
        cls, covered: Range, *, symmetric: bool = False, codes: int = CODES, per_tensor: bool = False
    ) -> "LayerScheme":
        """The scheme whose int8 codes cover the range `covered`.

        `symmetric`: zero point 0. `codes`: how many of the 256 the range is spread over; with 128 the sums of a CPU
        without VNNI cannot saturate.
        """
        low, high = covered
        if symmetric:
            high = max(-low, high)
            low = -high
        scale, zero_point = affine(torch.tensor(low), torch.tensor(high), codes=codes)
        return cls("static", scale.item(), int(zero_point.item()), per_tensor)


ROWS = 2048  # of a weight that are rounded at a time: an embedding's floats, all at once, would set the memory peak


class Rows(NamedTuple):
    """A layer's weight as it is stored: int8 codes `[out, ..]` and float32 scale `[out, 1]`."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Plan:
    """A whole model's quantization. A layer that is not named stays float.

    `smoothing`: for each fold, by the name of the layer it is folded into, float32 `[channels]`. `weights`: of the
    layers whose weights are not simply rounded. `bias_shifts`: what to add to a layer's bias, float32 `[out]`.
    `rotation`: of the model's residual stream, before all that.
    """

    layers: Mapping[str, LayerScheme]
    embeddings: tuple[str, ...]
    smoothing: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Rows] = field(default_factory=dict)
    bias_shifts: Mapping[str, Tensor] = field(default_factory=dict)
    rotation: "Rotation | None" = None


def quantize_rows(weight: Tensor, *, per_tensor: bool = False) -> Rows:
    """Symmetric int8 by row of a float weight `[rows, ..]`; with `per_tensor` every row has the same scale."""
    flat = weight.detach().reshape(len(weight), -1)
    largest = torch.cat([_largest(part) for part in flat.split(ROWS)])
    if per_tensor:
        largest = largest.amax().expand(len(weight), 1)
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).eps).contiguous()
    codes = torch.empty(flat.shape, dtype=torch.int8)
    for part, step, out in zip(flat.split(ROWS), scale.split(ROWS), codes.split(ROWS), strict=True):
        out.copy_((part.float() / step).round_().clamp_(-127, 127))
        drop_file_pages(part)
    return Rows(codes.view(weight.shape), scale)


def _largest(rows: Tensor) -> Tensor:
    """Of each row the largest absolute value: float32 `[rows, 1]`."""
    largest = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True)).float()
    drop_file_pages(rows)
    return largest
