"""Query, key and value as bfloat16 where attention multiplies that: the matmul writes half as much, and nobody converts.

Which layers' answers attention alone reads, `hfq.runtime.flow` finds out.
"""

from typing import Any

import torch
from torch import Tensor

WORTHWHILE = 256  # rows of a matmul, of which writing and converting twice as much takes longer than to ask


class Narrowing:
    """Says to such layers of a model whether to answer with bfloat16.

    They do as long as the model's config names this attention, and not while a compiler traces, which narrows by itself.
    """

    def __init__(self, config: Any, attention: str) -> None:
        self._config, self._attention = config, attention

    @property
    def active(self) -> bool:
        """Whether it is bfloat16 that is read."""
        return self._config._attn_implementation == self._attention and not torch.compiler.is_compiling()

    def gains(self, x: Tensor) -> bool:
        """The same, for input `[.., in]` of which there is enough."""
        return x.numel() >= WORTHWHILE * x.shape[-1] and self.active
