"""Forwards that are known: by a model that is as it was when it was looked at, and that nobody watches.

What one forward showed of a model holds for these alone. In them layers do each other's work, and a hook between them
would see codes, or nothing; in any other, every module runs by itself. In those of plain inputs they may also leave out
what nobody reads (`hfq.runtime.fusion.first_token`), write over what nobody reads again (`hfq.runtime.fusion.residual`), and follow
each other directly (`hfq.runtime.fusion.encoder_layer`).
"""

import functools
import operator
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .arguments import Arguments

NONE, WATCHED, FUSED, KNOWN = range(
    -1, 3
)  # no forward; its modules run as they are; with fusions; all that is said above


class _Thread(threading.local):
    may = NONE


class KnownForward:
    """Says to the layers of a model what may be done in the forward that is under way.

    A thread has its own forward. Copies of a model have their own, too. `most`: what may be done in any.
    """

    def __init__(self, most: int = KNOWN) -> None:
        self.most = most
        self._thread = _Thread()

    def __reduce__(self) -> tuple[Any, ...]:
        return KnownForward, (self.most,)

    @property
    def has_begun(self) -> bool:
        """Whether this thread is in a forward of the model's."""
        return self._thread.may > NONE

    @property
    def level(self) -> int:
        """How much may be done in the forward of this thread, for another that is to do the same."""
        return self._thread.may

    @property
    def is_unwatched(self) -> bool:
        """Whether it is one of the model as it was."""
        # torch.compile has forwards of its own, which start below what calls `running`.
        return not torch.compiler.is_dynamo_compiling() and self._thread.may > WATCHED

    @property
    def fuses(self) -> bool:
        """Whether layers do each other's work. A part of a model that is called by itself runs as it is."""
        return not torch.compiler.is_dynamo_compiling() and self._thread.may > WATCHED and self.most > WATCHED

    @property
    def under_way(self) -> bool:
        """Whether inputs are plain, too."""
        return not torch.compiler.is_dynamo_compiling() and self._thread.may == KNOWN and self.most == KNOWN

    @property
    def runs_directly(self) -> bool:
        """Whether nobody traces or differentiates it, too: modules' own code may be passed over."""
        return self.under_way and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    @contextmanager
    def running(self, may: int = KNOWN) -> Iterator[None]:
        """For the length of the block, in forwards of this thread so much may be done."""
        before = self._thread.may
        self._thread.may = may
        try:
            yield
        finally:
            self._thread.may = before


class FusedForward:
    """The `forward` of a model with fused layers: it looks whether the model is as it was, and tells them.

    `forward`: what it runs, its class's unless somebody gave it another. `compiled`: what it runs instead if the model is
    as it was. `known`: of the model, and of all that are inside. `inner`: it is inside another, by whose outputs one
    cannot tell what is read of its own. `at_first`: what is called with the model before it runs for the first time. It is
    no hook, as callers of `forward` itself pass hooks by (sentence-transformers).
    """

    kept: tuple[str, ...] = ()  # further attributes that copies have

    def __init__(self, model: nn.Module, known: KnownForward) -> None:
        self.model, self.known, self.inner = model, known, False
        self.forward: Callable[..., Any] = model.__dict__.get("forward") or types.MethodType(type(model).forward, model)
        self.at_first: Callable[[nn.Module], None] | None = None
        self.compiled: CompiledForward | None = None
        self._arguments: Arguments | None = None
        self.structure: Structure | None = None
        functools.update_wrapper(self, self.forward, updated=())  # transformers reads its signature

    def __reduce__(self) -> tuple[Any, ...]:
        kept = ["known", "inner", "structure", "compiled", "at_first", *self.kept]
        if getattr(self.forward, "__func__", None) is not type(self.model).forward:
            kept.append("forward")
        return type(self), (self.model, self.known), {name: getattr(self, name) for name in kept}

    @property
    def __code__(self) -> types.CodeType:
        """By which torch.export names where it comes from."""
        code: types.CodeType = type(self.model).forward.__code__
        return code

    def is_as_it_was(self) -> bool:
        """Whether the model is the one that was looked at, and nobody watches."""
        return self.structure is not None and self.structure.is_as_it_was()

    def look_again(self) -> None:
        """Take the model as it is now for what was looked at."""
        self.structure = Structure(self.model)

    def settle(self) -> None:
        """The same for good; if it is another than was looked at, nothing more is fused in it."""
        if not self.is_as_it_was():
            self.known.most = WATCHED
            self.look_again()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.forward(*args, **kwargs)
        at_first = self.at_first  # another thread may be done with it
        if at_first is not None and not self.known.has_begun:
            at_first(self.model)
        args, kwargs, as_tuple = self._bound(args, kwargs)
        if self.known.has_begun:
            outputs = self._forward_now()(*args, **kwargs)
        else:
            with self.known.running(self._what_may_be_done(args, kwargs)):
                forward = self._forward_now()
                outputs = self.run(forward, *args, **kwargs) if self.known.is_unwatched else forward(*args, **kwargs)
        return outputs.to_tuple() if as_tuple and not isinstance(outputs, tuple) else outputs

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The outputs of `forward`."""
        return forward(*args, **kwargs)

    def is_plain(self, *args: Any, **kwargs: Any) -> bool:
        """Whether these are inputs like those that the model was looked at with."""
        return False

    def _forward_now(self) -> Callable[..., Any]:
        """What is to compute the forward that has begun."""
        if self.compiled is None:
            return self.forward
        if self.known.is_unwatched:
            return self.compiled
        if not (torch.is_grad_enabled() or self.model.training or torch.jit.is_tracing()):
            self.compiled.say_why("a hook sees what its modules return, or a part of it was changed")
        return self.forward

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
        if self._arguments is None or self._arguments.function is not self.forward:
            self._arguments = Arguments(self.forward, flags=runs_known_code(self.model))
        return self._arguments.bind(args, kwargs, getattr(self.model, "config", None))

    def _what_may_be_done(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        if torch.jit.is_tracing() or self.structure is None or not self.structure.is_as_it_was():
            return WATCHED
        if torch.is_grad_enabled() and (_want_gradients(args, kwargs) or self.structure.wants_gradients()):
            return WATCHED
        return KNOWN if not self.inner and self.is_plain(*args, **kwargs) else FUSED


class CompiledForward(Protocol):
    """What runs in the place of a model's own forward. It gives back to that what it does not compute itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def prepare(self) -> bool:
        """Get ready for calls. Returns: whether any can be computed here."""

    def say_why(self, reason: str) -> None:
        """Tell the user, once, why a call does not run as it could."""


def enter(model: nn.Module, known: KnownForward) -> FusedForward:
    """The `FusedForward` of `model`, which it is given if it has none."""
    forward = model.__dict__.get("forward")
    if not isinstance(forward, FusedForward):
        forward = model.forward = FusedForward(model, known)
    return forward


class Structure:
    """What a model consisted of when its layers were looked at, to see whether it still does."""

    def __init__(self, model: nn.Module) -> None:
        self.config = getattr(model, "config", None)
        self.modules = list(model.modules())
        self.inner = self.modules[1:]  # a hook of the model's own sees what it is given and returns
        self.kinds: list[type[nn.Module]] = list(map(type, self.modules))
        self.functions = [kind.forward for kind in self.kinds]
        self.children = [module._modules for module in self.modules if module._modules]
        self.had = [dict(children) for children in self.children]
        self.forwards = {i: vars(module)[_FORWARD] for i, module in enumerate(self.inner) if _FORWARD in vars(module)}
        hooks = [hook for module in self.inner for found in _HOOKS(module.__dict__) for hook in found.values()]
        self.own_hooks = [hook for hook in hooks if getattr(hook, "__module__", "").startswith("torch.nn.utils.")]
        self.numbers = [
            (i, name, value)
            for i, module in enumerate(self.modules)
            if not isinstance(module, nn.Dropout)  # whose number says nothing but in training
            for name, value in vars(module).items()
            if type(value) is float
        ]
        self.returned = self._what_is_returned()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __getattr__(self, name: str) -> Any:
        """What is compared at each forward, as fast as can be: instances' own dictionaries, which a copy has of its own."""
        if not name.startswith("_") or name.startswith("__"):
            raise AttributeError(name)
        self._own = [module.__dict__ for module in self.inner]
        self._hooks = list(chain.from_iterable(map(_HOOKS, self._own)))
        self._states = [(*_HOOKS(own), False) for own in self._own]  # none is being trained
        self._have_forwards = [i in self.forwards for i in range(len(self._own))]
        self._have_numbers = [self.modules[i].__dict__ for i, _, _ in self.numbers]
        self._names, self._values = [name for _, name, _ in self.numbers], [value for _, _, value in self.numbers]
        self._classes = list(dict(zip(self.kinds, self.functions, strict=True)).items())
        return self.__dict__[name]

    def is_as_it_was(self) -> bool:
        """Whether modules have the same children, classes, forwards, numbers (an epsilon, a scaling) and mode, nobody sees
        what they return, and no more is returned.
        """
        return (
            list(map(_STATE, self._own)) == self._states
            and not self.is_watched()
            and self.children == self.had
            and list(map(type, self.modules)) == self.kinds
            and self._have_no_others()
            and all(self._own[i].get(_FORWARD) is forward for i, forward in self.forwards.items())
            and all(kind.forward is function for kind, function in self._classes)
            and list(map(dict.get, self._have_numbers, self._names)) == self._values
            and self.returned == self._what_is_returned()
        )

    def _have_no_others(self) -> bool:
        """Whether no module got a `forward`: who puts one back mostly sets it, where it was the class's."""
        have = list(map(operator.contains, self._own, repeat(_FORWARD)))
        return have == self._have_forwards or all(
            now == before or (now and _is_of_class(module))
            for now, before, module in zip(have, self._have_forwards, self.inner, strict=True)
        )

    def is_watched(self) -> bool:
        """Whether a hook of the user's own may see what modules return, or change what they compute with."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        return any(self._hooks) and any(
            getattr(hook, "__module__", "") != CAPTURING and not any(hook is own for own in self.own_hooks)
            for hook in chain.from_iterable(hooks.values() for hooks in self._hooks)
        )

    def wants_gradients(self) -> bool:
        """Whether a parameter is to have one."""
        parameters = chain.from_iterable(module._parameters.values() for module in self.modules)
        return any(parameter is not None and parameter.requires_grad for parameter in parameters)

    def _what_is_returned(self) -> tuple[Any, ...]:
        names = ("output_hidden_states", "output_attentions")
        return tuple(bool(getattr(self.config, name, False)) for name in names)


def _is_of_class(module: nn.Module) -> bool:
    """Whether the `forward` that was set on it is what it has without."""
    forward = vars(module)[_FORWARD]
    own = getattr(forward, "__self__", None) is module
    return own and getattr(forward, "__func__", None) is type(module).forward


def runs_known_code(module: nn.Module) -> bool:
    """Whether its `forward` is of a library that is known to keep nothing of what it sees, and do nothing but compute an output."""
    found = (type(module).forward, module.__dict__.get("forward"))
    return all(getattr(forward, "__module__", "").partition(".")[0] in _KNOWN for forward in found if forward)


def is_as_made(module: nn.Module) -> bool:
    """Whether nothing was put around what it and its parts compute: hooks, parametrizations, or a `forward` of their own."""
    return not any(
        part._forward_hooks or part._forward_pre_hooks or "parametrizations" in part._modules or "forward" in vars(part)
        for part in module.modules()
    )


def _want_gradients(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether one of the inputs does, or may hold one that does."""
    return any(
        value.requires_grad if isinstance(value, Tensor) else not isinstance(value, int | float | str | None)
        for value in chain(args, kwargs.values())
    )


_KNOWN = ("torch", "transformers", "hfq")
_FORWARD = "forward"
_HOOKS = operator.itemgetter("_forward_hooks", "_forward_pre_hooks")
_STATE = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "training")
CAPTURING = "transformers.utils.output_capturing"  # its hooks stay, and collect only what an output is to hold
