"""Int8 matmuls as inductor compiles them, with what comes before and after.

A call of oneDNN costs as much as the product of a few tokens, and its GELU a tenth of a large batch. On CPUs with
AVX-512, oneDNN's layout of a weight is the one that inductor's own matmul reads, so both run from one copy in memory.
On x86 without VNNI, where oneDNN is not exact and the portable kernel multiplies floats, compiled code multiplies the
codes as 16-bit integers: exact, and one and a half times as fast.
"""

import copy

import torch
from torch import Tensor, nn

from ..int8.linear import PackedLinear, packed_linears
from ..kernels.checked import CheckedKernel
from ..kernels.kernel import SMALLEST, SYMMETRIC_RANGE, PostOp, apply_post_op
from ..kernels.layouts import PANELS, VNNI
from ..kernels.native import bytes_of
from ..kernels.onednn import OneDnnKernel
from ..kernels.packing import descriptor_of, packing
from ..kernels.portable import PortableKernel
from ..kernels.selection import select_kernel


def lay_out(model: nn.Module, *, panels: bool) -> None:
    """Have kernels of CPUs without VNNI keep the weights of `model` as compiled code reads them.

    `panels`: where its own matmuls multiply them; else they are plain, and multiplied as floats.
    """
    for packed in packed_linears(model):
        if _is_without_vnni(packed):
            weight = packed.kernel.unpack(packed.weight, packed.scale, packed.in_features)
            packed.weight = PANELS.arrange(weight) if panels and _suits_panels(packed) else weight
            packed.kernel = PortableKernel()  # in this order: who is in a forward meanwhile may see one change alone


def lay_out_for_kernels(model: nn.Module) -> None:
    """Take back what `lay_out` did."""
    for packed in packed_linears(model):
        if _is_without_vnni(packed):
            weight = packed.kernel.unpack(packed.weight, packed.scale, packed.in_features)
            packed.kernel = select_kernel()
            packed.weight = packed.kernel.pack(weight, packed.scale)
            if not packed.weight.is_mkldnn:
                packed.kernel = PortableKernel()


def in_blocks(packed: PackedLinear) -> "BlockedMatmul | None":
    """`packed` for a compiler; None where its kernel is to multiply, or has laid the weight out in another way."""
    if packed.activation == "weight-only":
        return None
    if _is_without_vnni(packed):
        return BlockedMatmul(packed, packed.weight) if packed.weight.dim() == 3 else None
    shape = len(packed.scale), packed.in_features
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or packed.kernel.name != OneDnnKernel.name:
        return None
    if any(features % VNNI.block for features in shape):
        return None
    try:
        # The layout depends on the number of threads there were when the weight was packed, so the weight is asked.
        expected = packing(*shape, threads=torch.get_num_threads())
        if expected is None or descriptor_of(packed.weight) != expected.descriptor:
            return None
        memory = bytes_of(packed.weight, len(packed.scale) * packed.in_features)
        return BlockedMatmul(packed, memory.view(-1, packed.in_features, VNNI.block))
    except (AttributeError, RuntimeError):  # another torch, which does not say how a weight is laid out
        return None


class BlockedMatmul:
    """What a `PackedLinear` computes, in operations that inductor fuses into the matmul. It is only ever traced.

    Everything that differs between two checkpoints is in tensors, so that one compiled graph serves both, and layers of
    the same shape share their code. `weight`: int8 `[out / block, in, block]`, over the memory of `packed.weight`;
    `scale`, `offset`: float32 `[out]`; `input_codes`, `output_codes`: float32 `[2]`, the inverse of a scale and a zero
    point.
    """

    parameter = None  # as of any packed weight (`hfq.runtime.int8.packed.PackedWeight`)

    def __init__(self, packed: PackedLinear, weight: Tensor) -> None:
        self.dtype = packed.dtype
        self.weight = weight
        self.scale, self.bias, self.input_codes = packed.scale, packed.bias, None
        scale, zero_point, bias = 1.0, 128, None
        if packed.activation == "static":
            scale, zero_point, bias = packed.input_scale, packed.zero_point, packed.bias
            self.scale, self.bias, self.input_codes = packed.scale * scale, None, _codes(scale, zero_point)
        codes = torch.zeros(1, packed.in_features, dtype=torch.uint8)
        zeros = packed.kernel.static(codes, packed.weight, packed.scale, bias, (scale, zero_point))
        self.offset = zeros.view(-1).contiguous()
        self.output_codes = None if packed.output is None else _codes(*packed.output)

    def __call__(
        self, x: Tensor, post_op: PostOp | None, residual: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if x.dtype == torch.uint8:
            y = self._matmul(rows)
        elif self.input_codes is not None:
            y = self._matmul(torch.ops.hfq.quantize(rows.float(), self.input_codes))
        else:
            codes, row_scale = torch.ops.hfq.quantize_rows(rows.float())
            y = self._matmul(codes, row_scale)
        y = y.view(*x.shape[:-1], len(self.scale))
        rounded = self.output_codes is not None
        y = gelu(y) if post_op == "gelu" and rounded else apply_post_op(y, post_op)
        if residual is not None:
            y = y + residual
        if self.output_codes is not None:
            return torch.ops.hfq.quantize(y, self.output_codes)
        return y.to(self.dtype if x.dtype == torch.uint8 else x.dtype)

    def alone(self, x: Tensor) -> Tensor:
        """float `[.., out]`, whatever it is to be for others: in a model whose layers do not do each other's work."""
        plain = copy.copy(self)
        plain.output_codes = None
        return plain(x, None)

    def unpack(self) -> Tensor:
        """int8 `[out, in]`, for a model that looks at its weight, as T5 does."""
        layout = VNNI if self.weight.shape[-1] == VNNI.block else PANELS
        return layout.restore(self.weight)

    def _matmul(self, codes: Tensor, row_scale: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.hfq.int8_linear(codes, self.weight, self.scale, self.offset, row_scale, self.bias)
        return y


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 to uint8 codes, and the scale of each row, in such operations; as `token_scale` of kernels finds it."""
    largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    scale = (largest / SYMMETRIC_RANGE).clamp(min=SMALLEST)
    return quantize(x, 1 / scale, 128), scale


def quantize(x: Tensor, inverse_scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """float32 to uint8 codes, in operations that compiled code does fast."""
    scaled = x * inverse_scale
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        # Clamped as integers, but for what none holds: compiled code for floats would look for NaN at each bound.
        return (scaled.clamp(max=1e9).round() + zero_point).to(torch.int32).clamp(0, 255).to(torch.uint8)
    return (scaled.round() + zero_point).clamp(0, 255).to(torch.uint8)  # AVX2 narrows integers one by one


def _is_without_vnni(packed: PackedLinear) -> bool:
    return packed.activation != "weight-only" and isinstance(packed.kernel, PortableKernel | CheckedKernel)


def _suits_panels(packed: PackedLinear) -> bool:
    """Whether compiled code can multiply it: torch names AVX2 and AVX-512 on x86 only."""
    capable = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return capable and PANELS.suits(len(packed.scale), packed.in_features)


def _codes(scale: float, zero_point: int) -> Tensor:
    return torch.tensor([1 / scale, zero_point], dtype=torch.float32)


def gelu(x: Tensor) -> Tensor:
    """GELU to 8e-5, in a third of the operations of the exact one.

    That is far below a step of the codes it becomes: their range reaches as far as the largest `x`, in 255 steps.

    It is `max(x, 0) - g(|x|)`, with `g(a) = a P(X > a)` of a normal X as a polynomial in `bound - a`, and as 0 beyond the
    bound. The polynomial is the minimax one, by Lawson's iteration.
    """
    rest = torch.relu(_GELU_BOUND - x.abs())  # no clamp, for which compiled code would look for NaN
    p = torch.full_like(rest, _GELU[-1])
    for coefficient in reversed(_GELU[:-1]):
        p = p * rest + coefficient
    return torch.relu(x) - rest * p


_GELU_BOUND = 4.2
_GELU = (
    -0.00021784445567567544, 0.009431111313825052, -0.03248830294301276, 0.053347018212685234, -0.04421261571370906,
    0.020987539609103985, -0.005302978264313519, 0.0006445256651413164, -2.9336446307894916e-05,
)  # fmt: skip
