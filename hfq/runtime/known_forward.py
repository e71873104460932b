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

    @property
    def runs_directly(self) -> bool:
        """Whether this thread is in one that nobody traces or differentiates: modules' own code may be passed over."""
        return self.under_way and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    @contextmanager
    def running(self, known: bool = True) -> Iterator[None]:
        """For the length of the block, forwards of this thread are known, or not."""
        before = self.under_way
        self._thread.running = known
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
        self._training = self._which_train()
        self._config = getattr(model, "config", None)
        self._answers = self._what_is_answered()

    def is_as_it_was(self) -> bool:
        """Whether modules have the same children, forwards and mode, nobody sees what they answer, and no more is answered."""
        seen = bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        seen = seen or any(map(_is_users, self._hooks()))
        same = all(list(module._modules.values()) == children for module, children in self._children)
        same = same and self._own_forwards() == self._forwards and self._which_train() == self._training
        return not seen and same and self._answers == self._what_is_answered()

    def _own_forwards(self) -> list[Any]:
        """What runs in modules inside the model: the `forward` of the class, or what stands in for it."""
        return [module.__dict__.get("forward") or type(module).forward for module in self._modules[1:]]

    def _which_train(self) -> list[bool]:
        return [module.training for module in self._modules]

    def _hooks(self) -> Iterator[Callable[..., Any]]:
        for hooks in _HOOKS:
            for found in filter(None, map(hooks, self._modules)):
                yield from found.values()

    def _what_is_answered(self) -> tuple[Any, ...]:
        names = ("output_hidden_states", "output_attentions")
        return tuple(bool(getattr(self._config, name, False)) for name in names)


def runs_known_code(module: nn.Module) -> bool:
    """Whether its `forward` is of a library that is known to keep nothing of what it sees, and do nothing but answer."""
    found = (type(module).forward, module.__dict__.get("forward"))
    return all(getattr(forward, "__module__", "").partition(".")[0] in _KNOWN for forward in found if forward)


_KNOWN = ("torch", "transformers", "hfq")
_HOOKS = operator.attrgetter("_forward_hooks"), operator.attrgetter("_forward_pre_hooks")


def _is_users(hook: Callable[..., Any]) -> bool:
    """Whether it is not one of transformers' own, which stay, and collect only what an answer is to hold."""
    return not getattr(hook, "__module__", "").startswith("transformers.")
