"""How inductor compiles an int8 matmul with the sum and the layer norm behind it, in the process that compiles.

A norm wants whole rows. As an operation of its own it reads from memory what the matmul wrote there, once all threads
have; here a thread multiplies some rows by all of the weight, and finds them in its cache.
"""

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_utils import GemmBlocking

from ...kernels.layouts import VNNI
from .lowerings import K_BLOCK, SHARES, replace_lowering
from .micro_kernels import VnniMicroKernel
from .norm_template import NORMALIZE, norm_layouts
from .templates import Template, in_rows

ROWS = 128  # that are multiplied by all of the weight: it comes from memory, or the last cache, for each so many


def register() -> None:
    """Have inductor compile `hfq::int8_linear_norm`."""
    replace_lowering(torch.ops.hfq.int8_linear_norm.default, _int8_linear_norm)


def _int8_linear_norm(
    x: Any,
    matrix: Any,
    scale: Any,
    offset: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    codes: Any,
    eps: float,
    both: bool,
    narrow: bool,
) -> list[Any]:
    rows = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    tensors = {name: ir.ExternKernel.require_contiguous(in_rows(y)) for name, y in rows.items() if y is not None}
    others = {"matrix": matrix, "scale": scale, "offset": offset, "codes": codes}
    tensors |= {name: ir.ExternKernel.realize_input(y) for name, y in others.items()}
    return MatmulNormTemplate(tensors, norm_layouts(residual, both, narrow), eps=eps, both=both).results()


class MatmulNormTemplate(Template):
    """`hfq.runtime.compiling.inductor.norm_template` of `x matrix * scale + offset + residual`, with a matrix in the layout `VNNI`.

    Where there are too few rows for all threads, each takes some columns of them, and all wait before the norms.
    """

    NAME = "int8_linear_norm"
    SOURCE = (
        NORMALIZE
        + r"""
{{multiply}}
extern "C" {{definition}}
{
    using Vector = at::vec::Vectorized<float>;
    constexpr int64_t BLOCK = {{block}}, ROWS = {{rows}};
    constexpr int64_t N = {{kernel.size(tensors["residual"], 2)}}, K = {{kernel.size(tensors["x"], 1)}};
    constexpr int threads = {{threads}}, shares = {{shares}} * threads;
    const int64_t M = {{kernel.size(tensors["x"], 0)}};
    const ToCodes put_codes(&{{at["codes"]}});
{%- for name in at if name != "codes" %}
    const auto* {{name}}_at = &{{at[name]}};
{%- endfor %}

    const int64_t row_parts = std::max<int64_t>(1, (M + ROWS - 1) / ROWS);
    const int64_t wanted = std::min((shares + row_parts - 1) / row_parts, N / BLOCK);
    const int64_t columns = (N / BLOCK + wanted - 1) / wanted * BLOCK, column_parts = (N + columns - 1) / columns;
    std::unique_ptr<int32_t[]> of_all(column_parts > 1 ? new int32_t[row_parts * ROWS * N] : nullptr);
    auto norm = [&](const int32_t* products, int64_t row) {
        auto read = [&](int64_t n) {
            const auto* at = products + n / BLOCK * ROWS * BLOCK + n % BLOCK;
            const auto product = at::vec::convert<float>(at::vec::Vectorized<int32_t>::loadu(at));
            const Vector x = at::vec::fmadd(product, Vector::loadu(scale_at + n), Vector::loadu(offset_at + n));
            return x + numbers_at(residual_at + row * N + n);
        };
        normalize<N>(
            read, {{"weight_at" if "weight" in at else "nullptr"}}, {{"bias_at" if "bias" in at else "nullptr"}},
            {{eps}}f, put_codes, {{"y + row * N" if both else "static_cast<float*>(nullptr)"}}, out + row * N);
    };

    #pragma omp parallel num_threads(threads)
    {
        std::unique_ptr<int32_t[]> of_part(column_parts > 1 ? nullptr : new int32_t[ROWS * N]);
        #pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < row_parts * column_parts; part++) {
            const int64_t row = part / column_parts * ROWS, count = std::min(ROWS, M - row);
            const int64_t start = part % column_parts * columns, stop = std::min(start + columns, N);
            int32_t* products = column_parts > 1 ? of_all.get() + row * N : of_part.get();
            for (int64_t n = start; n < stop; n += BLOCK) {
                int32_t* tile = products + n * ROWS;
                for (int64_t k = 0; k < K; k += {{k_block}}) {
                    const auto* codes = x_at + row * K + k;
                    const auto* block = matrix_at + n * K + k * BLOCK;
                    const int64_t size = std::min<int64_t>({{k_block}}, K - k);
                    if (k == 0)
                        {{name}}<false>(codes, block, tile, count, BLOCK, size, K, BLOCK, BLOCK);
                    else
                        {{name}}<true>(codes, block, tile, count, BLOCK, size, K, BLOCK, BLOCK);
                }
            }
            if (column_parts == 1)
                for (int64_t i = 0; i < count; i++) norm(products + i * BLOCK, row + i);
        }
        if (column_parts > 1) {
            #pragma omp for schedule(static)
            for (int64_t row = 0; row < M; row++) norm(of_all.get() + row / ROWS * ROWS * N + row % ROWS * BLOCK, row);
        }
        at::native::cpublas::brgemm_release();
    }
}
"""
    )

    def render(self, kernel: Any, outputs: list[Any]) -> str:  # type: ignore[override]
        types = (torch.uint8, torch.int8, torch.int32, torch.int32)
        sizes = GemmBlocking(VnniMicroKernel.ROWS, VNNI.block, VNNI.group)
        micro_kernel = VnniMicroKernel(f"{kernel.kernel_name}_multiply", *types, sizes)
        self.parameters |= {
            "multiply": micro_kernel.codegen_define(kernel),
            "name": micro_kernel.name,
            "block": VNNI.block,
            "rows": ROWS,
            "k_block": K_BLOCK,
            "shares": SHARES,
        }
        return super().render(kernel, outputs)
