"""Int8 matmul kernels behind one interface. Which of them runs here, `hfq.runtime.kernels.kernel.selection` finds out.

Not here: how scales are found (`hfq.ptq`) or where layers live (`hfq.runtime.int8.linear`).
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import packing
from .layouts import PANELS
from .weight_memory import WeightMemory

PostOp = Literal["relu", "gelu", "gelu_tanh"]
SYMMETRIC_RANGE = 127.5  # compressed-tensors divides a token's absolute maximum by this: (127 + 128) / 2
SMALLEST = torch.finfo(torch.float32).tiny  # scale: of a token of zeros
DYNAMIC_ROWS = 1024  # tokens quantized and multiplied at a time: their floats stay out of the peak
FEW_NUMBERS = 1 << 16  # fewer operations take less time than fewer bytes
MANY_NUMBERS = 1 << 20  # of a sum that takes memory of its own: a sum after the matmul is faster than oneDNN's in it
# An operation makes a tensor of a number, each time.
_RANGE = torch.tensor(SYMMETRIC_RANGE, dtype=torch.float32, device="cpu")
_SMALLEST = torch.tensor(SMALLEST, dtype=torch.float32, device="cpu")
_NO_ZERO_POINTS = torch.zeros(1, dtype=torch.int32, device="cpu")  # weights are symmetric
_ONEDNN_POST_OPS: dict[PostOp | None, tuple[str, str]] = {
    None: ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


Codes = tuple[float, int]  # scale, and zero point in [0, 255]: x = (code - zero point) * scale


class Epilogue(NamedTuple):
    """What a matmul does with its products before they are stored.

    First comes `post_op`, an activation function. Then, with `output`, they become uint8 codes of those, else `dtype`.
    Or `residual`, float `[.., out]`, is added; then there is neither of both, and `dtype` is float32. `in_place`: nobody
    reads the residual afterwards, so the sum may take its memory.
    """

    post_op: PostOp | None = None
    output: Codes | None = None
    residual: Tensor | None = None
    in_place: bool = False
    dtype: torch.dtype = torch.float32


PLAIN = Epilogue()


class Kernel(Protocol):
    """A matmul of quantized activations with one layer's packed int8 weight.

    Activations are uint8 codes.
    """

    name: str

    def pack(self, weight: Tensor, scale: Tensor) -> Tensor:
        """int8 `[out, in]` and float32 `[out]` to the layout that `static` and `dynamic` read."""

    def end_block(self) -> None:
        """Keep what is packed from now on apart from what was: of another model, which lives for another time."""

    def unpack(self, packed: Tensor, scale: Tensor, in_features: int) -> Tensor:
        """The int8 `[out, in]` weight that `pack` was given, bit for bit."""

    def static(
        self,
        codes: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        input_codes: Codes,
        epilogue: Epilogue = PLAIN,
    ) -> Tensor:
        """uint8 `[.., in]`, codes of `input_codes`, to `[.., out]`, as the epilogue has it."""

    def dynamic(
        self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *, post_op: PostOp | None
    ) -> Tensor:
        """float `[.., in]`, quantized symmetrically with a scale per row, to float32 `[.., out]`."""


class OneDnnKernel:
    """oneDNN's u8 x s8 matmul through torch (VNNI, AMX)."""

    name = "onednn"

    def __init__(self) -> None:
        self._memory = WeightMemory()

    def pack(self, weight: Tensor, scale: Tensor) -> Tensor:
        return packing.pack(weight, self._memory)

    def end_block(self) -> None:
        self._memory.end_block()

    def unpack(self, packed: Tensor, scale: Tensor, in_features: int) -> Tensor:
        found = packing.unpack(packed, in_features)
        if found is not None:
            return found
        # The packed layout is oneDNN's own business, so ask the matmul: identity times weight is exact in int32.
        identity = torch.eye(in_features, dtype=torch.uint8)
        columns = self.static(identity, packed, torch.ones_like(scale), None, (1.0, 0))
        return columns.t().to(torch.int8).contiguous()

    def static(
        self,
        codes: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        input_codes: Codes,
        epilogue: Epilogue = PLAIN,
    ) -> Tensor:
        post_op, output, residual, in_place, dtype = epilogue
        input_scale, zero_point = input_codes
        shape = (*codes.shape[:-1], scale.shape[0])
        if residual is not None and _can_be_added(residual, shape, in_place):
            in_place = in_place and not torch.compiler.is_compiling()
            y = torch.ops.onednn.qlinear_pointwise.binary(
                codes, input_scale, zero_point, packed, scale, _NO_ZERO_POINTS, residual, bias,
                1.0, 0, torch.float32, 1.0, 0, "sum" if in_place else "add", 1.0, "none", [], "",
            )  # fmt: skip
            residual = None
        else:
            output_scale, output_zero_point = output or (1.0, 0)
            name, algorithm = _ONEDNN_POST_OPS[post_op]
            y = torch.ops.onednn.qlinear_pointwise(
                codes, input_scale, zero_point, packed, scale, _NO_ZERO_POINTS, bias,
                output_scale, output_zero_point, torch.uint8 if output else dtype, name, [], algorithm,
            )  # fmt: skip
        if y.dim() != codes.dim():  # of an empty input
            y = y.view(*codes.shape[:-1], y.shape[-1])
        return y if residual is None else added(y, residual)

    def dynamic(
        self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *, post_op: PostOp | None
    ) -> Tensor:
        if torch.compiler.is_compiling() or x.numel() <= DYNAMIC_ROWS * x.shape[-1]:  # compiled for any number: no loop
            return apply_post_op(self._rows(x, packed, scale, bias), post_op)
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty(len(rows), scale.shape[0], dtype=torch.float32)
        for part, out in zip(rows.split(DYNAMIC_ROWS), y.split(DYNAMIC_ROWS), strict=True):
            apply_post_op(self._rows(part, packed, scale, bias, out), post_op)
        return y.view(*x.shape[:-1], scale.shape[0])

    def _rows(
        self, rows: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        rows = rows.float()
        row_scale = token_scale(rows)
        codes = quantize_uint8(rows / row_scale, 1.0, 128)
        products = self.static(codes, packed, scale, None, (1.0, 128))
        out = products if out is None else out
        if bias is None:
            return torch.mul(products, row_scale, out=out)
        return torch.addcmul(bias, products, row_scale, out=out)


class PortableKernel:
    """Exact on any CPU: int8 stays in memory, each call widens the codes to float32 and multiplies there.

    A weight may also be in `PANELS`, for compiled code (`hfq.runtime.compiling.blocked`); here it takes longer then.
    """

    name = "portable"

    def pack(self, weight: Tensor, scale: Tensor) -> Tensor:
        return weight.clone()  # out of the mapped checkpoint file

    def end_block(self) -> None:
        """Each weight is apart."""

    def unpack(self, packed: Tensor, scale: Tensor, in_features: int) -> Tensor:
        return PANELS.restore(packed) if packed.dim() == 3 else packed

    def static(
        self,
        codes: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        input_codes: Codes,
        epilogue: Epilogue = PLAIN,
    ) -> Tensor:
        input_scale, zero_point = input_codes
        y = self._matmul(codes.float().sub_(zero_point), packed, scale * input_scale, bias)
        y = apply_post_op(y, epilogue.post_op)
        if epilogue.residual is not None:
            return added(y, epilogue.residual)
        return y.to(epilogue.dtype) if epilogue.output is None else quantize_uint8(y, *epilogue.output)

    def dynamic(
        self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, *, post_op: PostOp | None
    ) -> Tensor:
        x = x.float()
        row_scale = token_scale(x)
        y = self._matmul((x / row_scale).round_().clamp_(-128, 127), packed, scale, None).mul_(row_scale)
        return apply_post_op(y if bias is None else y.add_(bias), post_op)

    def _matmul(self, codes: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # sums of codes are exact in float32 alone
            y = F.linear(codes, self.unpack(packed, scale, codes.shape[-1]).float()).mul_(scale)
        return y if bias is None else y.add_(bias)


def _can_be_added(residual: Tensor, shape: tuple[int, ...], in_place: bool) -> bool:
    """Whether oneDNN can, and should, add `residual` to products of `shape`."""
    if residual.dtype != torch.float32 or residual.shape != shape or not residual.is_contiguous():
        return False
    return in_place or torch.compiler.is_compiling() or residual.numel() < MANY_NUMBERS


def added(y: Tensor, residual: Tensor) -> Tensor:
    """The sum, in the memory of `y` if it has the sum's shape and type."""
    fits = residual.shape == y.shape or torch.broadcast_shapes(y.shape, residual.shape) == y.shape
    if not fits or torch.result_type(y, residual) != y.dtype:
        return y + residual
    return y.add_(residual)


def apply_post_op(y: Tensor, post_op: PostOp | None) -> Tensor:
    """The activation function that was fused into a layer, in place, where its kernel cannot do it."""
    if post_op is None:
        return y
    if post_op == "relu":
        return y.relu_()
    return torch.ops.aten.gelu_(y, approximate="tanh" if post_op == "gelu_tanh" else "none")


def token_scale(x: Tensor) -> Tensor:
    """Symmetric int8 scale of each row: float32 `[.., in]` to `[.., 1]`, never zero."""
    compiling = torch.compiler.is_compiling()
    # amax and amin are vectorized; an infinity norm over the last dimension is not, and takes 10 to 20 times as long.
    if not compiling and x.numel() < FEW_NUMBERS:  # in this order, or a graph is for few numbers or for many
        largest = x.abs().amax(-1, keepdim=True)
    else:
        largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    if compiling:
        return largest.div_(SYMMETRIC_RANGE).clamp_(min=SMALLEST)
    return torch.addcdiv(_SMALLEST, largest, _RANGE)  # one step; so little is added that it only shows at zero


def quantize_uint8(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """float32 to uint8 codes: `clamp(round(x / scale) + zero_point, 0, 255)`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not hasattr(torch, "quantize_per_tensor"):
        return (x / scale).round().add_(zero_point).clamp_(0, 255).to(torch.uint8)
    quantized = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    # A view of the codes: int_repr() would copy them, which takes longer than quantizing did.
    return torch.empty(0, dtype=torch.uint8).set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride())
