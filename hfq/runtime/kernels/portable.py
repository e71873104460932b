"""An int8 matmul for any CPU: float products of the codes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernel import PLAIN, Codes, Epilogue, PostOp, added, apply_post_op, quantize_uint8, token_scale
from .layouts import PANELS


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
