"""Forwards of a model on examples, which leave it as it was.

Some models change themselves for good by what they are given: BigBird gives up sparse attention after one short text.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """What `model` is, to be put back. `changed`: whether it may have been one of other steps in between."""

    def __init__(self, model: nn.Module) -> None:
        self.changed = False
        modules = [module for module in model.modules() if module._modules or not _is_simple(module)]
        configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
        self._owners: list[Any] = [owner for owner in (*modules, *configs.values()) if hasattr(owner, "__dict__")]
        self._had = [_contents(vars(owner)) for owner in self._owners]

    def put_back(self) -> None:
        """Make the model again what it was."""
        for owner, had in zip(self._owners, self._had, strict=True):
            now = vars(owner)
            for name in now.keys() - had.keys():
                self._note(now.pop(name))
            for name, (value, content) in had.items():
                if now.get(name) is not value:
                    self._note(now.get(name))
                    now[name] = value
                if _restore(value, content):
                    self._note(value)

    def _note(self, value: Any) -> None:
        """A tensor is what the model remembers of an example; anything else may decide what it does with the next."""
        self.changed |= not isinstance(value, Tensor)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Snapshot]:
    """For the length of the block, `model` may be given examples: what it changes in itself, and random numbers, are put back."""
    found = Snapshot(model)
    try:
        with torch.random.fork_rng(devices=[]):
            yield found
    finally:
        found.put_back()


@contextmanager
def drawing_alike() -> Iterator[None]:
    """For the length of the block, a model that draws numbers draws those of any other such block.

    Some do so to answer: ViLT pads an image with patches of itself, Reformer hashes, ViTMAE masks. Models are compared on
    the same draws, or what differs would be chance.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _is_simple(module: nn.Module) -> bool:
    """Whether it is a layer of a library that changes none while it computes."""
    return type(module).__module__.startswith(("torch.nn.modules.", "hfq."))


def _contents(state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (value, _copy(value)) for name, value in state.items()}


def _copy(value: Any) -> Any:
    """What `value` holds, if that may change: the items of a container, and the numbers of a tensor that is no parameter."""
    if isinstance(value, dict):
        return {key: (item, _copy(item) if isinstance(item, Tensor) else None) for key, item in value.items()}
    if isinstance(value, list | set):
        return copy.copy(value)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.device.type == "cpu":
        return None if value.is_mkldnn else value.detach().clone()
    return None


def _restore(value: Any, content: Any) -> bool:
    """Give `value` back what it held. Returns: whether that was needed."""
    if content is None:
        return False
    if isinstance(value, Tensor):
        if torch.equal(value, content) or value.is_inference():
            return False
        value.detach().copy_(content)
        return True
    if isinstance(value, dict):
        same = value.keys() == content.keys() and all(value[key] is item for key, (item, _) in content.items())
        if not same:
            value.clear()
            value.update({key: item for key, (item, _) in content.items()})
        restored = [_restore(item, held) for item, held in content.values()]  # each, not only up to the first
        return any(restored) or not same
    # A set's copy may be in another order.
    ids, held = ([id(item) for item in items] for items in (value, content))
    same = ids == held if isinstance(value, list) else set(ids) == set(held)
    if not same:
        value.clear()
        value.extend(content) if isinstance(value, list) else value.update(content)
    return not same
