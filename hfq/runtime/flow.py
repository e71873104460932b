"""What one forward shows of a model: which layer is given whose output, and who else reads it.

Int8 layers are stood in for, so that nothing is packed and nothing multiplied: a forward takes milliseconds, and what
it shows is the flow of tensors, not numbers.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .modules import Int8Linear, SharedMatmul

Answer = Callable[[Int8Linear, Tensor], Tensor]


@dataclass
class Flow:
    """The calls of int8 layers, in order, and every other use of a tensor. Tensors are told apart by identity.

    `calls`: layer, what it was given, what it answered. `read_by_others`: tensors that an operation outside the int8
    layers read, or that the model returned. `changes`: memory that was written to, with the number of calls before.
    `outputs`: every tensor that the model returned.
    """

    calls: list[tuple[Int8Linear, Tensor, Tensor]] = field(default_factory=list)
    read_by_others: list[Tensor] = field(default_factory=list)
    changes: list[tuple[int, int]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def forms(self) -> list[tuple[torch.Size, torch.dtype]]:
        """Shape and type of everything that the model returned."""
        return [(tensor.shape, tensor.dtype) for tensor in self.outputs]

    def direct_pairs(self) -> list[tuple[Int8Linear, Int8Linear]]:
        """(producer, consumer) where nobody but one other layer, and that once, reads what the producer returns."""
        once = self._called_once()
        foreign = {id(tensor) for tensor in self.read_by_others}
        readers: dict[int, list[Int8Linear]] = {}
        for layer, given, _ in self.calls:
            readers.setdefault(id(given), []).append(layer)
        pairs = []
        for producer, _, answer in self.calls:
            read_by = readers.get(id(answer), [])
            if producer in once and len(read_by) == 1 and read_by[0] in once and id(answer) not in foreign:
                pairs.append((producer, read_by[0]))
        return pairs

    def common_readers(self, codes: Callable[[Int8Linear], object]) -> list[list[Int8Linear]]:
        """Layers that were given the very same tensor, unchanged in between, and for which `codes` is the same."""
        once = self._called_once()
        groups: dict[tuple[object, ...], list[int]] = {}
        for position, (layer, given, _) in enumerate(self.calls):
            if layer in once:
                groups.setdefault((id(given), codes(layer)), []).append(position)
        return [
            [self.calls[position][0] for position in positions]
            for positions in groups.values()
            if len(positions) > 1 and not self._changed(positions[0], positions[-1])
        ]

    def _called_once(self) -> set[Int8Linear]:
        calls = Counter(layer for layer, _, _ in self.calls)
        return {layer for layer, count in calls.items() if count == 1}

    def _changed(self, first: int, last: int) -> bool:
        """Whether what call `first` was given was written to before call `last`."""
        memory = _memory(self.calls[first][1])
        return any(address == memory and first < calls <= last for address, calls in self.changes)


def trace(model: nn.Module, example: Mapping[str, Any]) -> Flow | None:
    """The flow of one forward on `example`; None where that is no input of the model's.

    Layers answer zeros in the form they will have: codes where they emit codes, columns where they share a matmul. So
    a model that cannot run with them shows it here.
    """
    flow = Flow()

    def answer(layer: Int8Linear, x: Tensor) -> Tensor:
        y = _blank(layer, x)
        flow.calls.append((layer, x, y))
        return y

    try:
        with torch.inference_mode(), standing_in(model.modules(), answer), _Operations(flow):
            flow.outputs = [leaf for leaf in tree_leaves(model(**example)) if isinstance(leaf, Tensor)]
    except Exception:  # the model's own code: an example that does not fit only means that nothing is fused
        return None
    flow.read_by_others += flow.outputs
    return flow


@contextmanager
def standing_in(modules: Iterable[nn.Module], answer: Answer) -> Iterator[None]:
    """Have `answer` called instead of each int8 layer among `modules`, for the length of the block."""
    layers = [module for module in modules if isinstance(module, Int8Linear)]
    for layer in layers:
        layer.forward = _StandIn(layer, answer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@dataclass
class _StandIn:
    layer: Int8Linear
    answer: Answer
    thread: int = field(default_factory=threading.get_ident)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if threading.get_ident() != self.thread:  # somebody who wants an answer
            return type(self.layer).forward(self.layer, x, residual)
        y = self.answer(self.layer, x)
        return y if residual is None else y + residual


class _Operations(TorchDispatchMode):
    """Notes what every operation of torch reads and writes."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.flow.read_by_others += [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = zip(func._schema.arguments, args, strict=False)
        self.flow.changes += [
            (_memory(value), len(self.flow.calls))
            for argument, value in written
            if argument.is_write and isinstance(value, Tensor)
        ]
        return func(*args, **kwargs)


def _blank(layer: Int8Linear, x: Tensor) -> Tensor:
    shape = x.shape[:-1]
    if layer.returns_codes:
        return torch.zeros(*shape, layer.out_features, dtype=torch.uint8)
    dtype = layer.weight_scale.dtype if x.dtype == torch.uint8 else x.dtype
    group: SharedMatmul | None = layer.shared_matmul
    if group is None:
        return torch.zeros(*shape, layer.out_features, dtype=dtype)
    start = group.starts[group.modules.index(layer)]
    columns = sum(module.out_features for module in group.modules)
    return torch.zeros(*shape, columns, dtype=dtype)[..., start : start + layer.out_features]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
