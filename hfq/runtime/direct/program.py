"""What a model computes of one image size, as a list of calls: of torch's operations and of int8 layers.

Two forwards show it, of batches of two sizes: integers in which they differ are multiples of the batch.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ...common.memory import return_freed_memory
from ..fusion.flow import forwards_replaced
from ..fusion.snapshot import unchanged
from ..int8.embedding import Int8Embedding
from ..int8.packed import PackedModule

BATCHES = 2, 3  # of the two forwards


class OtherStepsError(Exception):
    """What the model computes cannot be taken down as calls that hold for all images of this size."""


@dataclass(frozen=True)
class Value:
    """A tensor that was made before: the image, which is 0, or what a call returned."""

    number: int


@dataclass(frozen=True)
class OfBatch:
    """An integer that is so many times the size of the batch."""

    times: int


@dataclass
class Call:
    """`function`, an operation of torch or an int8 layer, of `args` and `kwargs`, in which a `Value` stands for a tensor.

    `outputs`: the numbers of what it returns, with their shapes in the first forward.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def reads(self) -> list[int]:
        """Numbers of the values among its arguments."""
        return [leaf.number for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]


@dataclass
class Program:
    """Calls in order, and what the model returns: its leaves, values or plain, and how they are put together.

    `by_image`: each of them has a row for each image.
    """

    calls: list[Call]
    leaves: list[Any]
    form: pytree.TreeSpec
    by_image: bool

    @property
    def outputs(self) -> list[int]:
        """Numbers of the values that it returns."""
        return [leaf.number for leaf in self.leaves if isinstance(leaf, Value)]


def program_of(model: nn.Module, forward: Callable[[Tensor], Any], size: Sequence[int]) -> Program:
    """What `forward`, that of `model`, computes of images `[batch, *size]`.

    Raises:
        OtherStepsError: it depends on what is in them, or on more than the model and them.
    """
    first, second = (_taken_down(model, forward, torch.rand(batch, *size)) for batch in BATCHES)
    if len(first.calls) != len(second.calls) or first.form != second.form:
        raise OtherStepsError
    for call, other in zip(first.calls, second.calls, strict=True):
        if call.function is not other.function or call.outputs != other.outputs:
            raise OtherStepsError
        call.args, call.kwargs = _for_any_batch((call.args, call.kwargs), (other.args, other.kwargs))
    first.leaves = _for_any_batch(first.leaves, second.leaves)
    first.by_image = first.by_image and second.by_image
    return first


def _taken_down(model: nn.Module, forward: Callable[[Tensor], Any], images: Tensor) -> Program:
    notes = _Notes(images)
    with unchanged(model) as snapshot, torch.inference_mode(), _noted(model, notes), notes:
        leaves, form = pytree.tree_flatten(forward(images))
    return_freed_memory()  # it kept what layers alone need, of several images, and no gap of it fits the next forward
    if snapshot.changed:
        raise OtherStepsError
    by_image = all(isinstance(leaf, Tensor) and leaf.shape[:1] == images.shape[:1] for leaf in leaves)
    return Program(notes.calls, notes.encoded(leaves), form, by_image)


def _for_any_batch(first: Any, second: Any) -> Any:
    """Arguments that hold for both forwards."""
    leaves, form = pytree.tree_flatten(first)
    others, other_form = pytree.tree_flatten(second)
    if form != other_form:
        raise OtherStepsError
    return pytree.tree_unflatten([_leaf(*pair) for pair in zip(leaves, others, strict=True)], form)


def _leaf(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first is second or (first.shape == second.shape and first.dtype == second.dtype and first.equal(second)):
            return first
    elif type(first) is type(second) and first == second:
        return first
    elif type(first) is type(second) is int and first * BATCHES[1] == second * BATCHES[0] and first % BATCHES[0] == 0:
        return OfBatch(first // BATCHES[0])
    raise OtherStepsError


class _Notes(TorchDispatchMode):
    """Takes down operations, in-place ones as those that return another tensor. It keeps no tensor alive."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.is_inside_layer = False
        self._numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._numbers[images] = 0
        self._count = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_inside_layer:
            return func(*args, **kwargs)
        if func in _DROPOUTS and not args[2]:
            return args[0]
        if any(tag in func.tags for tag in _UNFORESEEABLE):
            raise OtherStepsError
        written = [
            value for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.is_write
        ]  # fmt: skip
        encoded = self.encoded((args, kwargs))
        output = func(*args, **kwargs)
        if written:
            func = self._returning(func, written, output)
        self.note(func, encoded, output)
        return output

    def note(self, function: Callable[..., Any], encoded: tuple[tuple[Any, ...], dict[str, Any]], output: Any) -> None:
        """Take down a call. `encoded`: its arguments."""
        tensors = pytree.tree_leaves(output)
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise OtherStepsError
        numbers = tuple(range(self._count, self._count + len(tensors)))
        self._count += len(tensors)
        for tensor, number in zip(tensors, numbers, strict=True):
            self._numbers[tensor] = number
        self.calls.append(Call(function, *encoded, numbers, tuple(tensor.shape for tensor in tensors)))

    def encoded(self, arguments: Any) -> Any:
        """With a `Value` in place of each tensor that was made in this forward."""
        return pytree.tree_map(self._encoded, arguments)

    def _encoded(self, leaf: Any) -> Any:
        number = self._numbers.get(leaf) if isinstance(leaf, Tensor) else None
        return leaf if number is None else Value(number)

    def _returning(self, func: Any, written: list[Any], output: Any) -> Any:
        """What computes the same as `func` in memory of its own. Nobody else may have seen the memory."""
        name, overload = func._schema.name.partition("::")[2], func._schema.overload_name or "default"
        tensor = written[0]
        same = [other for other in self._numbers if _memory(other) == _memory(tensor)]
        plain = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), overload, None)
        if output is not tensor or any(other is not tensor for other in same) or not same:
            raise OtherStepsError
        if not name.endswith("_") or plain is None or len(written) > 1:
            raise OtherStepsError
        return plain


_DROPOUTS = (torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default)
_UNFORESEEABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


@contextmanager
def _noted(model: nn.Module, notes: _Notes) -> Iterator[None]:
    """For the length of the block, each int8 layer is one call."""
    layers = [module for module in model.modules() if isinstance(module, PackedModule | Int8Embedding)]
    layers = [layer for layer in layers if "forward" not in vars(layer)]
    with forwards_replaced(layers, lambda layer: _NotedLayer(layer, notes)):
        yield


@dataclass
class _NotedLayer:
    layer: nn.Module
    notes: _Notes

    def __post_init__(self) -> None:
        self.thread = threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = type(self.layer).forward
        if threading.get_ident() != self.thread or self.notes.is_inside_layer:
            return run(self.layer, *args, **kwargs)
        encoded = self.notes.encoded((args, kwargs))
        self.notes.is_inside_layer = True
        try:
            output = run(self.layer, *args, **kwargs)
        finally:
            self.notes.is_inside_layer = False
        self.notes.note(self.layer, encoded, output)
        return output


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
