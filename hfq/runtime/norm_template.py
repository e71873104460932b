"""How inductor compiles layer norms, in the process that compiles: with the sum before and the quantization behind it.

Inductor's own code reads its mean and variance from memory at each number, with a root and a division, and quantizes in
another pass, which waits for all rows.
"""

from typing import Any

import torch
from torch._inductor import ir

from .lowerings import replace_lowering
from .templates import Template, in_rows, plain_layout


def register() -> None:
    """Have inductor compile `hfq::layer_norm`."""
    replace_lowering(torch.ops.hfq.layer_norm.default, _layer_norm)


def _layer_norm(x: Any, residual: Any, weight: Any, bias: Any, codes: Any, eps: float, both: bool) -> list[Any]:
    sizes = x.get_size()
    found = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    tensors = {name: ir.ExternKernel.require_contiguous(in_rows(x)) for name, x in found.items() if x is not None}
    tensors["codes"] = ir.ExternKernel.realize_input(codes)
    layouts = {"y": plain_layout(x, torch.float32, sizes)} if both else {}
    layouts["out"] = plain_layout(x, torch.uint8, sizes)
    return NormTemplate(tensors, layouts, eps=eps, both=both).results()


class NormTemplate(Template):
    """`(x + residual - mean) / sqrt(variance + eps) * weight + bias` of each row, as codes and, `both`, as numbers.

    Mean and variance are of differences to a row's first number: else a mean far from 0 would swallow the variance.
    """

    NAME = "layer_norm"
    SOURCE = r"""
extern "C" {{definition}}
{
    using Vector = at::vec::Vectorized<float>;
    constexpr int64_t LANES = Vector::size(), N = {{kernel.size(tensors["x"], -1)}};
    const int64_t rows = {{kernel.size(tensors["x"], 0)}} * {{kernel.size(tensors["x"], 1)}};
    const ToCodes put_codes(&{{at["codes"]}});
{%- for name in at if name != "codes" %}
    const float* {{name}}_at = &{{at[name]}};
{%- endfor %}

    const int64_t share = std::max<int64_t>(1, rows / {{4 * threads}});  // one that is held up keeps no other
    #pragma omp parallel for num_threads({{threads}}) schedule(dynamic, share)
    for (int64_t row = 0; row < rows; row++) {
        alignas(64) float kept[N];
        const float first = x_at[row * N]{% if "residual" in at %} + residual_at[row * N]{% endif %};
        Vector sums[2] = {Vector(0.f), Vector(0.f)}, squares[2] = {Vector(0.f), Vector(0.f)};
        auto add = [&](int64_t n, int i) {
            Vector number = Vector::loadu(x_at + row * N + n);
{%- if "residual" in at %}
            number = number + Vector::loadu(residual_at + row * N + n);
{%- endif %}
            number.store(kept + n);
            const Vector difference = number - Vector(first);
            sums[i] = sums[i] + difference;
            squares[i] = at::vec::fmadd(difference, difference, squares[i]);
        };
        int64_t n = 0;
        for (; n + 2 * LANES <= N; n += 2 * LANES) {
            add(n, 0);
            add(n + LANES, 1);
        }
        if (n < N) add(n, 0);
        const float mean = sum_of(sums[0] + sums[1]) / N;
        const float variance = sum_of(squares[0] + squares[1]) / N - mean * mean;
        const Vector by(1 / std::sqrt(std::max(variance, 0.f) + {{eps}}f)), minus(first + mean);
        for (n = 0; n < N; n += LANES) {
            Vector number = (Vector::loadu(kept + n) - minus) * by;
{%- if "weight" in at %}
            number = number * Vector::loadu(weight_at + n);
{%- endif %}
{%- if "bias" in at %}
            number = number + Vector::loadu(bias_at + n);
{%- endif %}
{%- if both %}
            number.store(y + row * N + n);
{%- endif %}
            put_codes(out + row * N + n, number);
        }
    }
}
"""
