"""How inductor compiles layer norms, in the process that compiles: with the sum before and the quantization behind it.

Inductor's own code reads its mean and variance from memory at each number, with a root and a division, and quantizes in
another pass, which waits for all rows.
"""

from typing import Any

import torch
from torch._inductor import ir

from .lowerings import replace_lowering
from .row_codes_template import QUANTIZE_ROW, row_layouts
from .templates import Template, in_rows, plain_layout


def register() -> None:
    """Have inductor compile `hfq::layer_norm`."""
    replace_lowering(torch.ops.hfq.layer_norm.default, _layer_norm)


def _layer_norm(
    x: Any, residual: Any, weight: Any, bias: Any, codes: Any, eps: float, both: bool, narrow: bool
) -> list[Any]:
    found = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    tensors = {name: ir.ExternKernel.require_contiguous(in_rows(x)) for name, x in found.items() if x is not None}
    if codes is not None:
        tensors["codes"] = ir.ExternKernel.realize_input(codes)
    return NormTemplate(tensors, norm_layouts(x, codes, both, narrow), eps=eps, both=both).results()


def norm_layouts(x: Any, codes: Any, both: bool, narrow: bool) -> dict[str, ir.FixedLayout]:
    """Of the outputs for rows like those of `x`: numbers, if `both`, codes, and without `codes` the scales of rows."""
    layouts = {"y": plain_layout(x, torch.bfloat16 if narrow else torch.float32, x.get_size())} if both else {}
    coded = row_layouts(x, x.get_size())
    if codes is not None:
        del coded["scales"]
    return layouts | coded


NORMALIZE = (
    QUANTIZE_ROW
    + r"""
#ifndef HFQ_NORMALIZE
#define HFQ_NORMALIZE
// float32 or, with AVX-512, bfloat16.
inline at::vec::Vectorized<float> numbers_at(const float* from) { return at::vec::Vectorized<float>::loadu(from); }
inline void put_numbers(float* to, at::vec::Vectorized<float> x) { x.store(to); }
#if defined(CPU_CAPABILITY_AVX512)
inline at::vec::Vectorized<float> numbers_at(const at::BFloat16* from) {
    const auto wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return at::vec::Vectorized<float>(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
}
#endif
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
inline void put_numbers(at::BFloat16* to, at::vec::Vectorized<float> x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
#endif

// What is a null pointer is left out. `read` gives the numbers of a row, a vector at a time. `codes`: `ToCodes`, or where
// the scale of the row is to be written.
template <int64_t N, typename Read, typename Codes, typename Number>
inline __attribute__((always_inline)) void normalize(
    const Read& read, const float* weight, const float* bias, float eps, const Codes& codes, Number* y, uint8_t* out
) {
    using Vector = at::vec::Vectorized<float>;
    constexpr int64_t LANES = Vector::size();
    alignas(64) float kept[N];
    read(0).store(kept);
    const float first = kept[0];
    Vector sums[2] = {Vector(0.f), Vector(0.f)}, squares[2] = {Vector(0.f), Vector(0.f)};
    auto add = [&](int64_t n, int i) {
        const Vector number = read(n);
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
    const Vector by(1 / std::sqrt(std::max(variance, 0.f) + eps)), minus(first + mean);
    for (n = 0; n < N; n += LANES) {
        Vector number = (Vector::loadu(kept + n) - minus) * by;
        if (weight) number = number * Vector::loadu(weight + n);
        if (bias) number = number + Vector::loadu(bias + n);
        if (y) put_numbers(y + n, number);
        if constexpr (std::is_same_v<Codes, ToCodes>)
            codes(out + n, number);
        else
            number.store(kept + n);
    }
    if constexpr (!std::is_same_v<Codes, ToCodes>) quantize_row<N>([&](int64_t n) { return kept + n; }, out, codes);
}
#endif
{%- macro normalized() %}
        normalize<N>(
            read, {{"weight_at" if "weight" in at else "nullptr"}}, {{"bias_at" if "bias" in at else "nullptr"}},
            {{eps}}f, {{"put_codes" if "codes" in at else "scales + row"}},
            {{"y + row * N" if both else "static_cast<float*>(nullptr)"}}, out + row * N);
{%- endmacro %}
"""
)


class NormTemplate(Template):
    """`(x + residual - mean) / sqrt(variance + eps) * weight + bias` of each row, as codes and, `both`, as numbers.

    Mean and variance are of differences to a row's first number: else a mean far from 0 would swallow the variance.
    """

    NAME = "layer_norm"
    SOURCE = (
        NORMALIZE
        + r"""
extern "C" {{definition}}
{
    constexpr int64_t N = {{kernel.size(tensors["x"], -1)}};
    const int64_t rows = {{kernel.size(tensors["x"], 0)}} * {{kernel.size(tensors["x"], 1)}};
{%- if "codes" in at %}
    const ToCodes put_codes(&{{at["codes"]}});
{%- endif %}
{%- for name in at if name != "codes" %}
    const auto* {{name}}_at = &{{at[name]}};
{%- endfor %}

    const int64_t share = std::max<int64_t>(1, rows / {{4 * threads}});  // one that is held up keeps no other
    #pragma omp parallel for num_threads({{threads}}) schedule(dynamic, share)
    for (int64_t row = 0; row < rows; row++) {
        auto read = [&](int64_t n) {
            using Vector = at::vec::Vectorized<float>;
            const Vector number = numbers_at(x_at + row * N + n);
            return number{% if "residual" in at %} + numbers_at(residual_at + row * N + n){% endif %};
        };
        {{normalized()}}
    }
}
"""
    )
