"""A classifier's last layers, of whose answers it reads each row's first token alone.

The others' keys and values count for that one, so a last layer has to compute those; what it does with the other tokens
after attention, three quarters of its matmuls, is left out. Which layers they are, `hfq.runtime.flow` finds out.
"""

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


class FirstToken:
    """Says to layers whether the forward that is under way reads their answers for the first token only.

    A thread has its own forward. Copies of a model have their own, too.
    """

    def __init__(self) -> None:
        self._thread = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return FirstToken, ()

    @property
    def only(self) -> bool:
        """Whether nobody reads further tokens."""
        # torch.compile has forwards of its own, which start below what calls `reading`.
        return not torch.compiler.is_dynamo_compiling() and getattr(self._thread, "reading", False)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """For the length of the block, forwards of this thread read no others."""
        before = self.only
        self._thread.reading = True
        try:
            yield
        finally:
            self._thread.reading = before

    @staticmethod
    def of(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        """`function` of the first tokens of `[batch, length, ..]`. Its answer `[batch, 1, out]` stands for every token."""
        length = next(tensor.shape[1] for tensor in tensors if tensor is not None)
        y = function(*(None if tensor is None else tensor[:, :1].contiguous() for tensor in tensors))
        return y.expand(-1, length, -1)


class Structure:
    """What a model consisted of when its layers were looked at, to see whether it still does."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._children = [(module, list(module._modules.values())) for module in self._modules if module._modules]
        self._config = getattr(model, "config", None)
        self._answers = self._what_is_answered()

    def is_as_it_was(self) -> bool:
        """Whether every module has the same children, nobody's hook sees what they answer, and no more is answered."""
        seen = bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        seen = seen or any(map(_is_users, self._hooks()))
        same = all(list(module._modules.values()) == children for module, children in self._children)
        return not seen and same and self._answers == self._what_is_answered()

    def _hooks(self) -> Iterator[Callable[..., Any]]:
        for hooks in _HOOKS:
            for found in filter(None, map(hooks, self._modules)):
                yield from found.values()

    def _what_is_answered(self) -> tuple[Any, ...]:
        names = ("output_hidden_states", "output_attentions")
        return tuple(bool(getattr(self._config, name, False)) for name in names)


_HOOKS = operator.attrgetter("_forward_hooks"), operator.attrgetter("_forward_pre_hooks")


def _is_users(hook: Callable[..., Any]) -> bool:
    """Whether it is not one of transformers' own, which stay, and collect only what an answer is to hold."""
    return not getattr(hook, "__module__", "").startswith("transformers.")
