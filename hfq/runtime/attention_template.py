"""How inductor compiles an encoder's attention, in the process that compiles: products of bfloat16, all else float32.

torch's fused attention multiplies float32 without AMX, and wants its operands converted first with it. This one reads
them where the matmul of query, key and value left them, and keeps scores, softmax and sums in float32.
"""

import math
from typing import Any

import sympy
import torch
from torch._inductor import ir, lowering
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V

from .lowerings import replace_lowering

LANES = 16  # float32 numbers of one AVX-512 register
_OPERATION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def register() -> None:
    """Have inductor compile attention where the template suits it, and call torch's elsewhere."""
    fallback = lowering.lowerings[_OPERATION]
    may_fuse = CppScheduling.can_fuse_vertical

    def lower(query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, **options: Any) -> Any:
        mask, scale = options.get("attn_mask"), options.get("scale")
        if dropout or is_causal or not _suits(query, key, value, mask):
            return fallback(query, key, value, dropout, is_causal, **options)
        return _attention(query, key, value, mask, scale), None

    def can_fuse_vertical(self: Any, first: Any, then: Any) -> bool:
        if first.is_template() and isinstance(first.get_template_node().template, AttentionTemplate):
            return False
        fused: bool = may_fuse(self, first, then)
        return fused

    setattr(CppScheduling, "can_fuse_vertical", can_fuse_vertical)  # noqa: B010 - mypy would have it no other way
    replace_lowering(_OPERATION, lower)


def _suits(query: Any, key: Any, value: Any, mask: Any) -> bool:
    batch, heads, _, size = query.get_size()
    others = key.get_size()
    known = V.graph.sizevars.statically_known_equals
    return (
        all(x.get_dtype() == torch.float32 for x in (query, key, value, mask) if x is not None)
        and isinstance(size, int | sympy.Integer)
        and size % LANES == 0
        and known(others[0], batch)
        and known(others[1], heads)
        and all(known(a, b) for a, b in zip(others, value.get_size(), strict=True))
        and all(user.args[1] == 0 for user in V.current_node.users)  # nobody reads the logarithms of the sums
    )


def _attention(query: Any, key: Any, value: Any, mask: Any, scale: float | None) -> Any:
    """float32 `[batch, heads, length, size]` and `[batch, heads, keys, size]` to a view of `[batch, length, heads, size]`."""
    batch, heads, length, size = query.get_size()
    inputs = [_rows(x) for x in (query, key, value)]
    if mask is not None:
        mask.realize()
        inputs.append(_rows(lowering.expand(mask, [batch, heads, length, key.get_size()[2]])))
    template = AttentionTemplate(
        inputs,
        ir.FixedLayout(query.get_device(), torch.float32, [batch, length, heads, size]),
        scale=1 / math.sqrt(size) if scale is None else scale,
    )
    return lowering.permute(template.generate().output_node(), [0, 2, 1, 3])


def _rows(x: Any) -> Any:
    """`x` in memory, the numbers of each row side by side."""
    x = ir.ExternKernel.realize_input(x)
    return x if x.get_stride()[-1] == 1 else ir.ExternKernel.require_contiguous(x)


class AttentionTemplate(CppTemplate):
    """`softmax(q k^T * scale + mask) v`. Every head of every row is a task; a long one is several, if there are few.

    A row that sees no key gets zeros. Keys and values are laid out for products of pairs of bfloat16, padded with zeros.
    """

    def __init__(self, input_nodes: list[Any], layout: Any, *, scale: float) -> None:
        super().__init__("attention", input_nodes, layout, parallel_num_threads())
        self.scale = scale

    def render(self, kernel: Any, template_buffer_node: Any = None, **others: Any) -> str:  # type: ignore[override]
        tensors = dict(zip(("query", "key", "value", "mask"), self.input_nodes, strict=False))
        out = self.output_node if template_buffer_node is None else template_buffer_node
        definition = kernel.def_kernel(inputs=tensors, outputs={"out": out})  # it names what the lines below refer to
        text: str = self._template_from_string(_SOURCE).render(
            template=self,
            definition=definition,
            at={name: kernel.index(tensor, [0, 0, 0, 0]) for name, tensor in tensors.items()},
            strides={name: [kernel.stride(tensor, i) for i in range(3)] for name, tensor in tensors.items()},
            sizes=[kernel.size(self.input_nodes[0], i) for i in range(4)],
            keys=kernel.size(self.input_nodes[1], 2),
            scale=self.scale,
            threads=self.num_threads,
            lanes=LANES,
        )
        return text


_SOURCE = r"""
{{template.header().getvalue()}}
#include <ATen/native/CPUBlas.h>
extern "C" {{definition}}
{
    using Number = at::BFloat16;
    using Vector = at::vec::Vectorized<float>;
    constexpr int64_t LANES = {{lanes}}, ROWS = 64, D = {{sizes[3]}};
    constexpr int threads = {{threads}};
    constexpr float scale = {{scale}}, never = -std::numeric_limits<float>::infinity();
    const int64_t B = {{sizes[0]}}, H = {{sizes[1]}}, L = {{sizes[2]}}, S = {{keys}};
    const int64_t keys = (S + 31) / 32 * 32;
    int64_t parts = 1;
    while (B * H * parts < 4 * threads && parts * ROWS < L) parts *= 2;
    const int64_t part = ((L + parts - 1) / parts + LANES - 1) / LANES * LANES;

    auto narrow = [](__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); };
    auto row = [&](const float* from, bool real) {
        return real ? narrow(_mm512_loadu_ps(from)) : _mm256_setzero_si256();
    };
    auto put = [](Number* to, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); };

    #pragma omp parallel num_threads(threads)
    {
        const int64_t bytes = 4 * ROWS * (keys + D) + 2 * (2 * keys * D + ROWS * (D + keys) + LANES * D);
        auto memory = std::make_unique<char[]>(bytes + 64);
        char* unused = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
        auto take = [&](int64_t size) { char* taken = unused; unused += size; return taken; };
        auto scores = reinterpret_cast<float*>(take(4 * ROWS * keys));
        auto sums = reinterpret_cast<float*>(take(4 * ROWS * D));
        auto paired_keys = reinterpret_cast<Number*>(take(2 * keys * D));    // [D / 2, keys, 2]
        auto paired_values = reinterpret_cast<Number*>(take(2 * keys * D));  // [keys / 2, D, 2]
        auto queries = reinterpret_cast<Number*>(take(2 * ROWS * D));
        auto weights = reinterpret_cast<Number*>(take(2 * ROWS * keys));
        auto few_keys = reinterpret_cast<Number*>(take(2 * LANES * D));

        #pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < B * H * parts; task++) {
            const int64_t b = task / parts / H, h = task / parts % H;
{%- for name in ("query", "key", "value") %}
            const float* {{name}}_at = &{{at[name]}} + b * {{strides[name][0]}} + h * {{strides[name][1]}};
{%- endfor %}
            for (int64_t s = 0; s < keys; s += LANES) {
                for (int64_t i = 0; i < LANES; i++)
                    for (int64_t d = 0; d < D; d += LANES) {
                        _mm_prefetch(key_at + (s + i + LANES) * {{strides["key"][2]}} + d, _MM_HINT_T0);
                        _mm_prefetch(value_at + (s + i) * {{strides["value"][2]}} + d, _MM_HINT_T0);
                        put(few_keys + i * D + d, row(key_at + (s + i) * {{strides["key"][2]}} + d, s + i < S));
                    }
                for (int64_t d = 0; d < D / 2; d += LANES)
                    at::vec::transpose_mxn<float>(
                        reinterpret_cast<float*>(few_keys) + d, D / 2,
                        reinterpret_cast<float*>(paired_keys) + d * keys + s, keys,
                        LANES, std::min(LANES, D / 2 - d));
            }
            for (int64_t s = 0; s < keys; s += 2)
                for (int64_t d = 0; d < D; d += LANES) {
                    const float* from = value_at + s * {{strides["value"][2]}} + d;
                    const auto even = _mm512_cvtepu16_epi32(row(from, s < S));
                    const auto odd = _mm512_cvtepu16_epi32(row(from + {{strides["value"][2]}}, s + 1 < S));
                    _mm512_storeu_si512(
                        paired_values + s * D + 2 * d, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
                }

            const int64_t first = task % parts * part, last = std::min(first + part, L);
            for (int64_t l = first; l < last; l += ROWS) {
                const int64_t count = std::min(ROWS, last - l), M = (count + LANES - 1) / LANES * LANES;
                for (int64_t i = 0; i < M; i++)
                    for (int64_t d = 0; d < D; d += LANES)
                        put(queries + i * D + d, row(query_at + (l + i) * {{strides["query"][2]}} + d, i < count));
                at::native::cpublas::brgemm(M, keys, D, D, keys, keys, false, queries, paired_keys, scores);
                for (int64_t i = 0; i < count; i++) {
                    float* score = scores + i * keys;
{%- if "mask" in at %}
                    const float* mask_at = &{{at["mask"]}} + b * {{strides["mask"][0]}} + h * {{strides["mask"][1]}}
                        + (l + i) * {{strides["mask"][2]}};
{%- endif %}
                    __m512 largest = _mm512_set1_ps(never);
                    for (int64_t s = 0; s < keys; s += LANES) {
                        const __mmask16 real = s + LANES <= S ? 0xffff : s < S ? (1 << (S - s)) - 1 : 0;
                        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(score + s), _mm512_set1_ps(scale));
{%- if "mask" in at %}
                        x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(real, mask_at + s));
{%- endif %}
                        x = _mm512_mask_blend_ps(real, _mm512_set1_ps(never), x);
                        _mm512_storeu_ps(score + s, x);
                        largest = _mm512_max_ps(largest, x);
                    }
                    const float top = _mm512_reduce_max_ps(largest);
                    const Vector shift(top == never ? 0.f : top);
                    Vector total(0.f);
                    for (int64_t s = 0; s < keys; s += LANES) {
                        Vector x = Vector::loadu(score + s) - shift;
                        // exp_u20 is wrong for minus infinity, and NaN is to stay
                        const __m512 e = _mm512_maskz_mov_ps(
                            _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.f), _CMP_GT_OQ), x.exp_u20());
                        x = _mm512_mask_mov_ps(e, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
                        total = total + x;
                        put(weights + i * keys + s, narrow(x));
                    }
                    score[0] = _mm512_reduce_add_ps(total);
                }
                at::native::cpublas::brgemm(M, D, keys, keys, D, D, false, weights, paired_values, sums);
                for (int64_t i = 0; i < count; i++) {
                    const float total = scores[i * keys];
                    const __m512 by = _mm512_set1_ps(total == 0 ? 0.f : 1 / total);
                    for (int64_t d = 0; d < D; d += LANES)
                        _mm512_storeu_ps(
                            out + ((b * L + l + i) * H + h) * D + d,
                            _mm512_mul_ps(_mm512_loadu_ps(sums + i * D + d), by));
                }
            }
        }
        at::native::cpublas::brgemm_release();
    }
}
"""
