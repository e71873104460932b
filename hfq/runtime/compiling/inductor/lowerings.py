"""How inductor compiles int8 matmuls, in the process that compiles (`hfq.runtime.compiling.inductor.compiler`): nothing here multiplies."""

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import decomposition, ir, lowering, mkldnn_ir
from torch._inductor.codegen.cpp import CppKernel, CppVecKernel
from torch._inductor.codegen.cpp_gemm_template import CppGemmTemplate
from torch._inductor.codegen.cpp_utils import cexpr_index
from torch._inductor.fx_passes.mkldnn_fusion import _mkldnn_fusion_init
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V, ops

from ...kernels.layouts import PANELS, VNNI
from ..blocked import quantize
from . import micro_kernels
from .rewriting import LANES

SHARES = 4  # of a matmul, for each thread
K_BLOCK = 1024  # codes of a row that are multiplied at a time: a further part adds to sums that were stored


def register() -> None:
    """Have inductor compile `hfq::int8_linear`, and call oneDNN's matmul with weights that are no constants."""
    _register_quantize()
    _load_integers_at_once()
    _register_blocked_matmul()
    if torch.backends.mkldnn.is_available():
        _register_onednn_matmul()


def replace_lowering(operator: Any, lower: Callable[..., Any]) -> None:
    """Have inductor compile `operator` by `lower`, which is given arguments as they are."""
    decorate: Callable[..., Any] = lowering.register_lowering(operator, type_promotion_kind=None)
    decorate(lower)


def _register_quantize() -> None:
    """With AVX-512, and in rows of whole vectors, by the conversion that rounds and keeps to the bounds by itself."""

    def lower(x: Any, codes: Any) -> Any:
        load, load_codes = x.make_loader(), codes.make_loader()

        def at(index: Any) -> Any:
            inverse_scale, zero_point = (load_codes([sympy.Integer(i)]) for i in range(2))
            return ops.round_to_int(ops.add(ops.mul(load(index), inverse_scale), zero_point), torch.uint8)

        return ir.Pointwise.create(device=x.get_device(), dtype=torch.uint8, inner_fn=at, ranges=x.get_size())

    def decompose(x: Tensor, codes: Tensor) -> Any:
        if torch.backends.cpu.get_cpu_capability() == "AVX512" and x.shape[-1] % LANES == 0:
            return NotImplemented
        return quantize(x, codes[0], codes[1])

    decomposition.decompositions[torch.ops.hfq.quantize.default] = decompose
    replace_lowering(torch.ops.hfq.quantize.default, lower)
    one_by_one = CppKernel.get_to_dtype_expr

    def expression(self: Any, source: Any, dtype: Any, source_dtype: Any, rounding: bool = False) -> str:
        """Where compiled code takes numbers one by one, it rounds halves in another way, and keeps to no bounds."""
        if rounding and dtype == torch.uint8:
            source = f"std::min(std::max(0.f, std::nearbyint({source})), 255.f)"
        text: str = one_by_one(self, source, dtype, source_dtype, rounding)
        return text

    setattr(CppKernel, "get_to_dtype_expr", expression)  # noqa: B010 - mypy would have it no other way


def _register_blocked_matmul() -> None:
    """By inductor's template for int8 matmuls, which what follows the matmul is fused into.

    The template is made for constant weights, which it would lay out itself.
    """

    def decompose(codes: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, *of_rows: Tensor | None) -> Any:
        row_scale, bias = (*of_rows, None, None)[:2]
        if row_scale is None:
            return NotImplemented
        y = torch.ops.hfq.int8_linear(codes, weight, scale, offset) * row_scale
        return y if bias is None else y + bias

    def lower(codes: Any, weight: Any, scale: Any, offset: Any, *of_rows: None) -> Any:
        for tensor in (codes, weight, scale, offset):
            tensor.realize()
        codes = ir.ExternKernel.require_contiguous(codes)
        sizes = micro_kernels.register(VNNI if weight.get_size()[-1] == VNNI.block else PANELS)

        def scaled(products: Any) -> Any:
            loaders = [tensor.make_loader() for tensor in (products, scale, offset)]

            def at(index: Any) -> Any:
                product, by, plus = (
                    loader(i) for loader, i in zip(loaders, (index, index[-1:], index[-1:]), strict=True)
                )
                return ops.add(ops.mul(ops.to_dtype(product, torch.float32), by), plus)

            shape = {"device": products.get_device(), "dtype": torch.float32, "ranges": products.get_size()}
            return ir.Pointwise(inner_fn=at, **shape)

        template = _Int8Matmul(
            # It expects a bias, then scales and zero points, which only `scaled` reads.
            input_nodes=[codes, weight, offset, scale, scale, scale, scale],
            has_bias=True,
            layout=ir.FixedLayout(codes.get_device(), torch.float32, [codes.get_size()[0], scale.get_size()[0]]),
            num_threads=parallel_num_threads() * SHARES,
            register_blocking=sizes,
            epilogue_creator=scaled,
        )
        return template.generate().output_node()

    decomposition.decompositions[torch.ops.hfq.int8_linear.default] = decompose
    replace_lowering(torch.ops.hfq.int8_linear.default, lower)


class _Int8Matmul(CppGemmTemplate):
    """Inductor's, with AVX-512 in parts of `K_BLOCK` instead of what the first cache holds.

    Threads take shares of it as they get done: one that is held up, by whatever else runs on its core, keeps no other.
    """

    def render(self, *args: Any, **kwargs: Any) -> str:
        text: str = super().render(*args, **kwargs)
        threads = f"omp parallel num_threads({self.num_threads // SHARES})"
        text = text.replace(f"omp parallel num_threads({self.num_threads})", threads)
        return text.replace("schedule(static, 1)", "schedule(dynamic, 1)")

    def get_options(self, *args: Any, **kwargs: Any) -> Any:
        options = super().get_options(*args, **kwargs)
        if self.register_blocking.block_n == VNNI.block:
            options["L1_cache_size"] = K_BLOCK * VNNI.block * 5 // 4  # of which it uses four fifths
        return options


def _load_integers_at_once() -> None:
    """Have AVX2 code load vectors of products directly.

    torch's way of loading some 32-bit integers copies them first, even where it is a whole vector, and each load waits
    until all that was written before is in the cache.
    """
    some = CppVecKernel._get_vec_load_line

    def line(self: Any, var: str, index: Any, dtype: torch.dtype, load_mask: Any = None) -> str:
        text: str = some(self, var, index, dtype, load_mask)
        if dtype == torch.int32 and load_mask is None and self.num_elems == self.vec_isa.nelements():
            return f"{text.removesuffix(f', {cexpr_index(self.num_elems)})')})"
        return text

    setattr(CppVecKernel, "_get_vec_load_line", line)  # noqa: B010 - mypy would have it no other way


def _register_onednn_matmul() -> None:
    """Have inductor call oneDNN's matmul with any weight: its own lowering insists on a constant, to look into it."""

    def rows(x: Any) -> Any:
        return lowering.view(x, [-1, x.get_size()[-1]])

    def lower(operator: Any, node: Any, *, others: int) -> None:
        def call(x: Any, scale: float, zero_point: int, *arguments: Any) -> Any:
            weight, weight_scale, weight_zero_point, *further = arguments
            further[:others] = map(rows, further[:others])
            codes = (
                V.graph.add_tensor_constant(torch.tensor(scale, dtype=torch.float32)),
                V.graph.add_tensor_constant(torch.tensor(zero_point, dtype=torch.int32)),
            )
            y = ir.TensorBox.create(node.create(rows(x), *codes, weight, weight_scale, weight_zero_point, *further))
            return lowering.view(y, [*x.get_size()[:-1], y.get_size()[-1]])

        replace_lowering(operator, call)

    _mkldnn_fusion_init()  # it registers its own when it is first used, which is to be before ours
    matmul = torch.ops.onednn.qlinear_pointwise
    lower(matmul.default, mkldnn_ir.QLinearPointwisePT2E, others=0)
    lower(matmul.binary, mkldnn_ir.QLinearPointwiseBinaryPT2E, others=1)
