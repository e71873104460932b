"""What to do to a model, as data: which layers run in int8, and with which activation scales."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .observers import Range, affine

Approach = Literal["static", "dynamic"]


@dataclass(frozen=True)
class LinearScheme:
    """Int8 weight per channel; activations with one scale (static) or one per token (dynamic)."""

    approach: Approach
    input_scale: float = 0.0
    input_zero_point: int = 0

    @classmethod
    def static(cls, covered: Range) -> "LinearScheme":
        """The scheme whose int8 codes cover the range `covered`."""
        low, high = covered
        scale, zero_point = affine(torch.tensor(low), torch.tensor(high))
        return cls("static", scale.item(), int(zero_point.item()))


@dataclass(frozen=True)
class Plan:
    """A whole model's quantization. A Linear or Embedding that is not named stays float.

    `smoothing`: for each SmoothQuant fold, by the name of the layer it is folded into, float32 `[channels]`.
    """

    linears: Mapping[str, LinearScheme]
    embeddings: tuple[str, ...]
    smoothing: Mapping[str, Tensor] = field(default_factory=dict)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by row: float `[rows, columns]` to int8 `[rows, columns]` and float32 scale `[rows, 1]`."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).eps)
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale
