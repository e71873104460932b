"""What multiplies some rows by one block of a weight inside inductor's int8 matmul, in the process that compiles."""

from typing import Any

import torch
from torch._inductor.codegen import cpp_micro_gemm
from torch._inductor.codegen.common import KernelTemplate
from torch._inductor.codegen.cpp_utils import GemmBlocking
from torch._inductor.cpu_vec_isa import VecAVX512VNNI, pick_vec_isa

from .layouts import VNNI, Layout


def register(layout: Layout) -> GemmBlocking:
    """Have inductor's template call what multiplies weights of `layout`, and nothing else; its block sizes.

    The layout is the weight's, not this process's choice: it may be told of another CPU than the one that laid it out.
    """
    kind = VnniMicroKernel if layout == VNNI else WideningMicroKernel
    isa = VecAVX512VNNI if layout == VNNI else type(pick_vec_isa())
    sizes = GemmBlocking(kind.ROWS, layout.block, layout.group)
    types = (torch.uint8, torch.int8, torch.int32, torch.int32)
    cpp_micro_gemm.micro_gemm_configs.clear()
    cpp_micro_gemm.register_micro_gemm(*cpp_micro_gemm.generate_gemm_config(isa, [tuple(sizes)], *types))(kind)
    return sizes


class VnniMicroKernel(cpp_micro_gemm.CppMicroGemmAVX512VNNI):
    """Inductor's kernel for a few rows; for more, oneDNN's, which uses AMX. Weights are in `hfq.runtime.layouts.VNNI`."""

    ROWS = 64  # that a thread takes at least
    FEW = 32  # up to here, calling oneDNN's kernel for each block of a weight costs more than it saves

    def codegen_define(self, kernel: Any) -> str:
        name, blocking = self.name, self.register_blocking
        self.name, self.register_blocking = f"{name}_few", GemmBlocking(6, blocking.block_n, blocking.block_k)
        few: str = super().codegen_define(kernel)
        self.name, self.register_blocking = name, blocking
        return few + _rendered(_VNNI, declaration=self.get_kernel_declaration(), name=name, few_rows=self.FEW)

    def codegen_finalize(self, kernel: Any) -> str:
        return "at::native::cpublas::brgemm_release();"


_VNNI = """
#include <ATen/native/CPUBlas.h>
{{declaration}} {
    // In multiples: oneDNN makes and keeps a kernel for each number of rows.
    const int64_t many = M > {{few_rows}} ? M / {{few_rows}} * {{few_rows}} : 0;
    if (many > 0) {
        at::native::cpublas::brgemm(many, N, K, lda, ldb, ldc, accum, A, B, C);
    }
    if (M > many) {
        {{name}}_few<accum, prefetch>(A + many * lda, B, C + many * ldc, M - many, N, K, lda, ldb, ldc);
    }
}
"""


class WideningMicroKernel(cpp_micro_gemm.CppMicroGemm):
    """Products of 16-bit integers, which AVX2 adds in pairs to 32 bits and never saturates.

    Without VNNI, the instruction for pairs of 8-bit integers saturates at 16 bits, and with what makes it exact it is no
    faster. Weights are in `hfq.runtime.layouts.PANELS`.
    """

    ROWS = 24
    _TILE = 6  # rows whose sums fit into the 16 registers, beside what they are made from

    def get_kernel_extra_args_declare(self) -> str:
        return f"{self.name}_rows& rows,"

    def get_kernel_extra_args(self, **_: Any) -> list[str]:
        return ["rows,"]

    def codegen_init(self, kernel: Any) -> str:
        return f"{self.name}_rows rows;"

    def codegen_define(self, kernel: Any) -> str:
        declaration = self.get_kernel_declaration()
        return _rendered(_WIDENING, declaration=declaration, name=self.name, tile=self._TILE)


_WIDENING = """
#include <immintrin.h>

// Rows as 16-bit integers, kept while they are multiplied by one block of the weight after the other.
struct {{name}}_rows {
    const uint8_t* kept[2] = {};  // the template may go through the columns in two parts
    std::vector<int16_t> wide[2];
    int oldest = 0;

    const int16_t* get(const uint8_t* A, int64_t M, int64_t K, int64_t lda) {
        for (int i = 0; i < 2; i++)
            if (kept[i] == A) return wide[i].data();
        kept[oldest] = A;
        auto& to = wide[oldest];
        oldest = 1 - oldest;
        to.resize(M * K);
        for (int64_t m = 0; m < M; m++) {
            int64_t k = 0;
            for (; k + 16 <= K; k += 16)
                _mm256_storeu_si256(
                    reinterpret_cast<__m256i*>(&to[m * K + k]),
                    _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(A + m * lda + k))));
            for (; k < K; k++) to[m * K + k] = A[m * lda + k];
        }
        return to.data();
    }
};

template <int64_t M>
inline void {{name}}_tile(
    const int16_t* A, const int8_t* B, int32_t* C, int64_t K, int64_t lda, int64_t ldc, bool accum
) {
    __m256i sums[2 * M];
    __m256i pair, columns[2];
    auto at = [&](int i) { return reinterpret_cast<__m256i*>(C + i / 2 * ldc + i % 2 * 8); };
    c10::ForcedUnroll<2 * M>{}([&](auto i) { sums[i] = accum ? _mm256_loadu_si256(at(i)) : _mm256_setzero_si256(); });
    for (int64_t k = 0; k < K; k += 2) {
        c10::ForcedUnroll<2 * M>{}([&](auto i) {
            if constexpr (i < 2)
                columns[i] = _mm256_cvtepi8_epi16(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(B + k * 16 + i * 16)));
        });
        c10::ForcedUnroll<2 * M>{}([&](auto i) {
            if constexpr (i % 2 == 0)
                pair = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(A + i / 2 * lda + k));
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pair, columns[i % 2]));
        });
    }
    c10::ForcedUnroll<2 * M>{}([&](auto i) { _mm256_storeu_si256(at(i), sums[i]); });
}

{{declaration}} {
    constexpr int64_t PART = 768;  // columns whose codes and weights fit into the first cache
    const int16_t* wide = rows.get(A, M, K, lda);
    for (int64_t k = 0; k < K; k += PART) {
        const int64_t size = std::min(PART, K - k);
        auto tile = [&](auto count, int64_t m) {
            {{name}}_tile<count>(wide + m * K + k, B + k * 16, C + m * ldc, size, K, ldc, accum || k > 0);
        };
        int64_t m = 0;
        for (; m + {{tile}} <= M; m += {{tile}}) tile(std::integral_constant<int64_t, {{tile}}>{}, m);
        switch (M - m) {
{%- for count in range(1, tile) %}
            case {{count}}: tile(std::integral_constant<int64_t, {{count}}>{}, m); break;
{%- endfor %}
        }
    }
}
"""


def _rendered(source: str, **names: Any) -> str:
    text: str = KernelTemplate._template_from_string(source).render(**names)
    return text
