"""A residual sum as part of the matmul before it, and the norm behind it.

Where nobody reads again what is added, it takes the sum, and then the norm's output: activations that move through
memory as they come fill caches with what is not wanted any more.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..int8.known_forward import is_as_made
from ..int8.linear import Int8Linear
from .first_token import of_first_token
from .probe import noise, output_of

MANY = 1 << 20  # numbers, of which another copy would fill caches with what is wanted no more
PART = 1 << 18  # of them that are normalized at a time where they lie, in caches meanwhile


class NormalizedSum:
    """The `forward` of a residual block: `norm(linear(x) + residual)`, where the matmul adds. `names`: of its two arguments.

    `block`: whose it is; where it is not fused, that runs as its class says.

    In forwards in which nobody reads the residual afterwards (`linear.in_place`), oneDNN adds to it where it lies, for
    nothing; a sum in memory of its own takes as long as a third of the matmul.
    """

    def __init__(self, linear: Int8Linear, norm: nn.LayerNorm, *names: str, block: nn.Module | None = None) -> None:
        self.linear, self.norm, self.block = linear, norm, block
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if self.block is not None and not (self.linear.fused_in and self.linear.fused_in.fuses):
            y: Tensor = type(self.block).forward(self.block, *args, **kwargs)
            return y
        x, residual = self.signature.bind(*args, **kwargs).args if kwargs else args
        first_token = self.linear.first_token
        if first_token is not None and first_token.under_way:
            return of_first_token(self._sum, x, residual)
        return self._sum(x, residual)

    def _sum(self, x: Tensor, residual: Tensor) -> Tensor:
        norm, in_place = self.norm, self.linear.in_place
        if in_place is None or not in_place.runs_directly:
            y: Tensor = norm(self.linear(x, residual))
            return y
        # Nobody's hook sees these calls, so they need not be seen: after a matmul, which empties caches, steps take long.
        y = self.linear.forward(x, residual, in_place=True)
        if y.numel() < MANY:
            return functional.layer_norm(y, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        for part in y.view(-1, y.shape[-1]).split(max(1, PART // y.shape[-1])):
            part.copy_(functional.layer_norm(part, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
        return y


def fuse_residual(parent: nn.Module) -> None:
    """Let a block that adds its second input to what its Linear returns, and normalizes the sum, add in the matmul."""
    children = list(parent.children())
    linears = [child for child in children if isinstance(child, Int8Linear)]
    norms = [child for child in children if type(child) is nn.LayerNorm]
    if len(linears) != 1 or len(norms) != 1 or not is_as_made(parent) or not linears[0].is_plain:
        return
    parameters = inspect.signature(parent.forward).parameters.values()
    if [parameter.kind for parameter in parameters] != 2 * [inspect.Parameter.POSITIONAL_OR_KEYWORD]:
        return
    (linear,), (norm,) = linears, norms
    if norm.normalized_shape != (linear.out_features,):
        return
    x, y, residual = noise(linear.in_features), noise(linear.out_features), noise(linear.out_features, seed=1)
    found = output_of(parent, x, residual, outputs={linear: y})
    if found is not None and torch.equal(found, norm(y + residual)):
        parent.forward = NormalizedSum(linear, norm, *(parameter.name for parameter in parameters), block=parent)
