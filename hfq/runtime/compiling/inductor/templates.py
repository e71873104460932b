"""What C++ of our own has in common, in the process that compiles: it is built with the rest of a graph.

It is for x86 with AVX2 or AVX-512, in vectors as wide as the compiled code around it has them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._inductor import ir
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.utils import Placeholder, parallel_num_threads


class Template(CppTemplate):
    """A kernel that reads `tensors` and writes one tensor for each of `layouts`; nothing else is fused into it.

    A subclass has `NAME` and `SOURCE`, whose parameters are its own and `at` (C++ for the first number of each
    tensor), `tensors`, `threads` and `definition`.
    """

    NAME: str
    SOURCE: str

    def __init__(self, tensors: Mapping[str, Any], layouts: Mapping[str, ir.Layout], **parameters: Any) -> None:
        self.layouts = list(layouts.values())
        super().__init__(self.NAME, list(tensors.values()), self.layouts[0], parallel_num_threads())
        self.names = list(tensors), list(layouts)
        self.parameters = parameters

    def results(self) -> list[Any]:
        """What inductor computes with it."""
        template: Any = self  # declared as CUTLASS's by mistake
        buffer = ir.CppTemplateBuffer(self.layout, self.input_nodes, self._make_render, template, None)
        result = ir.TensorBox.create(buffer)
        if len(self.layouts) == 1:
            return [result]
        buffer.outputs = [ir.MultiOutput(layout, buffer, [(list, i)]) for i, layout in enumerate(self.layouts)]
        buffer.layout = ir.MultiOutputLayout(device=self.layout.device)
        return [ir.TensorBox.create(output) for output in buffer.outputs]

    def _make_render(self, buffer: Any, **_: Any) -> tuple[Any, Callable[[], str]]:
        kernel = CppTemplateKernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=self.num_threads)
        return kernel, functools.partial(kernel.render, self, outputs=buffer.outputs or [buffer])

    def render(self, kernel: Any, outputs: list[Any]) -> str:  # type: ignore[override]
        tensors = dict(zip(self.names[0], self.input_nodes, strict=True))
        definition = kernel.def_kernel(inputs=tensors, outputs=dict(zip(self.names[1], outputs, strict=True)))
        text: str = self._template_from_string(_TO_CODES + self.SOURCE).render(
            template=self,
            kernel=kernel,
            definition=definition,
            tensors=tensors,
            at={name: kernel.index(tensor, [0] * len(tensor.get_size())) for name, tensor in tensors.items()},
            threads=self.num_threads,
            **self.parameters,
        )
        return text


def keep_apart() -> None:
    """Have inductor fuse nothing into a `Template`."""
    may_fuse = CppScheduling.can_fuse_vertical

    def can_fuse_vertical(self: Any, first: Any, then: Any) -> bool:
        if first.is_template() and isinstance(first.get_template_node().template, Template):
            return False
        fused: bool = may_fuse(self, first, then)
        return fused

    setattr(CppScheduling, "can_fuse_vertical", can_fuse_vertical)  # noqa: B010 - mypy would have it no other way


def in_rows(x: Any) -> Any:
    """`x` in memory, the numbers of each row side by side."""
    x = ir.ExternKernel.realize_input(x)
    return x if x.get_stride()[-1] == 1 else ir.ExternKernel.require_contiguous(x)


def plain_layout(x: Any, dtype: Any, sizes: Sequence[Any]) -> ir.FixedLayout:
    """Of a new tensor beside `x`."""
    return ir.FixedLayout(x.get_device(), dtype, list(sizes))


# As `hfq::quantize`. The conversion makes of what no integer holds the least one, which without a sign is the largest.
_TO_CODES = r"""
{{template.header().getvalue()}}
#ifndef HFQ_TO_CODES
#define HFQ_TO_CODES
#include <immintrin.h>

class ToCodes {
    using Vector = at::vec::Vectorized<float>;
    const Vector steps, zero_point;

public:
    explicit ToCodes(const float* codes) : steps(codes[0]), zero_point(codes[1]) {}

    // Writes a code for each number of x.
    void operator()(uint8_t* to, Vector x) const {
        const Vector code_and_rest = at::vec::clamp_min(at::vec::fmadd(x, steps, zero_point), Vector(0.f));
#if defined(CPU_CAPABILITY_AVX512)
        const auto code = _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(code_and_rest));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), code);
#else
        const auto code = _mm256_cvtps_epi32(at::vec::clamp_max(code_and_rest, Vector(255.f)));
        const auto half = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(half, half));
#endif
    }
};

inline float sum_of(at::vec::Vectorized<float> x) {
    using Vector = at::vec::Vectorized<float>;
    return at::vec::vec_reduce_all<float>([](const Vector& a, const Vector& b) { return a + b; }, x);
}
#endif
"""
