"""Forwards of a model on examples, which leave it as it was.

Some models change themselves for good by what they are given: BigBird gives up sparse attention after one short text.
"""

import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...common.errors import UnsupportedError

_MOST = 100_000  # things that are looked into, those that are nearest to the modules first
_OTHERS = ("torch", "hfq", "lightning", "pytorch_lightning")  # whose objects are no model's memory
_CONTAINERS = (dict, list, set, deque)
# What torch holds for other times than a forward. Of a forward's own hooks, transformers puts some there in the first.
_ELSEWHERE = {name for name in vars(nn.Module()) if re.search("parameters|backward|state_dict|persistent", name)}
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


class Snapshot:
    """What `model` is, to be put back. `changed`: whether it may have been one of other steps in between.

    That is all its modules hold but parameters: numbers, tensors, containers and objects, and what is in those. Where
    parameters were written to, nothing is put back, as what else the model holds may say so: RWKV's forward scales them
    down, once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.changed = False
        self._had = list(_reachable(model))
        self._versions = [(x, x._version) for x in model.parameters() if not x.is_inference()]

    @property
    def has_other_parameters(self) -> bool:
        """Whether some were written to."""
        return any(x._version != version for x, version in self._versions)

    def put_back(self) -> None:
        """Make the model again what it was."""
        if self.has_other_parameters:
            self.changed = True
            return
        for value, content in self._had:
            if isinstance(value, Tensor | np.ndarray):
                self.changed |= _restore(value, content)
            elif not isinstance(value, _CONTAINERS):
                self._restore_attributes(vars(value), content)
            elif not _is_same(value, content):
                self.changed = True
                value.clear()
                value.extend(content) if isinstance(value, list | deque) else value.update(content)

    def _restore_attributes(self, now: dict[str, Any], had: dict[str, Any]) -> None:
        for name in now.keys() - had.keys():
            self._note(now.pop(name))
        for name, value in had.items():
            if now.get(name) is not value:
                self._note(now.get(name))
                now[name] = value

    def _note(self, value: Any) -> None:
        """A tensor is what the model remembers of an example; anything else may decide what it does with the next."""
        self.changed |= not isinstance(value, Tensor)


class _Thread(threading.local):
    taken: tuple[nn.Module, Snapshot] | None = None


_thread = _Thread()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Snapshot]:
    """For the length of the block, `model` may be given examples: what it changes in itself, and random numbers, are put back.

    Raises:
        UnsupportedError: it changed its parameters.
    """
    taken = _thread.taken
    found = taken[1] if taken is not None and taken[0] is model else Snapshot(model)
    found.changed = False
    try:
        with torch.random.fork_rng(devices=[]):
            yield found
    finally:
        found.put_back()
    if found.has_other_parameters:
        raise UnsupportedError(
            f"{type(model).__name__} changes its own weights when it computes, which int8 ones cannot be: there is no int8 "
            "version of it. It answers as before."
        )


@contextmanager
def many_unchanged(model: nn.Module) -> Iterator[None]:
    """For the length of the block, nothing but this thread's `unchanged` changes `model`, so what it was is noted once.

    Noting it takes longer than a forward on an example. What int8 layers hold for fusions is no part of it.
    """
    before = _thread.taken
    _thread.taken = model, Snapshot(model)
    try:
        yield
    finally:
        _thread.taken = before


@contextmanager
def drawing_alike() -> Iterator[None]:
    """For the length of the block, a model that draws numbers draws those of any other such block.

    Some do so to answer: ViLT pads an image with patches of itself, Reformer hashes, ViTMAE masks. Models are compared on
    the same draws, or what differs would be chance.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _reachable(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """What may be changed of `model`, each with what it holds."""
    seen: set[int] = set()
    ahead: deque[Any] = deque()
    for module in model.modules():
        if module._modules or isinstance(module, _LISTS) or not _is_simple(module):
            ahead.append(module)
        elif type(module).__module__.startswith("torch."):  # more than a layer's own may lie at its surface
            yield module, dict(vars(module))
            ahead += filter(_is_buffer, module._buffers.values())
    while ahead and len(seen) < _MOST:
        value = ahead.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        content = _content(value)
        yield value, content
        if not isinstance(content, Tensor | np.ndarray):
            inside = content.values() if isinstance(content, dict) else content
            if isinstance(value, nn.Module):
                inside = [item for name, item in content.items() if name not in _ELSEWHERE]
            ahead += [item for item in inside if _may_change(item)]


def _is_simple(module: nn.Module) -> bool:
    """Whether it is a layer of a library that changes none while it computes."""
    return type(module).__module__.startswith(("torch.nn.modules.", "hfq."))


def _may_change(value: Any) -> bool:
    """Whether `value` may hold something else later, and is no module, parameter, function or the like."""
    if isinstance(value, np.ndarray):
        return bool(value.flags.writeable)
    if isinstance(value, _CONTAINERS) or _is_buffer(value):
        return True
    if isinstance(value, Tensor) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in _OTHERS


def _is_buffer(value: Any) -> bool:
    known = isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.device.type == "cpu"
    return known and not value.is_mkldnn


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    kind = next((kind for kind in (dict, list, set) if isinstance(value, kind)), list)
    return kind(value) if isinstance(value, _CONTAINERS) else dict(vars(value))


def _is_same(value: Any, content: Any) -> bool:
    """Whether a container holds the very same things."""
    if isinstance(value, dict):
        return value.keys() == content.keys() and all(value[key] is item for key, item in content.items())
    ids, held = ([id(item) for item in items] for items in (value, content))
    return ids == held if isinstance(value, list | deque) else set(ids) == set(held)  # a set's copy has another order


def _restore(value: Any, content: Any) -> bool:
    """Give an array back its numbers. Returns: whether that was needed."""
    if isinstance(value, np.ndarray):
        same = np.array_equal(value, content)
        if not same:
            value[...] = content
    else:
        same = value.is_inference() or torch.equal(value, content)
        if not same:
            value.detach().copy_(content)
    return not same
