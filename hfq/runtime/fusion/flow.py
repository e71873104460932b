"""What one forward shows of a model: which layer is given whose output, and who else reads it.

Int8 layers are stood in for, so that nothing is packed and nothing multiplied: a forward takes milliseconds, and what
it shows is the flow of tensors, not numbers.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..int8.conv import Int8Conv
from ..int8.linear import Int8Linear
from ..int8.shared_matmul import SharedMatmul
from .snapshot import unchanged

_ADD = torch.ops.aten.add.Tensor
_DROPOUT = torch.ops.aten.dropout.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
StandIn = Callable[[Int8Linear, Tensor], Tensor]
L = TypeVar("L", bound=nn.Module)


@dataclass
class Flow:
    """The calls of int8 layers, in order, and every other use of a tensor. Tensors are told apart by identity.

    `calls`: layer, what it was given, what it returned. `read_by_others`: tensors that an operation outside the int8
    layers read, or that the model returned. `changes`: memory that was written to, with the number of calls before.
    `outputs`: every tensor that the model returned. `attended`: the memory that each call of torch's attention read as
    query, key and value, if it is not causal. `computed_from`: what any other operation read that does more than to look at it in another shape.
    `reads`: the memory that operations and layers read, in order. `made`: what operations returned in new memory.
    `sums`: layer, the memory of what was added to its output, and the number of reads until then. `opaque`: it returned
    what may hold further tensors.
    """

    calls: list[tuple[Int8Linear, Tensor, Tensor]] = field(default_factory=list)
    read_by_others: list[Tensor] = field(default_factory=list)
    changes: list[tuple[int, int]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    attended: list[tuple[int, ...]] = field(default_factory=list)
    computed_from: set[int] = field(default_factory=set)
    reads: list[int] = field(default_factory=list)
    made: set[int] = field(default_factory=set)
    sums: list[tuple[Int8Linear, int, int]] = field(default_factory=list)
    opaque: bool = False

    @property
    def forms(self) -> list[tuple[torch.Size, torch.dtype]]:
        """Shape and type of everything that the model returned."""
        return [(tensor.shape, tensor.dtype) for tensor in self.outputs]

    def direct_pairs(self) -> list[tuple[Int8Linear, Int8Linear]]:
        """(producer, consumer) where nobody but one other layer, and that once, reads what the producer returns."""
        once = self.called_once()
        foreign = {id(tensor) for tensor in self.read_by_others}
        readers: dict[int, list[Int8Linear]] = {}
        for layer, given, _ in self.calls:
            readers.setdefault(id(given), []).append(layer)
        pairs = []
        for producer, _, output in self.calls:
            read_by = readers.get(id(output), [])
            if producer in once and len(read_by) == 1 and read_by[0] in once and id(output) not in foreign:
                pairs.append((producer, read_by[0]))
        return pairs

    def common_readers(self, codes: Callable[[Int8Linear], object]) -> list[list[Int8Linear]]:
        """Layers that were given the very same tensor, unchanged in between, and for which `codes` is the same."""
        once = self.called_once()
        groups: dict[tuple[object, ...], list[int]] = {}
        for position, (layer, given, _) in enumerate(self.calls):
            if layer in once:
                groups.setdefault((id(given), codes(layer)), []).append(position)
        return [
            [self.calls[position][0] for position in positions]
            for positions in groups.values()
            if len(positions) > 1 and not self._changed(positions[0], positions[-1])
        ]

    def read_by_attention(self) -> list[Int8Linear]:
        """Layers whose outputs nobody reads but one call of torch's attention, which is not causal and reads nothing else."""
        once = self.called_once()
        layers = {_memory(output): layer for layer, _, output in self.calls if layer in once}
        calls = Counter(address for call in self.attended for address in call)
        others = self.computed_from | {_memory(given) for _, given, _ in self.calls} | set(map(_memory, self.outputs))
        alone = {address for address in layers if calls[address] == 1 and address not in others}
        return [layers[address] for call in self.attended if alone.issuperset(call) for address in call]

    def last_readers(self) -> set[Int8Linear]:
        """Layers whose output is added to what the forward made and nobody reads again."""
        if self.opaque:
            return set()
        returned = set(map(_memory, self.outputs))
        read_again = {
            layer
            for layer, memory, reads in self.sums
            if memory in self.reads[reads:] or memory in returned or memory not in self.made
        }
        return {layer for layer, _, _ in self.sums} - read_again

    def called_once(self) -> set[Int8Linear]:
        """Layers that had one call."""
        calls = Counter(layer for layer, _, _ in self.calls)
        return {layer for layer, count in calls.items() if count == 1}

    def _changed(self, first: int, last: int) -> bool:
        """Whether what call `first` was given was written to before call `last`."""
        memory = _memory(self.calls[first][1])
        return any(address == memory and first < calls <= last for address, calls in self.changes)


def trace(model: nn.Module, example: Mapping[str, Any]) -> Flow | None:
    """The flow of one forward on `example`; None where that is no input of the model's, or one that it changes itself for.

    Layers return zeros in the form they will have: codes where they emit codes, columns where they share a matmul. So
    a model that cannot run with them shows it here.
    """
    flow = Flow()

    def stand_in(layer: Int8Linear, x: Tensor) -> Tensor:
        y = _blank(layer, x)
        flow.calls.append((layer, x, y))
        flow.reads.append(_memory(x))
        return y

    def convolved(layer: Int8Conv) -> Callable[[Tensor], Tensor]:
        def stand_in(x: Tensor) -> Tensor:
            flow.read_by_others.append(x)
            flow.reads.append(_memory(x))
            flow.computed_from.add(_memory(x))
            return torch.zeros(layer.output_shape(x.shape), dtype=x.dtype)

        return stand_in

    convolutions = [module for module in model.modules() if isinstance(module, Int8Conv)]
    try:
        with (
            unchanged(model) as snapshot,
            torch.inference_mode(),
            standing_in(model.modules(), stand_in),
            forwards_replaced(convolutions, convolved),
            _Operations(flow),
        ):
            leaves = tree_leaves(model(**example))
            flow.outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            flow.opaque = any(not isinstance(leaf, Tensor | int | float | str | None) for leaf in leaves)
    except Exception:  # the model's own code: an example that does not fit only means that nothing is fused
        return None
    flow.read_by_others += flow.outputs
    return None if snapshot.changed else flow


def last_readers(model: nn.Module, example: Mapping[str, Tensor], flow: Flow) -> set[Int8Linear]:
    """Layers whose output is added to what nobody reads again: in `flow`, of `example`, and on more tokens, some padding."""
    found = flow.last_readers()
    if not found or not all(isinstance(x, Tensor) for x in example.values()):
        return set()
    more = trace(model, _varied(example))
    return set() if more is None else found & more.last_readers()


def read_for_first_token(model: nn.Module, example: Mapping[str, Tensor], flow: Flow) -> list[Int8Linear]:
    """Layers of whose outputs `model` reads each row's first token alone, whatever its inputs.

    Not a query beside key and value: it would need a matmul of its own. `flow`: of `example`, before layers emit codes
    or share matmuls. Inputs: those of `example`, and others made of them.
    """
    readers = Counter(id(given) for _, given, _ in flow.calls)
    alone = flow.called_once()
    layers = [
        layer
        for layer, given, _ in flow.calls
        # Where the second dimension is the batch's, as in Mask2Former's decoder, one image shows nothing of another.
        if given.dim() == 3 and given.shape[1] > 1 and layer in alone and readers[id(given)] == 1
    ]
    try:
        found = _first_token_alone(model, example, layers)
        found = _first_token_alone(model, _longer(example), found) if found else []
        return found if found and _is_enough(model, example, found) else []
    except Exception:  # the model's own code, which wants other inputs
        return []


def ignores_padding(model: nn.Module, example: Mapping[str, Tensor]) -> bool:
    """Whether padding at the end of rows changes nothing that `model` computes of their tokens.

    A convolution over tokens, say, would.
    """
    if "input_ids" not in example:
        return False
    ids = example["input_ids"][:, :2]  # short rows, of which every token is near the padding
    mask = torch.ones_like(ids)
    seen: list[Tensor] = []

    def stand_in(layer: Int8Linear, x: Tensor) -> Tensor:
        seen.append(x[:, : ids.shape[1]] if x.dim() == 3 else x)
        return example_output(layer, x)

    try:
        with torch.inference_mode():
            seen += _outputs(model, {"input_ids": ids, "attention_mask": mask}, stand_in)
            expected, seen = seen, []
            padded = {"input_ids": functional.pad(ids, (0, 6)), "attention_mask": functional.pad(mask, (0, 6))}
            seen += _outputs(model, padded, stand_in)
        return len(expected) == len(seen) and all(map(_are_close, expected, seen))
    except Exception:  # the model's own code, which wants other inputs
        return False


def _first_token_alone(
    model: nn.Module, example: Mapping[str, Tensor], layers: Sequence[Int8Linear]
) -> list[Int8Linear]:
    """Those of `layers` whose outputs for further tokens have no gradient, as none of the model's depends on them."""
    by_layer: dict[Int8Linear, Tensor] = {}

    def stand_in(layer: Int8Linear, x: Tensor) -> Tensor:
        by_layer[layer] = example_output(layer, x).requires_grad_()
        return by_layer[layer]

    with torch.inference_mode(False), torch.enable_grad():
        outputs = [y for y in _outputs(model, example, stand_in) if y.requires_grad]
        weights = [torch.linspace(1, 2, y.numel()).view_as(y) for y in outputs]  # a sum may be the same for all inputs
        found = torch.autograd.grad(outputs, [by_layer[layer] for layer in layers], weights, allow_unused=True)
    gradients = zip(layers, found, strict=True)
    return [layer for layer, gradient in gradients if gradient is not None and not gradient[:, 1:].any()]


def _is_enough(model: nn.Module, example: Mapping[str, Tensor], layers: Sequence[Int8Linear]) -> bool:
    """Whether `model` has the outputs it had if all of `layers` return the first token's numbers for every token.

    No gradient shows what a number decides, such as which token is read.
    """

    def stand_in(layer: Int8Linear, x: Tensor) -> Tensor:
        y = example_output(layer, x)
        return y[:, :1].expand(y.shape) if layer in layers else y

    inputs = _varied(example)
    with torch.inference_mode():
        return all(map(_are_close, _outputs(model, inputs, example_output), _outputs(model, inputs, stand_in)))


def _longer(example: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A row of more tokens: a model that takes a few of them together has none beyond the first, if there are only a few."""
    return {"input_ids": example["input_ids"][:1].repeat(1, 8)} if "input_ids" in example else example


def _are_close(expected: Tensor, found: Tensor) -> bool:
    within = 1e-4 if expected.dtype == torch.float32 else 2e-2
    return expected.shape == found.shape and torch.allclose(expected, found, rtol=within, atol=within / 10)


def _varied(example: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Inputs in which a token that a model might choose, by what it is or by where padding ends, stands anywhere."""
    generator = torch.Generator().manual_seed(0)
    if "input_ids" not in example:
        return {name: torch.randn(x.shape, generator=generator) for name, x in example.items()}
    ids = torch.cat([example["input_ids"].roll(shift, 1) for shift in range(example["input_ids"].shape[1])])
    mask = torch.ones_like(ids)
    mask[1::3, -2:] = 0
    mask[2::3, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def example_output(layer: Int8Linear, x: Tensor, number: int = 1) -> Tensor:
    """Numbers that depend on each token's own, all of them, and differ. A norm leaves what they depend on, too.

    `number`: of a function, where layers are to be told apart.
    """
    read, written, offset = _waves(number, layer.in_features, layer.out_features)
    return x.float() @ read * written + offset


@lru_cache(maxsize=64)  # layers are alike
def _waves(number: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):  # they may be part of a gradient
        channels = torch.linspace(-number, number, out_features, dtype=torch.float32)
        read = torch.linspace(-1, number, in_features, dtype=torch.float32)[:, None].cos() / in_features**0.5
        return read, (9 * channels + number).sin(), channels


def _outputs(model: nn.Module, inputs: Mapping[str, Tensor], stand_in: StandIn) -> list[Tensor]:
    with unchanged(model) as snapshot, standing_in(model.modules(), stand_in):
        outputs = [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, Tensor)]
    if snapshot.changed:
        raise ValueError("The model changes itself for these")
    return outputs


@contextmanager
def standing_in(modules: Iterable[nn.Module], stand_in: StandIn) -> Iterator[None]:
    """Have `stand_in` called instead of each int8 layer among `modules`, for the length of the block."""
    layers = [module for module in modules if isinstance(module, Int8Linear)]
    with forwards_replaced(layers, lambda layer: _StandIn(layer, stand_in)):
        yield


@contextmanager
def forwards_replaced(layers: Sequence[L], forward_of: Callable[[L], Callable[..., Any]]) -> Iterator[None]:
    """Have each of `layers` run as `forward_of` it says, for the length of the block. None has a `forward` of its own."""
    for layer in layers:
        layer.forward = forward_of(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@dataclass
class _StandIn:
    layer: Int8Linear
    stand_in: StandIn
    thread: int = field(default_factory=threading.get_ident)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, in_place: bool = False) -> Tensor:
        if threading.get_ident() != self.thread:  # somebody who wants an output
            return type(self.layer).forward(self.layer, x, residual, in_place=in_place)
        y = self.stand_in(self.layer, x)
        return y if residual is None else y + residual


class _Operations(TorchDispatchMode):
    """Notes what every operation of torch reads and writes."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DROPOUT and not args[2]:  # in no training it hands on what it is given
            return args[0]
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.flow.read_by_others += read
        written = zip(func._schema.arguments, args, strict=False)
        self.flow.changes += [
            (_memory(value), len(self.flow.calls))
            for argument, value in written
            if argument.is_write and isinstance(value, Tensor)
        ]
        output = func(*args, **kwargs)
        memory = set(map(_memory, read))
        self.flow.reads += memory
        self.flow.made |= {_memory(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)} - memory
        if func is _ADD and self.flow.calls and read and read[0] is self.flow.calls[-1][2] and len(read) == 2:
            self.flow.sums.append((self.flow.calls[-1][0], _memory(read[1]), len(self.flow.reads)))
        if func is _ATTENTION and not _is_causal(args, kwargs):
            self.flow.attended.append(tuple(map(_memory, args[:3])))
            memory = set(map(_memory, read[3:]))
        elif func.is_view and {_memory(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)} <= memory:
            memory = set()
        self.flow.computed_from |= memory
        return output


def _blank(layer: Int8Linear, x: Tensor) -> Tensor:
    shape = x.shape[:-1]
    if layer.returns_codes:
        return torch.zeros(*shape, layer.out_features, dtype=torch.uint8)
    dtype = layer.weight_scale.dtype if x.dtype == torch.uint8 else x.dtype
    dtype = torch.bfloat16 if layer.narrowing is not None and layer.narrowing.active else dtype
    group: SharedMatmul | None = layer.shared_matmul
    if group is None:
        return torch.zeros(*shape, layer.out_features, dtype=dtype)
    start = group.starts[group.modules.index(layer)]
    columns = sum(module.out_features for module in group.modules)
    return torch.zeros(*shape, columns, dtype=dtype)[..., start : start + layer.out_features]


def _is_causal(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether torch's attention is called with these, and told to make a causal mask."""
    return bool(kwargs.get("is_causal", args[5] if len(args) > 5 else False))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
