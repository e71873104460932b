"""One forward's operations as straight code: what is left of a model's Python once the shape of its input is known.

A forward of a short text spends as long in modules, checks and views as in its matmuls. A plan is made of the calls that
one forward made of torch, for inputs of that shape: no module runs, and what depends on no input is computed once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import TensorWeakRef

MOST_FOLDED = 1 << 18  # bytes of a tensor that is kept because no input decides it
_PLAIN = (bool, int, str, type(None))
_NAMED = (float, torch.dtype, torch.layout, torch.device, torch.memory_format)

_CONSTANT = torch.ops.aten.lift_fresh.default
_SIZED_BY_VALUES = (  # they are made of those that have the tag, which shows of them in no inference mode
    torch.ops.aten.argwhere.default,
    torch.ops.aten.narrow.Tensor,
    torch.ops.aten.nonzero_numpy.default,
    torch.ops.aten.repeat_interleave.self_Tensor,
    torch.ops.aten.tensor_split.tensor_indices_or_sections,
    torch.ops.aten.where.default,
)
_DETACH = torch.ops.aten.detach_.default  # of a gradient that there is not

Plan = Callable[[Mapping[str, Tensor]], Any]  # None where a number that the forward looked at is another one


class UnplannableError(Exception):
    """The forward does what cannot be done again from its calls alone."""


@dataclass(eq=False)
class _Slot:
    """A tensor of the forward's own. `base`: the first one in its memory, of which it is a view at `place`.

    `value`: itself, if no input decides it. `is_written`: somebody wrote to it after it was made. `source`: of no slot,
    a tensor from outside that it is a view of.
    """

    name: str
    place: str
    base: "_Slot | None" = None
    source: Tensor | None = None
    value: Tensor | None = None
    is_written: bool = False

    @property
    def first(self) -> "_Slot":
        return self.base or self

    @property
    def is_folded(self) -> bool:
        """Whether its value stands for it."""
        return self.value is not None and not self.first.is_written


@dataclass
class _Storage:
    """The memory of `slot`, as an argument."""

    slot: _Slot


@dataclass
class _Call:
    """`arguments`, `named` and `output` as they were, slots in the place of the forward's own tensors."""

    function: Any
    arguments: Any
    named: dict[str, Any]
    output: Any
    is_pure: bool
    is_view: bool

    @property
    def made(self) -> list[_Slot]:
        return [leaf for leaf in tree_leaves(self.output) if isinstance(leaf, _Slot)]


class _Calls(TorchDispatchMode):
    """Notes every call of torch's operations. It keeps no tensor that an input decides: a forward's memory is as ever.

    `failure`: why there can be no plan.
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.failure: str | None = None
        self._slots: dict[int, tuple[TensorWeakRef, _Slot]] = {}
        self._by_memory: dict[int, _Slot] = {}
        self._count = 0
        self.inputs = [self._enter(x) for x in inputs.values()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _CONSTANT:  # a number in the model's code becomes a tensor
            self._enter(args[0]).value = args[0]
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        arguments, named = tree_map(self._symbol, (args, kwargs))  # before they are written to
        output = func(*args, **kwargs)
        returned = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        changes = func._schema.is_mutable and func is not _DETACH
        if torch.Tag.nondeterministic_seeded in func.tags:  # but a dropout that drops nothing returns what it was given
            changes = changes or output is not args[0]
        is_pure = func.namespace == "aten" and not changes
        is_view = is_pure and bool(read and returned) and all(_is_view(y, read[0]) for y in returned)
        for x in () if is_pure else _written(func, args, kwargs, read, returned):
            self._note_write(x)
        is_fixed = is_pure and all((slot := self.slot(x)) is not None and slot.value is not None for x in read)
        if not is_fixed and _has_size_of_values(func, read):
            self.failure = "the size of a tensor depends on what the inputs hold"
        for y in returned:
            if any(y is x for x in read):
                continue
            slot = self._enter(y, read[0] if is_view else None)
            if is_fixed and y.nbytes <= MOST_FOLDED:
                slot.value = y
        self.calls.append(_Call(func, arguments, named, tree_map(self._symbol, output), is_pure, is_view))
        return output

    def slot(self, x: Tensor) -> _Slot | None:
        """None of a tensor from outside."""
        reference, slot = self._slots.get(id(x), (None, None))
        return slot if reference is not None and reference() is x else None

    def _enter(self, x: Tensor, seen: Tensor | None = None) -> _Slot:
        slot = _Slot(f"t{self._count}", f"{tuple(x.shape)}, {x.stride()}, {x.storage_offset()}")
        self._count += 1
        if seen is not None:
            base = self.slot(seen)
            slot.base = base and base.first
            slot.source = seen if base is None else base.first.source
        self._slots[id(x)] = TensorWeakRef(x), slot
        self._by_memory[_memory(x)] = slot.first
        return slot

    def _note_write(self, x: Tensor) -> None:
        slot = self.slot(x)
        if slot is None or slot.first.source is not None:
            self.failure = "it writes to a tensor that is not its own"
        else:
            slot.first.is_written = True

    def _symbol(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.slot(value) or value
        if isinstance(value, torch.UntypedStorage):
            if value._cdata not in self._by_memory:
                self.failure = "it uses memory that no tensor of its own has"
                return value
            return _Storage(self._by_memory[value._cdata])
        return value


def record(forward: Callable[..., Any], inputs: Mapping[str, Tensor]) -> tuple[Any, Plan | None]:
    """The outputs of `forward` for `inputs`, and a plan for inputs of the same shapes and dtypes; None if there is none."""
    copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
    calls = _Calls(copies)
    with calls:
        outputs = forward(**copies)
    try:
        return outputs, _Writer(calls).plan(outputs, list(inputs))
    except UnplannableError:
        return outputs, None


@dataclass
class _Line:
    text: str
    makes: set[str]
    reads: set[str]
    is_pure: bool


class _Writer:
    """Writes calls as the code of a function.

    Raises:
        UnplannableError: they cannot be.
    """

    def __init__(self, calls: _Calls) -> None:
        if calls.failure is not None:
            raise UnplannableError(calls.failure)
        self._calls = calls
        self._constants: dict[str, Any] = {"as_strided": torch.as_strided}
        self._names: dict[int, str] = {}  # of constants, by their identity
        self._lines: list[_Line] = []
        self._reads: set[str] = set()

    def plan(self, outputs: Any, names: Sequence[str]) -> Plan:
        for call in self._calls.calls:
            self._write(call)
        leaves, spec = tree_flatten(outputs)
        self._line(f"return ({', '.join(map(self._returned, leaves))},)", ())
        function = self._compiled()

        def plan(inputs: Mapping[str, Tensor]) -> Any:
            found = function(*(inputs[name].contiguous() for name in names))
            return None if found is None else tree_unflatten(found, spec)

        return plan

    def _write(self, call: _Call) -> None:
        made = call.made
        if made and all(slot.is_folded for slot in made):
            return
        if call.is_view:
            for slot in (slot for slot in made if slot is not call.arguments[0]):
                base = self._said(slot.first if slot.first is not slot else slot.source)
                self._line(f"{slot.name} = as_strided({base}, {slot.place})", (slot,), is_pure=True)
            return
        named = [f"{name}={self._said(value)}" for name, value in call.named.items()]
        text = f"{self._constant(call.function)}({', '.join([*map(self._said, call.arguments), *named])})"
        if isinstance(call.output, _Slot):
            self._line(f"{call.output.name} = {text}", made, is_pure=call.is_pure)
        elif isinstance(call.output, list | tuple) and len(made) == len(call.output):
            self._line(f"{', '.join(slot.name for slot in made)}, = {text}", made, is_pure=call.is_pure)
        elif call.output is None:
            self._line(text, ())
        elif _is_plain(call.output):
            self._line(f"if {text} != {call.output!r}: return None", ())
        else:
            raise UnplannableError("it makes something else than tensors and numbers")

    def _said(self, value: Any) -> str:
        """`value` as an expression."""
        if isinstance(value, _Slot):
            if value.is_folded:
                return self._constant(value.value)
            self._reads.add(value.name)
            return value.name
        if isinstance(value, _Storage):
            return f"{self._said(value.slot)}.untyped_storage()"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._said, value))}]"
        if _is_plain(value):
            return repr(value)
        if isinstance(value, (Tensor, *_NAMED)):
            return self._constant(value)
        raise UnplannableError(f"it is given a {type(value).__name__}")

    def _returned(self, leaf: Any) -> str:
        """A leaf of the outputs, which whoever gets it may write to."""
        slot = self._calls.slot(leaf) if isinstance(leaf, Tensor) else None
        if isinstance(leaf, Tensor) and (slot is None or slot.is_folded or slot.first.source is not None):
            raise UnplannableError("it returns a tensor that is not its own")
        if slot is None and not _is_plain(leaf):
            raise UnplannableError("it returns what may hold further tensors")
        return self._said(slot or leaf)

    def _constant(self, value: Any) -> str:
        if id(value) not in self._names:
            name = self._names[id(value)] = f"c{len(self._constants)}"
            self._constants[name] = value.detach() if isinstance(value, nn.Parameter) else value
        return self._names[id(value)]

    def _line(self, text: str, made: Sequence[_Slot], *, is_pure: bool = False) -> None:
        self._lines.append(_Line(text, {slot.name for slot in made}, self._reads, is_pure))
        self._reads = set()

    def _compiled(self) -> Callable[..., Any]:
        """The function, in which no name outlives its last use."""
        alive: set[str] = set()
        lines: list[str] = []
        for line in reversed(self._lines):
            if line.is_pure and alive.isdisjoint(line.makes):
                continue
            ended = sorted((line.reads | line.makes) - alive)
            alive |= line.reads | line.makes
            if ended and not line.text.startswith("return"):
                lines.append(f"    del {', '.join(ended)}")
            lines.append(f"    {line.text}")
        lines.append(f"def plan({', '.join(slot.name for slot in self._calls.inputs)}):")
        namespace = dict(self._constants)
        exec(compile("\n".join(reversed(lines)), "<plan>", "exec"), namespace)  # noqa: S102  # nosec B102 - written above
        found: Callable[..., Any] = namespace["plan"]
        return found


def _written(func: Any, args: Any, kwargs: Any, read: Sequence[Tensor], returned: Sequence[Tensor]) -> list[Tensor]:
    """What a call wrote to: as its schema says, or, as oneDNN's does not, because it was returned."""
    found = [x for x in read if any(x is y for y in returned)]
    schema = func._schema.arguments
    values = {**dict(zip((argument.name for argument in schema), args, strict=False)), **kwargs}
    names = [argument.name for argument in schema if argument.alias_info is not None and argument.alias_info.is_write]
    return found + [leaf for name in names for leaf in tree_leaves(values.get(name)) if isinstance(leaf, Tensor)]


def _has_size_of_values(func: Any, read: Sequence[Tensor]) -> bool:
    """Whether the size of what a call returns depends on values: `nonzero`, or rows that a mask selects."""
    if func is torch.ops.aten.index.Tensor:  # by numbers it returns as many as they are
        return any(index.dtype in (torch.bool, torch.uint8) for index in read[1:])
    return func in _SIZED_BY_VALUES or torch.Tag.dynamic_output_shape in func.tags


def _is_view(y: Tensor, x: Tensor) -> bool:
    return y.dtype == x.dtype and _memory(y) == _memory(x)


def _memory(x: Tensor) -> int:
    return id(x) if x.is_mkldnn else x.untyped_storage()._cdata


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, float) and math.isfinite(value))
