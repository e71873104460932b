"""Forwards that are known: of plain inputs, by a model that is as it was when it was looked at, and that nobody watches.

What one forward showed of a model holds for these. So layers may leave out what nobody reads (`hfq.runtime.first_token`),
write over what nobody reads again (`hfq.runtime.residual`), and follow each other directly (`hfq.runtime.encoder_layer`).
"""

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module


class KnownForward:
    """Says to layers whether the forward that is under way is one of these.

    A thread has its own forward. Copies of a model have their own, too.
    """

    def __init__(self) -> None:
        self._thread = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return KnownForward, ()

    @property
    def under_way(self) -> bool:
        """Whether this thread is in one."""
        # torch.compile has forwards of its own, which start below what calls `running`.
        return not torch.compiler.is_dynamo_compiling() and getattr(self._thread, "running", False)

    @contextmanager
    def running(self) -> Iterator[None]:
        """For the length of the block, forwards of this thread are known."""
        before = self.under_way
        self._thread.running = True
        try:
            yield
        finally:
            self._thread.running = before


class Structure:
    """What a model consisted of when its layers were looked at, to see whether it still does."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._children = [(module, list(module._modules.values())) for module in self._modules if module._modules]
        self._forwards = self._own_forwards()
        self._config = getattr(model, "config", None)
        self._answers = self._what_is_answered()

    def is_as_it_was(self) -> bool:
        """Whether modules have the same children and forwards, nobody's hook sees what they answer, and no more is answered."""
        seen = bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        seen = seen or any(map(_is_users, self._hooks()))
        same = all(list(module._modules.values()) == children for module, children in self._children)
        same = same and self._own_forwards() == self._forwards
        return not seen and same and self._answers == self._what_is_answered()

    def _own_forwards(self) -> list[Any]:
        """What stands in for the `forward` of the class, in modules inside the model."""
        return [module.__dict__.get("forward") for module in self._modules[1:]]

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
