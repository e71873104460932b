"""How inductor compiles dynamic quantization, in the process that compiles: in one pass, each row while it is in the cache.

Inductor's own code finds the ranges of all rows, waits, and then reads them again.
"""

from typing import Any

import torch
from torch import Tensor
from torch._inductor import decomposition, ir

from ..blocked import quantize_rows
from .lowerings import replace_lowering
from .rewriting import LANES
from .templates import Template, in_rows, plain_layout


def register() -> None:
    """Have inductor compile `hfq::quantize_rows`: in rows of whole vectors so, and in others by itself."""

    def decompose(x: Tensor) -> Any:
        suits = isinstance(x.shape[-1], int) and x.shape[-1] % LANES == 0
        return NotImplemented if suits else quantize_rows(x)

    decomposition.decompositions[torch.ops.hfq.quantize_rows.default] = decompose
    replace_lowering(torch.ops.hfq.quantize_rows.default, _quantize_rows)


def _quantize_rows(x: Any) -> list[Any]:
    tensors = {"x": ir.ExternKernel.require_contiguous(in_rows(x))}
    return RowCodesTemplate(tensors, row_layouts(x, x.get_size())).results()


def row_layouts(x: Any, sizes: Any) -> dict[str, ir.FixedLayout]:
    """Of the outputs for rows of `sizes` beside `x`: codes, and the scale of each row."""
    return {
        "out": plain_layout(x, torch.uint8, sizes),
        "scales": plain_layout(x, torch.float32, [*sizes[:-1], 1]),
    }


QUANTIZE_ROW = r"""
#ifndef HFQ_QUANTIZE_ROW
#define HFQ_QUANTIZE_ROW
// As `token_scale` and `quantize_uint8` of kernels do it. `at` gives where the numbers of a row are, a vector at a time.
template <int64_t N, typename At>
inline __attribute__((always_inline)) void quantize_row(const At& at, uint8_t* out, float* scale) {
    using Vector = at::vec::Vectorized<float>;
    constexpr int64_t LANES = Vector::size();
    auto larger = [](const Vector& a, const Vector& b) { return at::vec::maximum(a, b); };  // none, if either is none
    Vector largest[2] = {Vector(0.f), Vector(0.f)};
    int64_t n = 0;
    for (; n + 2 * LANES <= N; n += 2 * LANES)
        for (int i = 0; i < 2; i++) largest[i] = larger(largest[i], Vector::loadu(at(n + i * LANES)).abs());
    if (n < N) largest[0] = larger(largest[0], Vector::loadu(at(n)).abs());
    const float range = at::vec::vec_reduce_all<float>(larger, larger(largest[0], largest[1]));
    *scale = std::max(range / 127.5f, std::numeric_limits<float>::min());
    const float codes[2] = {1 / *scale, 128};
    const ToCodes put_codes(codes);
    for (n = 0; n < N; n += LANES) put_codes(out + n, Vector::loadu(at(n)));
}
#endif
"""


class RowCodesTemplate(Template):
    """Symmetric codes of each row, and its scale: of its largest number, of either sign."""

    NAME = "quantize_rows"
    SOURCE = (
        QUANTIZE_ROW
        + r"""
extern "C" {{definition}}
{
    constexpr int64_t N = {{kernel.size(tensors["x"], -1)}};
    const int64_t rows = {{kernel.size(tensors["x"], 0)}};
    const auto* x_at = &{{at["x"]}};

    const int64_t share = std::max<int64_t>(1, rows / {{4 * threads}});  // one that is held up keeps no other
    #pragma omp parallel for num_threads({{threads}}) schedule(dynamic, share)
    for (int64_t row = 0; row < rows; row++)
        quantize_row<N>([&](int64_t n) { return x_at + row * N + n; }, out + row * N, scales + row);
}
"""
    )
