"""Operations that a graph is traced with and that inductor compiles (`hfq.runtime.compiling.inductor.lowerings`). None of them ever runs."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("hfq::int8_linear", mutates_args=())
def int8_linear(codes: Tensor, weight: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """uint8 `[rows, in]` times int8 `[blocks, in, block]`, times `scale` and plus `offset`, to float32 `[rows, out]`."""
    raise NotImplementedError("It is compiled, never run")


@int8_linear.register_fake
def _(codes: Tensor, weight: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[0], scale.shape[0], dtype=torch.float32)


@torch.library.custom_op("hfq::quantize", mutates_args=())
def quantize(x: Tensor, codes: Tensor) -> Tensor:
    """float32 to uint8. `codes`: float32 `[2]`, the inverse of their scale, and their zero point."""
    raise NotImplementedError("It is compiled, never run")


@quantize.register_fake
def _(x: Tensor, codes: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("hfq::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    codes: Tensor | None,
    scale: float,
) -> Tensor:
    """`softmax(q k^T * scale + mask + bias) v` of `[batch, heads, length, size]`, to float32 `[batch, length, heads, size]`.

    Query, key and value: float32, or bfloat16 where products are of that, or else float16. `mask`: bool, true where a
    key is seen, or float32, to be added; broadcast to `[batch, heads, length, keys]`. `bias`: float32, as that. `codes`:
    as `quantize` takes them; then the output is uint8.
    """
    raise NotImplementedError("It is compiled, never run")


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Any, bias: Any, codes: Tensor | None, scale: float) -> Tensor:
    batch, heads, length, size = query.shape
    return query.new_empty(batch, length, heads, size, dtype=torch.float32 if codes is None else torch.uint8)


@torch.library.custom_op("hfq::layer_norm", mutates_args=())
def layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    codes: Tensor,
    eps: float,
    both: bool,
    narrow: bool,
) -> list[Tensor]:
    """`[batch, length, features]`, with `residual` added, normalized to uint8; after numbers, if `both`.

    What is read and added is float32 or bfloat16; numbers are bfloat16 if `narrow`.
    """
    raise NotImplementedError("It is compiled, never run")


@layer_norm.register_fake
def _(x: Tensor, *others: Any) -> list[Tensor]:
    return _normed(x, *others[-2:])


@torch.library.custom_op("hfq::int8_linear_norm", mutates_args=())
def int8_linear_norm(
    x: Tensor,
    matrix: Tensor,
    scale: Tensor,
    offset: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    codes: Tensor,
    eps: float,
    both: bool,
    narrow: bool,
) -> list[Tensor]:
    """`layer_norm` of the sum of `int8_linear(x, matrix, scale, offset)`, whose rows are those of `residual`, and that."""
    raise NotImplementedError("It is compiled, never run")


@int8_linear_norm.register_fake
def _(x: Tensor, matrix: Tensor, scale: Tensor, offset: Tensor, residual: Tensor, *others: Any) -> list[Tensor]:
    return _normed(residual, *others[-2:])


def _normed(rows: Tensor, both: bool, narrow: bool) -> list[Tensor]:
    """What a norm of `rows` returns: numbers, if `both`, and codes."""
    numbers = [torch.empty_like(rows, dtype=torch.bfloat16 if narrow else torch.float32)] if both else []
    return [*numbers, torch.empty_like(rows, dtype=torch.uint8)]
