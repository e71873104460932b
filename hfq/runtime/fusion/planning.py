"""Which forwards of a model run as plans (`hfq.runtime.fusion.plan`): short ones, whose shape came several times before.

A plan is proved by trying, as every fusion is: its outputs for the inputs that it was made of, and for others, are the
model's own.
"""

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..int8.packed import PackedModule
from .plan import Plan, record

MOST_TOKENS = 1024  # of larger inputs, what is between operations takes a small part of the time
SEEN = 3  # times that a shape ran without a plan: making one takes as long as some four forwards
KEPT = 64  # plans of a model; those of shapes that came longest ago make room
COUNTED = 1024  # shapes of which it is known how often they came
NEVER = -(1 << 30)  # times of a shape that is not to have a plan
VARIANTS = 4  # plans of a shape, which differ in what the model decides by its inputs, such as whether there is padding
WITHIN = 1e-3  # of an output's size. Memory is aligned another way each time, so sums are not rounded alike
Forward = Callable[..., Any]
Key = tuple[Any, ...]


class Plans:
    """The plans of `model`. They hold for the tensors that it has, and are dropped with any of them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._plans: OrderedDict[Key, list[Plan]] = OrderedDict()
        self._seen: OrderedDict[Key, int] = OrderedDict()
        self._state: _State | None = None
        self._lock = threading.Lock()  # for what is noted here; forwards of several threads run at once

    def __len__(self) -> int:
        return sum(map(len, self._plans.values()))

    def __call__(self, forward: Forward, inputs: Mapping[str, Tensor]) -> Any:
        """The outputs of `forward`, the model's own, for plain tokens `[batch, length]`, by a plan or by itself."""
        first = next(iter(inputs.values()))
        if first.numel() > MOST_TOKENS or _is_seen_by_others(inputs):
            return forward(**inputs)
        state = self._state
        if state is None or not state.is_as_it_was():
            state = self._begin_anew()
        key = (first.shape, *((name, x.dtype) for name, x in inputs.items()))
        for known in self._plans.get(key, ()):
            outputs = known(inputs)
            if outputs is not None:
                return outputs
        if not self._is_due(key):
            return forward(**inputs)
        outputs, plan = record(forward, inputs)
        others = {name: x.flip(1) for name, x in inputs.items()}
        holds = plan is not None and _are_alike(plan(inputs), outputs) and _are_alike(plan(others), forward(**others))
        self._note(key, plan if holds else None, state)
        return outputs

    def _begin_anew(self) -> "_State":
        with self._lock:
            self._plans.clear()
            self._seen.clear()
            self._state = _State(self._model)
            return self._state

    def _is_due(self, key: Key) -> bool:
        """Whether this forward is to become a plan: of those that come at the same time, one."""
        with self._lock:
            times = self._seen[key] = self._seen.get(key, 0) + 1
            self._seen.move_to_end(key)
            _shorten(self._seen, COUNTED)
            is_due = times > SEEN and len(self._plans.get(key, ())) < VARIANTS
            if is_due:
                self._seen[key] = 0  # those that come meanwhile are not
            return is_due

    def _note(self, key: Key, plan: Plan | None, state: "_State") -> None:
        """Keep `plan`, made of a model in `state`; without one, `key` is not tried again."""
        with self._lock:
            self._seen[key] = NEVER if plan is None else SEEN
            if plan is None or self._state is not state:
                return
            self._plans.setdefault(key, []).append(plan)
            self._plans.move_to_end(key)
            _shorten(self._plans, KEPT)


class _State:
    """The tensors that a model computed with when it was looked at, and how it is set up."""

    def __init__(self, model: nn.Module) -> None:
        self._config: Any = getattr(model, "config", None)
        modules = list(model.modules())
        self._tensors = [held for module in modules for held in (module._parameters, module._buffers) if held]
        self._packed = [vars(module) for module in modules if isinstance(module, PackedModule)]
        self._had = list(self._what_is_there())

    def is_as_it_was(self) -> bool:
        """Whether it has the very same ones."""
        now = list(self._what_is_there())
        return len(now) == len(self._had) and all(map(operator.is_, now, self._had))

    def _what_is_there(self) -> Iterator[Any]:
        name = getattr(self._config, "_attn_implementation", None)
        attention = ALL_ATTENTION_FUNCTIONS.get(name) if isinstance(name, str) else None
        packed = (own.get("_packed") for own in self._packed)
        return chain((name, attention), packed, *(held.values() for held in self._tensors))


def _is_seen_by_others(inputs: Mapping[str, Tensor]) -> bool:
    """Whether somebody gets to see operations, or changes them: then a model's own code is to call them."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or _len_torch_dispatch_stack():
        return True
    return any(type(x) is not Tensor or x.device.type != "cpu" for x in inputs.values())


def _are_alike(found: Any, expected: Any) -> bool:
    """Whether two outputs are the same up to rounding; also where the plan says that it is for other numbers."""
    if found is None:
        return True
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return all(_is_close(x, y) if isinstance(y, Tensor) else x == y for x, y in pairs)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype or not expected.is_floating_point():
        return torch.equal(found, expected)
    return bool((found - expected).norm() <= WITHIN * expected.norm())


def _shorten(kept: OrderedDict[Any, Any], most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)
