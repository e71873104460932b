"""What an int8 matmul kernel does, and the arithmetic that all of them share. Which runs here, `hfq.runtime.kernels.selection` finds out.

Not here: how scales are found (`hfq.ptq`) or where layers live (`hfq.runtime.int8.linear`).
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

PostOp = Literal["relu", "gelu", "gelu_tanh"]
SYMMETRIC_RANGE = 127.5  # compressed-tensors divides a token's absolute maximum by this: (127 + 128) / 2
SMALLEST = torch.finfo(torch.float32).tiny  # scale: of a token of zeros
FEW_NUMBERS = 1 << 16  # fewer operations take less time than fewer bytes
# An operation makes a tensor of a number, each time.
_RANGE = torch.tensor(SYMMETRIC_RANGE, dtype=torch.float32, device="cpu")
_SMALLEST = torch.tensor(SMALLEST, dtype=torch.float32, device="cpu")
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
    if x.numel() <= FEW_NUMBERS:
        return quantized.int_repr()
    # A view of the codes: int_repr() would copy them, which takes longer than quantizing did.
    return torch.empty(0, dtype=torch.uint8).set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride())
