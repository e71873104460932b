"""What multiplies some rows by one block of a weight inside inductor's int8 matmul, in the process that compiles."""

import hashlib
from typing import Any

import torch
from torch._inductor.codegen import cpp_micro_gemm
from torch._inductor.codegen.common import KernelTemplate
from torch._inductor.codegen.cpp_utils import GemmBlocking
from torch._inductor.cpu_vec_isa import VecAMX, VecAVX512VNNI, pick_vec_isa

from ...kernels.cpu import onednn_is_limited
from ...kernels.layouts import VNNI, Layout


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


class SharedMicroKernel(cpp_micro_gemm.CppMicroGemm):
    """A function that all matmuls of a graph call: named by its code, and compiled once, for half of the compiler's time."""

    def codegen_define(self, kernel: Any) -> str:
        self.name = "multiply"
        code = self.define(kernel)
        self.name = f"multiply_{hashlib.sha256(code.encode()).hexdigest()[:8]}"
        return f"#ifndef HAS_{self.name}\n#define HAS_{self.name}\n{self.define(kernel)}\n#endif\n"

    def define(self, kernel: Any) -> str:
        """The code, in which its functions' names begin with `name`."""
        raise NotImplementedError


class VnniMicroKernel(SharedMicroKernel, cpp_micro_gemm.CppMicroGemmAVX512VNNI):
    """oneDNN's kernel, which uses AMX, and one for a few rows: with AMX our own, else inductor's.

    Weights are in `hfq.runtime.kernels.layouts.VNNI`.
    """

    ROWS = 64  # that a thread takes at least
    FEW = 32  # up to here, calling oneDNN's kernel for each block of a weight costs more than it saves
    FEW_IN_TILES = 63  # the same, with AMX

    def define(self, kernel: Any) -> str:
        tiles = isinstance(pick_vec_isa(), VecAMX) and not onednn_is_limited()
        few = _rendered(_TILES, name=self.name) if tiles else self._vectors(kernel)
        few_rows = self.FEW_IN_TILES if tiles else self.FEW
        declaration = self.get_kernel_declaration()
        return few + _rendered(_VNNI, declaration=declaration, name=self.name, few_rows=few_rows, tiles=tiles)

    def _vectors(self, kernel: Any) -> str:
        """What multiplies a few rows without AMX."""
        name, blocking = self.name, self.register_blocking
        self.name, self.register_blocking = f"{name}_few", GemmBlocking(6, blocking.block_n, blocking.block_k)
        few: str = cpp_micro_gemm.CppMicroGemmAVX512VNNI.codegen_define(self, kernel)
        self.name, self.register_blocking = name, blocking
        return few

    def codegen_finalize(self, kernel: Any) -> str:
        return "at::native::cpublas::brgemm_release();"


_VNNI = """
#include <ATen/native/CPUBlas.h>
{{declaration}} {
    // In multiples: oneDNN makes and keeps a kernel for each number of rows.
    const int64_t many = M > {{few_rows}} ? M / 32 * 32 : 0;
    if (many > 0) {
        at::native::cpublas::brgemm(many, N, K, lda, ldb, ldc, accum, A, B, C);
    }
    if (M > many) {
{%- if tiles %}
        at::native::cpublas::brgemm_release();  // the next call would take our configuration of tiles for its own
{%- endif %}
        {{name}}_few<accum, prefetch>(A + many * lda, B, C + many * ldc, M - many, N, K, lda, ldb, ldc);
    }
}
"""

# Weights of a few rows come from memory or the last cache, which is what takes the time: they are asked for two steps
# of four tiles ahead, in the next block of the weight as well, which lies behind this one.
_TILES = """
#include <ATen/cpu/Utils.h>
#include <immintrin.h>

// Up to 16 rows, of which each step multiplies `step` codes, up to 64: four tiles of sums, from one of codes and three
// that weights take turns in.
template <bool accum>
inline void {{name}}_tiles(
    const uint8_t* A, const int8_t* B, int32_t* C, int64_t M, int64_t K, int64_t step, int64_t lda, int64_t ldc
) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {};
    } tiles;
    for (int i = 0; i < 5; i++) tiles.rows[i] = M;
    for (int i = 5; i < 8; i++) tiles.rows[i] = step / 4;
    tiles.bytes[4] = step;
    _tile_loadconfig(&tiles);
    const int64_t stride = ldc * sizeof(int32_t);
    if constexpr (accum) {
        _tile_loadd(0, C, stride);
        _tile_loadd(1, C + 16, stride);
        _tile_loadd(2, C + 32, stride);
        _tile_loadd(3, C + 48, stride);
    }
    for (int64_t k = 0; k < K; k += step) {
        const int8_t* weights = B + k * 64;
        for (int64_t line = 0; line < step; line++) _mm_prefetch(weights + 8192 + line * 64, _MM_HINT_T0);
        _tile_loadd(4, A + k, lda);
        _tile_loadd(5, weights, 256);
        _tile_dpbusd(0, 4, 5);
        _tile_loadd(6, weights + 64, 256);
        _tile_dpbusd(1, 4, 6);
        _tile_loadd(7, weights + 128, 256);
        _tile_dpbusd(2, 4, 7);
        _tile_loadd(5, weights + 192, 256);
        _tile_dpbusd(3, 4, 5);
    }
    _tile_stored(0, C, stride);
    _tile_stored(1, C + 16, stride);
    _tile_stored(2, C + 32, stride);
    _tile_stored(3, C + 48, stride);
}

template <bool accum, bool prefetch>
inline void {{name}}_few(
    const uint8_t* A, const int8_t* B, int32_t* C,
    int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc
) {
    static const bool allowed = at::cpu::init_amx();  // this process, by the kernel
    TORCH_CHECK(allowed, "This process may not use AMX");
    const int64_t whole = K / 64 * 64, rest = K - whole;
    for (int64_t m = 0; m < M; m += 16) {
        const int64_t rows = std::min<int64_t>(M - m, 16);
        if (whole) {{name}}_tiles<accum>(A + m * lda, B, C + m * ldc, rows, whole, 64, lda, ldc);
        if (!rest) continue;
        auto* add = whole ? {{name}}_tiles<true> : {{name}}_tiles<accum>;
        add(A + m * lda + whole, B + whole * 64, C + m * ldc, rows, rest, rest, lda, ldc);
    }
}
"""


class WideningMicroKernel(SharedMicroKernel):
    """Products of 16-bit integers, which AVX2 adds in pairs to 32 bits and never saturates.

    Without VNNI, the instruction for pairs of 8-bit integers saturates at 16 bits, and with what makes it exact it is no
    faster. Weights are in `hfq.runtime.kernels.layouts.PANELS`.
    """

    ROWS = 24
    _TILE = 6  # rows whose sums fit into the 16 registers, beside what they are made from

    def get_kernel_extra_args_declare(self) -> str:
        return f"{self.name}_rows& rows,"

    def get_kernel_extra_args(self, **_: Any) -> list[str]:
        return ["rows,"]

    def codegen_init(self, kernel: Any) -> str:
        return f"{self.name}_rows rows;"

    def define(self, kernel: Any) -> str:
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
