"""A classifier's last layers, of whose outputs it reads each row's first token alone.

The others' keys and values count for that one, so a last layer has to compute those; what it does with the other tokens
after attention, three quarters of its matmuls, is left out. Which layers they are, `hfq.runtime.fusion.flow` finds out.
"""

from collections.abc import Callable

from torch import Tensor


def of_first_token(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """`function` of the first tokens of `[batch, length, ..]`. Its output `[batch, 1, out]` stands for every token."""
    length = next(tensor.shape[1] for tensor in tensors if tensor is not None)
    y = function(*(None if tensor is None else tensor[:, :1].contiguous() for tensor in tensors))
    return y.expand(-1, length, -1)
