"""oneDNN's int8 matmul, through torch."""

import os

import torch
from torch import Tensor

from . import packing
from .kernel import PLAIN, Codes, Epilogue, PostOp, added, apply_post_op, quantize_uint8, token_scale
from .weight_memory import WeightMemory

PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
# oneDNN keeps machine code for each shape that it was given, a quarter of a MiB or more
# each. It would keep 1,024 of them, which ragged texts fill in a minute; a few shapes of a large model are a hundred.
# It reads this when it first computes.
os.environ.setdefault(PRIMITIVES, "256")

DYNAMIC_ROWS = 1024  # tokens quantized and multiplied at a time: their floats stay out of the peak
MANY_NUMBERS = 1 << 20  # of a sum that takes memory of its own: a sum after the matmul is faster than oneDNN's in it
_NO_ZERO_POINTS = torch.zeros(1, dtype=torch.int32, device="cpu")  # weights are symmetric
_ONEDNN_POST_OPS: dict[PostOp | None, tuple[str, str]] = {
    None: ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


class OneDnnKernel:
    """oneDNN's u8 x s8 matmul through torch (VNNI, AMX)."""

    name = "onednn"

    def __init__(self) -> None:
        self._memory = WeightMemory()

    def pack(self, weight: Tensor, scale: Tensor) -> Tensor:
        return packing.pack(weight, self._memory)

    def end_block(self) -> None:
        self._memory.end_block()

    def unpack(self, packed: Tensor, scale: Tensor, in_features: int) -> Tensor:
        found = packing.unpack(packed, in_features)
        if found is not None:
            return found
        # The packed layout is oneDNN's own business, so ask the matmul: identity times weight is exact in int32.
        identity = torch.eye(in_features, dtype=torch.uint8)
        columns = self.static(identity, packed, torch.ones_like(scale), None, (1.0, 0))
        return columns.t().to(torch.int8).contiguous()

    def static(
        self,
        codes: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        input_codes: Codes,
        epilogue: Epilogue = PLAIN,
    ) -> Tensor:
        post_op, output, residual, in_place, dtype = epilogue
        input_scale, zero_point = input_codes
        shape = (*codes.shape[:-1], scale.shape[0])
        if residual is not None and _can_be_added(residual, shape, in_place):
            in_place = in_place and not torch.compiler.is_compiling()
            y = torch.ops.onednn.qlinear_pointwise.binary(
                codes, input_scale, zero_point, packed, scale, _NO_ZERO_POINTS, residual, bias,
                1.0, 0, torch.float32, 1.0, 0, "sum" if in_place else "add", 1.0, "none", [], "",
            )  # fmt: skip
            residual = None
        else:
            output_scale, output_zero_point = output or (1.0, 0)
            name, algorithm = _ONEDNN_POST_OPS[post_op]
            y = torch.ops.onednn.qlinear_pointwise(
                codes, input_scale, zero_point, packed, scale, _NO_ZERO_POINTS, bias,
                output_scale, output_zero_point, torch.uint8 if output else dtype, name, [], algorithm,
            )  # fmt: skip
        if y.dim() != codes.dim():  # of an empty input
            y = y.view(*codes.shape[:-1], y.shape[-1])
        return y if residual is None else added(y, residual)

    def dynamic(
        self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *, post_op: PostOp | None
    ) -> Tensor:
        if torch.compiler.is_compiling() or x.numel() <= DYNAMIC_ROWS * x.shape[-1]:  # compiled for any number: no loop
            return apply_post_op(self._rows(x, packed, scale, bias), post_op)
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty(len(rows), scale.shape[0], dtype=torch.float32)
        for part, out in zip(rows.split(DYNAMIC_ROWS), y.split(DYNAMIC_ROWS), strict=True):
            apply_post_op(self._rows(part, packed, scale, bias, out), post_op)
        return y.view(*x.shape[:-1], scale.shape[0])

    def _rows(
        self, rows: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        rows = rows.float()
        row_scale = token_scale(rows)
        codes = quantize_uint8(rows / row_scale, 1.0, 128)
        products = self.static(codes, packed, scale, None, (1.0, 128))
        out = products if out is None else out
        if bias is None:
            return torch.mul(products, row_scale, out=out)
        return torch.addcmul(bias, products, row_scale, out=out)


def _can_be_added(residual: Tensor, shape: tuple[int, ...], in_place: bool) -> bool:
    """Whether oneDNN can, and should, add `residual` to products of `shape`."""
    if residual.dtype != torch.float32 or residual.shape != shape or not residual.is_contiguous():
        return False
    return in_place or torch.compiler.is_compiling() or residual.numel() < MANY_NUMBERS
