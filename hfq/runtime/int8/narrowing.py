"""Query, key and value as bfloat16 where attention multiplies that: the matmul writes half as much, and nobody converts.

Which layers' outputs attention alone reads, `hfq.runtime.fusion.flow` finds out.
"""

from typing import Any

import torch


class Narrowing:
    """Says to such layers of a model whether to return bfloat16.

    They do as long as the model's config names `attention`, which would round them itself, and not while a compiler
    traces, which narrows by itself.
    """

    def __init__(self, config: Any, *, attention: str) -> None:
        self._config, self._attention = config, attention

    @property
    def active(self) -> bool:
        """Whether it is bfloat16 that is read."""
        return self._config._attn_implementation == self._attention and not torch.compiler.is_compiling()
