"""Operations that a graph is traced with and that inductor compiles (`hfq.runtime.compiling.inductor.lowerings`). None of them ever runs."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("hfq::int8_linear", mutates_args=())
def int8_linear(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """uint8 `[rows, in]` times int8 `[blocks, in, block]`, times `scale` and plus `offset`, to float32 `[rows, out]`.

    `row_scale`: float32 `[rows, 1]`, which that is multiplied by, before `bias`, float32 `[out]`, is added.
    """
    raise NotImplementedError("It is compiled, never run")


@int8_linear.register_fake
def _(codes: Tensor, weight: Tensor, scale: Tensor, *others: Any) -> Tensor:
    return codes.new_empty(codes.shape[0], scale.shape[0], dtype=torch.float32)


@torch.library.custom_op("hfq::quantize", mutates_args=())
def quantize(x: Tensor, codes: Tensor) -> Tensor:
    """float32 to uint8. `codes`: float32 `[2]`, the inverse of their scale, and their zero point."""
    raise NotImplementedError("It is compiled, never run")


@quantize.register_fake
def _(x: Tensor, codes: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("hfq::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 `[rows, features]` to uint8, symmetric around 128, and the scale of each row, float32 `[rows, 1]`."""
    raise NotImplementedError("It is compiled, never run")


@quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(x.shape[0], 1)


@torch.library.custom_op("hfq::int8_linear_rows", mutates_args=())
def int8_linear_rows(
    x: Tensor,
    matrix: Tensor,
    scale: Tensor,
    offset: Tensor,
    row_scale: Tensor | None,
    shift: Tensor | None,
    function: str,
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of what the activation function, "relu" or "gelu", makes of `int8_linear`, whose bias is `shift`."""
    raise NotImplementedError("It is compiled, never run")


@int8_linear_rows.register_fake
def _(x: Tensor, matrix: Tensor, scale: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], scale.shape[0]), scale.new_empty(x.shape[0], 1)


@torch.library.custom_op("hfq::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    codes: Tensor | None,
    scale: float,
    by_query: Tensor | None = None,
    of_query: Tensor | None = None,
    by_key: Tensor | None = None,
    of_key: Tensor | None = None,
) -> Tensor:
    """`softmax(q k^T * scale + mask + bias) v` of `[batch, heads, length, size]`, to float32 `[batch, length, heads, size]`.

    Query, key and value: float32, or bfloat16 where products are of that, or else float16. `mask`: bool, true where a
    key is seen, or float32, to be added; broadcast to `[batch, heads, length, keys]`. `bias`: float32, as that. `codes`:
    as `quantize` takes them; then the output is uint8.

    With `by_query` and `by_key`, `[1, heads, distances, size]`, `gather(q by_query^T, of_query)` and the transpose of
    `gather(k by_key^T, of_key)` are added to `q k^T`; `of_query`: int64 `[1, length, keys]`, `of_key`: `[1, keys, length]`.
    """
    raise NotImplementedError("It is compiled, never run")


@attention.register_fake
def _(query: Tensor, key: Any, value: Any, mask: Any, bias: Any, codes: Tensor | None, *others: Any) -> Tensor:
    batch, heads, length, size = query.shape
    return query.new_empty(batch, length, heads, size, dtype=torch.float32 if codes is None else torch.uint8)


@torch.library.custom_op("hfq::layer_norm", mutates_args=())
def layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    codes: Tensor | None,
    eps: float,
    both: bool,
    narrow: bool,
) -> list[Tensor]:
    """`[batch, length, features]`, with `residual` added, normalized to uint8; after numbers, if `both`.

    What is read and added is float32 or bfloat16; numbers are bfloat16 if `narrow`. Without `codes`, rows are quantized
    as by `quantize_rows`, and their scales, float32 `[batch, length, 1]`, come last.
    """
    raise NotImplementedError("It is compiled, never run")


@layer_norm.register_fake
def _(x: Tensor, residual: Any, weight: Any, bias: Any, codes: Any, eps: float, *which: bool) -> list[Tensor]:
    return _normed(x, codes, *which)


@torch.library.custom_op("hfq::int8_linear_norm", mutates_args=())
def int8_linear_norm(
    x: Tensor,
    matrix: Tensor,
    scale: Tensor,
    offset: Tensor,
    row_scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    codes: Tensor | None,
    eps: float,
    both: bool,
    narrow: bool,
) -> list[Tensor]:
    """`layer_norm` of the sum of `residual`, and `int8_linear`, with as many rows, whose bias is `shift`."""
    raise NotImplementedError("It is compiled, never run")


@int8_linear_norm.register_fake
def _(*arguments: Any) -> list[Tensor]:
    residual, _, _, codes, _, *which = arguments[6:]
    return _normed(residual, codes, *which)


def _normed(rows: Tensor, codes: Tensor | None, both: bool, narrow: bool) -> list[Tensor]:
    """What a norm of `rows` returns: numbers, if `both`, codes, and without `codes` their scales."""
    numbers = [torch.empty_like(rows, dtype=torch.bfloat16 if narrow else torch.float32)] if both else []
    scales = [rows.new_empty(*rows.shape[:-1], 1, dtype=torch.float32)] if codes is None else []
    return [*numbers, torch.empty_like(rows, dtype=torch.uint8), *scales]
