"""How inductor compiles an int8 matmul with what wants whole rows of it, in the process that compiles.

That is a sum and a layer norm, or a quantization with a scale for each row, after an activation function. As an operation
of its own it reads from memory what the matmul wrote there, once all threads have; here a thread multiplies some rows by
all of the weight, and finds them in its cache.
"""

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_utils import GemmBlocking

from ...kernels.layouts import VNNI
from .lowerings import K_BLOCK, SHARES, replace_lowering
from .micro_kernels import VnniMicroKernel
from .norm_template import NORMALIZE, norm_layouts
from .row_codes_template import row_layouts
from .templates import Template, in_rows

ROWS = 128  # that are multiplied by all of the weight: it comes from memory, or the last cache, for each so many


def register() -> None:
    """Have inductor compile `hfq::int8_linear_norm` and `hfq::int8_linear_rows`."""
    replace_lowering(torch.ops.hfq.int8_linear_norm.default, _int8_linear_norm)
    replace_lowering(torch.ops.hfq.int8_linear_rows.default, _int8_linear_rows)


def _int8_linear_norm(*arguments: Any) -> list[Any]:
    *matmul, residual, weight, bias, codes, eps, both, narrow = arguments
    rows = {"residual": residual, "weight": weight, "bias": bias}
    tensors = {name: ir.ExternKernel.require_contiguous(in_rows(y)) for name, y in rows.items() if y is not None}
    if codes is not None:
        tensors["codes"] = ir.ExternKernel.realize_input(codes)
    layouts = norm_layouts(residual, codes, both, narrow)
    return MatmulRowsTemplate(_of_matmul(*matmul) | tensors, layouts, eps=eps, both=both).results()


def _int8_linear_rows(*arguments: Any) -> list[Any]:
    *matmul, function = arguments
    x, _, scale, *_ = matmul
    layouts = row_layouts(x, [x.get_size()[0], scale.get_size()[0]])
    return MatmulRowsTemplate(_of_matmul(*matmul), layouts, function=function).results()


def _of_matmul(x: Any, matrix: Any, scale: Any, offset: Any, row_scale: Any, shift: Any) -> dict[str, Any]:
    found = {"matrix": matrix, "scale": scale, "offset": offset, "row_scale": row_scale, "shift": shift}
    tensors = {name: ir.ExternKernel.realize_input(y) for name, y in found.items() if y is not None}
    return {"x": ir.ExternKernel.require_contiguous(in_rows(x)), **tensors}


# GELU to 7e-5, and to 2e-4 of `x`, which is what counts in a row of small numbers: `x` times a probability, as an odd
# polynomial of what of `x` is within the bound. By Lawson's iteration.
_GELU_BOUND = 4.2
_GELU = (
    0.3985087411223128, -0.06559940070623786, 0.00933747780096741, -0.0009607661652274948, 6.826694777704321e-05,
    -3.139927238856615e-06, 8.330001107861327e-08, -9.61338905038349e-10,
)  # fmt: skip


class MatmulRowsTemplate(Template):
    """With a matrix in the layout `VNNI`: `x matrix * scale + offset`, in each row times `row_scale` and plus `shift`.

    Then either `hfq.runtime.compiling.inductor.norm_template` of the sum of that and `residual`, or the activation
    `function` of it, quantized by `hfq.runtime.compiling.inductor.row_codes_template`. Where there are too few rows for
    all threads, each takes some columns of them, and all wait before rows are looked at.
    """

    NAME = "int8_linear_rows"
    SOURCE = (
        NORMALIZE
        + r"""
{{multiply}}
extern "C" {{definition}}
{
    using Vector = at::vec::Vectorized<float>;
    constexpr int64_t BLOCK = {{block}}, ROWS = {{rows}};
    constexpr int64_t N = {{kernel.size(tensors["scale"], 0)}}, K = {{kernel.size(tensors["x"], 1)}};
    constexpr int threads = {{threads}}, shares = {{shares}} * threads;
    const int64_t M = {{kernel.size(tensors["x"], 0)}};
{%- if "codes" in at %}
    const ToCodes put_codes(&{{at["codes"]}});
{%- endif %}
{%- for name in at if name != "codes" %}
    const auto* {{name}}_at = &{{at[name]}};
{%- endfor %}

    const int64_t row_parts = std::max<int64_t>(1, (M + ROWS - 1) / ROWS);
    const int64_t wanted = std::min((shares + row_parts - 1) / row_parts, N / BLOCK);
    const int64_t columns = (N / BLOCK + wanted - 1) / wanted * BLOCK, column_parts = (N + columns - 1) / columns;
    std::unique_ptr<int32_t[]> of_all(column_parts > 1 ? new int32_t[row_parts * ROWS * N] : nullptr);
    auto finish = [&](int32_t* products, int64_t row) {  // of which a block's are `ROWS` rows behind those of another
        auto at = [&](int64_t n) { return products + n / BLOCK * ROWS * BLOCK + n % BLOCK; };
        auto number = [&](int64_t n) {
            const auto product = at::vec::convert<float>(at::vec::Vectorized<int32_t>::loadu(at(n)));
            const Vector x = at::vec::fmadd(product, Vector::loadu(scale_at + n), Vector::loadu(offset_at + n));
{%- if "row_scale" in at %}
            return {% if "shift" in at %}at::vec::fmadd(x, Vector(row_scale_at[row]), Vector::loadu(shift_at + n)){% else %}x * Vector(row_scale_at[row]){% endif %};
{%- else %}
            return x;
{%- endif %}
        };
{%- if function is defined %}
        auto kept = [&](int64_t n) { return reinterpret_cast<float*>(at(n)); };
        for (int64_t n = 0; n < N; n += Vector::size()) {
            const Vector x = number(n);
{%- if function == "relu" %}
            at::vec::maximum(x, Vector(0.f)).store(kept(n));
{%- else %}
            const Vector bounded = at::vec::clamp(x, Vector(-{{bound}}f), Vector({{bound}}f)), square = bounded * bounded;
            Vector p({{gelu[-1]}}f);
{%- for coefficient in gelu[:-1] | reverse %}
            p = at::vec::fmadd(p, square, Vector({{coefficient}}f));
{%- endfor %}
            (x * at::vec::fmadd(p, bounded, Vector(0.5f))).store(kept(n));
{%- endif %}
        }
        quantize_row<N>(kept, out + row * N, scales + row);
{%- else %}
        auto read = [&](int64_t n) { return number(n) + numbers_at(residual_at + row * N + n); };
        {{normalized()}}
{%- endif %}
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
                for (int64_t i = 0; i < count; i++) finish(products + i * BLOCK, row + i);
        }
        if (column_parts > 1) {
            #pragma omp for schedule(static)
            for (int64_t row = 0; row < M; row++)
                finish(of_all.get() + row / ROWS * ROWS * N + row % ROWS * BLOCK, row);
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
            "bound": _GELU_BOUND,
            "gelu": _GELU,
        }
        return super().render(kernel, outputs)
