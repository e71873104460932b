"""How inductor compiles an encoder's attention, in the process that compiles.

torch's fused attention wants query, key and value in other layouts than the matmul leaves them in, and its outputs are
put in rows and quantized afterwards. This one reads them where they are and writes what the next matmul reads. Where
the CPU multiplies bfloat16, products are of those; elsewhere it reads float16 and multiplies float32, as writing and
reading query, key and value takes longer than converting them. Scores, softmax and sums are float32.
"""

from typing import Any

import torch
from torch._inductor import ir, lowering

from ...kernels.cpu import compiles_to_bfloat16
from .lowerings import replace_lowering
from .templates import Template, in_rows, plain_layout


def register() -> None:
    """Have inductor compile `hfq::attention`."""
    replace_lowering(torch.ops.hfq.attention.default, _attention)


def _attention(
    query: Any, key: Any, value: Any, mask: Any, bias: Any, codes: Any, scale: float, *by_distance: Any
) -> Any:
    batch, heads, length, size = query.get_size()
    tensors = {name: in_rows(x) for name, x in (("query", query), ("key", key), ("value", value))}
    for name, x in (("mask", mask), ("bias", bias)):
        if x is not None:
            if x.get_size()[-1] == 1:  # alike for all keys, of which there are more: in rows before it is for all heads
                x = lowering.clone(lowering.expand(x, [*x.get_size()[:-1], key.get_size()[2]]))
            x.realize()  # before it is expanded, once for all layers
            tensors[name] = in_rows(lowering.expand(x, [batch, heads, length, key.get_size()[2]]))
    for name, x in zip(("by_query", "of_query", "by_key", "of_key"), by_distance, strict=False):
        if x is not None:
            tensors[name] = in_rows(x) if name.startswith("by") else ir.ExternKernel.require_contiguous(in_rows(x))
    if codes is not None:
        tensors["codes"] = ir.ExternKernel.realize_input(codes)
    dtype = torch.float32 if codes is None else torch.uint8
    layouts = {"out": plain_layout(query, dtype, [batch, length, heads, size])}
    adds = mask is not None and mask.get_dtype() == torch.float32
    narrow = compiles_to_bfloat16()
    power = _POWER_OF_TWO[narrow]
    kinds = {"adds": adds, "narrow": narrow, "by_distance": any(x is not None for x in by_distance)}
    return AttentionTemplate(tensors, layouts, scale=scale, power=power, **kinds).results()[0]


# 2^x for x from -0.5 to 0.5, minimax by Lawson's iteration: to 8e-5, a fiftieth of what bfloat16 rounds, and to 2e-7.
_POWER_OF_TWO = {
    True: (0.9999280571937561, 0.6932609677314758, 0.2426111251115799, 0.0551716685295105),
    False: (
        1.0000001192092896, 0.6931469440460205, 0.24022120237350464, 0.05550713092088699, 0.009675541892647743,
        0.0013276472454890609,
    ),
}  # fmt: skip


class AttentionTemplate(Template):
    """`softmax(q k^T * scale + mask + bias) v`. Every head of every row is a task; a long one is several, if there are few.

    A row that sees no key gets zeros. Keys are laid out in columns, keys and values are padded with zeros, and `narrow`
    ones, bfloat16, are laid out for products of pairs. `by_distance`: products of queries and keys with what stands for
    distances are added to theirs; as computed for the distances that there are, of which there may be few.
    """

    NAME = "attention"
    SOURCE = r"""
#include <ATen/native/CPUBlas.h>
#include <cstring>
extern "C" {{definition}}
{
    using Vector = at::vec::Vectorized<float>;
    using Number = {{"at::BFloat16" if narrow else "float"}};
{%- set strides = {} %}
{%- for name in tensors if name not in ("codes", "of_query", "of_key") %}
{%- set _ = strides.update({name: [kernel.stride(tensors[name], 0), kernel.stride(tensors[name], 1), kernel.stride(tensors[name], 2)]}) %}
{%- endfor %}
    constexpr int64_t LANES = Vector::size(), ROWS = 64, D = {{kernel.size(tensors["query"], 3)}};
    constexpr int64_t PAIR = sizeof(float) / sizeof(Number);
    constexpr int threads = {{threads}};
    constexpr float never = -std::numeric_limits<float>::infinity(), least = std::numeric_limits<float>::lowest();
    // Scores are exponents, of 2 with AVX-512 and else of e. They are bounded: the power of what is below is as good as 0,
    // and that of minus infinity would be none.
#if defined(CPU_CAPABILITY_AVX512)
    constexpr float unit = 1.44269504f;
    auto highest_of = [](Vector a, Vector b) { return Vector(_mm512_max_ps(a, b)); };  // b, if either is none
    auto power = [](Vector exponent) {
        const __m512 x = _mm512_max_ps(_mm512_set1_ps(-125.f), exponent);
        const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512 rest = _mm512_sub_ps(x, whole);
        __m512 y = _mm512_set1_ps({{power[-1]}}f);
{%- for coefficient in power[:-1] | reverse %}
        y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps({{coefficient}}f));
{%- endfor %}
        return Vector(_mm512_scalef_ps(y, whole));
    };
#else
    constexpr float unit = 1;
    auto highest_of = [](Vector a, Vector b) { return at::vec::maximum(a, b); };
    auto power = [](Vector exponent) { return at::vec::clamp_min(exponent, Vector(-87.f)).exp_u20(); };
#endif
    const Vector scale({{scale}}f * unit);
    const int64_t B = {{kernel.size(tensors["query"], 0)}}, H = {{kernel.size(tensors["query"], 1)}};
    const int64_t L = {{kernel.size(tensors["query"], 2)}}, S = {{kernel.size(tensors["key"], 2)}};
    const int64_t keys = (S + 31) / 32 * 32;
    int64_t parts = 1;
    while (B * H * parts < 4 * threads && parts * ROWS < L) parts *= 2;
    const int64_t part = ((L + parts - 1) / parts + LANES - 1) / LANES * LANES;
{%- if "codes" in at %}
    const ToCodes put_codes(&{{at["codes"]}});
{%- endif %}

{%- if narrow %}
    auto narrow = [](__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); };
    auto get = [&](const auto* from, bool real) {
        if (!real) return _mm256_setzero_si256();
        if constexpr (sizeof(*from) == 2) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        else return narrow(_mm512_loadu_ps(from));
    };
    auto put = [](Number* to, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); };
{%- else %}
    auto narrow = [](Vector x) { return x; };
    auto get = [](const auto* from, bool real) {
        if (!real) return Vector(0.f);
        if constexpr (sizeof(*from) == 4) return Vector::loadu(from);
#if defined(CPU_CAPABILITY_AVX512)
        else return Vector(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
        else return Vector(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
    };
    auto put = [](float* to, Vector x) { x.store(to); };
{%- endif %}

{%- if by_distance %}
    // Of all distances, those that there are; where their products are, for each query and key.
    const int64_t pairs = L * S;
    int64_t nearest = std::numeric_limits<int64_t>::max(), farthest = 0;
{%- for name in ("of_query", "of_key") if name in at %}
    const int64_t* {{name}}_at = &{{at[name]}};
    for (int64_t i = 0; i < pairs; i++) {
        nearest = std::min(nearest, {{name}}_at[i]);
        farthest = std::max(farthest, {{name}}_at[i]);
    }
{%- endfor %}
    const int64_t distances = (farthest - nearest + 32) / 32 * 32;
{%- for name in ("query", "key") if "by_" + name in at %}
    std::unique_ptr<int32_t[]> {{name}}_index(new int32_t[L * keys]());
    for (int64_t l = 0; l < L; l++)
        for (int64_t s = 0; s < S; s++)
            {{name}}_index[l * keys + s] = {% if name == "query" %}of_query_at[l * S + s] - nearest{% else %}s * distances + of_key_at[s * L + l] - nearest{% endif %};
{%- endfor %}
{%- endif %}

    #pragma omp parallel num_threads(threads)
    {
        const int64_t floats = ROWS * (keys + D) + keys{% if "by_query" in at %} + ROWS * distances{% endif %}{% if "by_key" in at %} + keys * distances{% endif %};
        const int64_t numbers = 2 * keys * D + ROWS * (D + keys) + {% if by_distance %}(keys + distances) * D{% else %}LANES * D{% endif %};
        std::unique_ptr<char[]> memory(new char[floats * sizeof(float) + numbers * sizeof(Number) + 64]);
        char* unused = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
        auto take = [&](auto number, int64_t count) {
            auto taken = reinterpret_cast<decltype(number)*>(unused);
            unused += count * sizeof(number);
            return taken;
        };
        float* scores = take(float(), ROWS * keys);
        float* sums = take(float(), ROWS * D);
        float* added = take(float(), keys);
        Number* columns = take(Number(), keys * D);  // [D / PAIR, keys, PAIR]
        Number* values = take(Number(), keys * D);   // [keys / PAIR, D, PAIR]
        Number* queries = take(Number(), ROWS * D);
        Number* weights = take(Number(), ROWS * keys);
{%- if by_distance %}
        Number* rows_of_keys = take(Number(), keys * D);
        Number* of_distances = take(Number(), distances * D);  // [D / PAIR, distances, PAIR]
{%- if "by_query" in at %}
        float* query_products = take(float(), ROWS * distances);
{%- endif %}
{%- if "by_key" in at %}
        float* key_products = take(float(), keys * distances);
{%- endif %}
{%- else %}
        Number* few_keys = take(Number(), LANES * D);
{%- endif %}
        // Lays out `LANES` rows in columns `s` and following of `width`.
        auto in_columns = [&](const Number* rows, int64_t s, Number* to, int64_t width) {
            for (int64_t d = 0; d < D / PAIR; d += LANES)
                at::vec::transpose_mxn<float>(
                    reinterpret_cast<const float*>(rows) + d, D / PAIR,
                    reinterpret_cast<float*>(to) + d * width + s, width,
                    LANES, std::min(LANES, D / PAIR - d));
        };

        #pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < B * H * parts; task++) {
            const int64_t b = task / parts / H, h = task / parts % H;
{%- for name in strides %}
            const auto* {{name}}_at = &{{at[name]}} + {% if name[:3] != "by_" %}b * {{strides[name][0]}} + {% endif %}h * {{strides[name][1]}};
{%- endfor %}
            const int64_t first = task % parts * part, last = std::min(first + part, L);
            if (first >= L) continue;  // parts are rounded up
            for (int64_t s = 0; s < keys; s += LANES) {
{%- if by_distance %}
                Number* few_keys = rows_of_keys + s * D;
{%- endif %}
                for (int64_t i = 0; i < LANES; i++)
                    for (int64_t d = 0; d < D; d += LANES) {
                        if (d * sizeof(*key_at) % 64 == 0) {
                            _mm_prefetch(key_at + (s + i + LANES) * {{strides["key"][2]}} + d, _MM_HINT_T0);
                            _mm_prefetch(value_at + (s + i) * {{strides["value"][2]}} + d, _MM_HINT_T0);
                            _mm_prefetch(query_at + (first + s + i) * {{strides["query"][2]}} + d, _MM_HINT_T1);
                        }
                        put(few_keys + i * D + d, get(key_at + (s + i) * {{strides["key"][2]}} + d, s + i < S));
                    }
                in_columns(few_keys, s, columns, keys);
            }
{%- if by_distance %}
            auto lay_out_distances = [&](const auto* from, int64_t stride, int64_t count) {
                alignas(64) Number rows[LANES * D];
                for (int64_t s = 0; s < distances; s += LANES) {
                    for (int64_t i = 0; i < LANES; i++)
                        for (int64_t d = 0; d < D; d += LANES)
                            put(rows + i * D + d, get(from + (nearest + s + i) * stride + d, nearest + s + i < count));
                    in_columns(rows, s, of_distances, distances);
                }
            };
{%- endif %}
{%- if "by_key" in at %}
            lay_out_distances(by_key_at, {{strides["by_key"][2]}}, {{kernel.size(tensors["by_key"], 2)}});
            at::native::cpublas::brgemm(
                keys, distances, D, D, distances, distances, false, rows_of_keys, of_distances, key_products);
{%- endif %}
{%- if "by_query" in at %}
            lay_out_distances(by_query_at, {{strides["by_query"][2]}}, {{kernel.size(tensors["by_query"], 2)}});
{%- endif %}
            for (int64_t s = 0; s < keys; s += PAIR)
                for (int64_t d = 0; d < D; d += LANES) {
                    const auto* from = value_at + s * {{strides["value"][2]}} + d;
{%- if narrow %}
                    const auto even = _mm512_cvtepu16_epi32(get(from, s < S));
                    const auto odd = _mm512_cvtepu16_epi32(get(from + {{strides["value"][2]}}, s + 1 < S));
                    _mm512_storeu_si512(
                        values + s * D + 2 * d, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
{%- else %}
                    put(values + s * D + d, get(from, s < S));
{%- endif %}
                }
            auto look = [&](int64_t l) {  // what is added to the scores of query l
                for (int64_t s = 0; s < S; s++) {
{%- if adds %}
                    const float x = mask_at[l * {{strides["mask"][2]}} + s]{% if "bias" in at %} + bias_at[l * {{strides["bias"][2]}} + s]{% endif %};
                    added[s] = x == never ? never : std::max(x * unit, least);
{%- elif "mask" in at %}
                    added[s] = mask_at[l * {{strides["mask"][2]}} + s] ? 0 : never;
{%- else %}
                    added[s] = 0;
{%- endif %}
                }
                for (int64_t s = S; s < keys; s++) added[s] = never;
            };
            bool alike = true;  // as an encoder's queries mostly are, in a mask that is laid out for each
{%- for name in ("mask", "bias") if name in at %}
            for (int64_t l = first + 1; l < last && alike && {{strides[name][2]}} != 0; l++)
                alike = !std::memcmp(
                    {{name}}_at + l * {{strides[name][2]}}, {{name}}_at + first * {{strides[name][2]}}, S * sizeof(*{{name}}_at));
{%- endfor %}
            if (alike) look(first);

            for (int64_t l = first; l < last; l += ROWS) {
                const int64_t count = std::min(ROWS, last - l), M = (count + LANES - 1) / LANES * LANES;
                for (int64_t i = 0; i < M; i++)
                    for (int64_t d = 0; d < D; d += LANES)
                        put(queries + i * D + d, get(query_at + (l + i) * {{strides["query"][2]}} + d, i < count));
                at::native::cpublas::brgemm(M, keys, D, D, keys, keys, false, queries, columns, scores);
{%- if "by_query" in at %}
                at::native::cpublas::brgemm(
                    M, distances, D, D, distances, distances, false, queries, of_distances, query_products);
{%- endif %}
                for (int64_t i = 0; i < count; i++) {
                    if (!alike) look(l + i);
                    float* score = scores + i * keys;
                    Vector highest(never);
                    for (int64_t s = 0; s < keys; s += LANES) {
                        Vector product = Vector::loadu(score + s);
{%- for name in ("query", "key") if "by_" + name in at %}
                        product = product + at::vec::gather<sizeof(float)>(
                            {{name}}_products{% if name == "query" %} + i * distances{% endif %},
                            at::vec::Vectorized<int32_t>::loadu({{name}}_index.get() + (l + i) * keys + s));
{%- endfor %}
                        const Vector x = at::vec::fmadd(product, scale, Vector::loadu(added + s));
                        x.store(score + s);
                        highest = highest_of(highest, x);
                    }
                    const float top = at::vec::vec_reduce_all<float>(highest_of, highest);
                    const Vector shift(std::isfinite(top) ? top : 0);
                    Vector total(0.f);
                    for (int64_t s = 0; s < keys; s += LANES) {
                        const Vector weight = power(Vector::loadu(score + s) - shift);
                        total = total + weight;
                        put(weights + i * keys + s, narrow(weight));
                    }
                    const float sum = sum_of(total);
                    score[0] = std::isfinite(top) ? 1 / sum : top == never && !std::isnan(sum) ? 0 : NAN;
                }
                at::native::cpublas::brgemm(M, D, keys, keys, D, D, false, weights, values, sums);
                for (int64_t i = 0; i < count; i++) {
                    const Vector by(scores[i * keys]);
                    auto* to = out + ((b * L + l + i) * H + h) * D;
                    for (int64_t d = 0; d < D; d += LANES) {
                        const Vector x = Vector::loadu(sums + i * D + d) * by;
{%- if "codes" in at %}
                        put_codes(to + d, x);
{%- else %}
                        x.store(to + d);
{%- endif %}
                    }
                }
            }
        }
        at::native::cpublas::brgemm_release();
    }
}
"""
