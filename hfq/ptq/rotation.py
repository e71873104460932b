"""Rotation of the residual stream: outliers in a few of its channels are spread over all of them.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), with everything folded offline: weights and biases of norms into the
layers that read them, and an orthogonal matrix into all that writes to the stream and all that reads it. A norm's numbers
rotate with its input, a LayerNorm's too where the matrix keeps the mean. So it is exact where each layer reads the stream
through a norm: in encoders and decoders with the norm first, whose last one feeds a head. Which those are, the exported
graph shows, and the outputs prove it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from .graph import TOKENWISE, are_alike, exported, replace_parameter
from .inputs import Batch
from .layers import linear, twin

aten = torch.ops.aten
EXACT = 1e-3  # relative difference of the output that float32 makes where every number is mixed with others
_CONV = (aten.conv1d.default, aten.conv2d.default)


@dataclass(frozen=True)
class Rotation:
    """Names of what has a part in it. `readers`: by norm, the Linear layers that read what it returns.

    `writers`: Linear layers and convolutions. `tables`: parameters whose last axis is the stream's, such as embeddings,
    each by all of its names.
    """

    width: int
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    tables: tuple[tuple[str, ...], ...]

    def applied(self, model: nn.Module) -> nn.Module:
        """`model` with its stream rotated, in new parameters; it computes what `model` does."""
        rotated, turn = twin(model), _orthogonal(self.width)
        for name in self.writers:
            layer = linear(rotated, name)
            _set(layer, "weight", (turn @ layer.weight.float().flatten(1)).view(layer.weight.shape))
            if layer.bias is not None:
                _set(layer, "bias", turn @ layer.bias.float())
        for names in self.tables:
            table = nn.Parameter(rotated.get_parameter(names[0]) @ turn.T, requires_grad=False)
            for name in names:
                owner, _, key = name.rpartition(".")
                setattr(rotated.get_submodule(owner), key, table)
        for name, readers in self.readers.items():
            norm = linear(rotated, name)
            shift = getattr(norm, "bias", None)
            for reader in readers:
                layer = linear(rotated, reader)
                weight = layer.weight.float()
                if shift is not None:
                    _set(layer, "bias", layer.bias.float() + weight @ shift.float())
                _set(layer, "weight", (weight * norm.weight.float()) @ turn.T)
            _set(norm, "weight", torch.ones_like(norm.weight))
            if shift is not None:
                _set(norm, "bias", torch.zeros_like(shift))
        return rotated

    def was_applied(self, made: nn.Module, model: nn.Module) -> bool:
        """Whether `made` was made from `model` so rotated: its norms then have no weights of their own."""

        def plain(of: nn.Module) -> bool:
            return all(bool((of.get_parameter(f"{name}.weight") == 1).all()) for name in self.readers)

        return plain(made) and not plain(model)


def find_rotation(model: nn.Module, batch: Batch) -> Rotation | None:
    """That of `model`, traced on `batch`; None where the stream cannot be rotated exactly."""
    graph = exported(model, batch)
    if graph is None:
        return None
    try:
        found = _Stream(model, graph).rotation()
        return found if are_alike(model, found.applied(model), batch, within=EXACT) else None
    except _OtherwiseError:
        return None


class _OtherwiseError(Exception):
    """The model is built in another way."""


class _Stream:
    """The residual stream of an exported model: what its norms are given, back to where that comes from."""

    def __init__(self, model: nn.Module, graph: Any) -> None:
        self._model = model
        self._parameters: Mapping[str, str] = graph.graph_signature.inputs_to_parameters
        self._nodes = list(graph.graph.nodes)
        self._norms = {name: module for name, module in model.named_modules() if _is_norm(module)}
        if not self._norms:
            raise _OtherwiseError
        widths = Counter(module.weight.numel() for module in self._norms.values())
        self.width = widths.most_common(1)[0][0]

    def rotation(self) -> Rotation:
        """Raises `_OtherwiseError` where there is none."""
        sources, readers = {}, {}
        for name, norm in self._norms.items():
            inside = [node for node in self._nodes if _module_of(node) == name]
            if norm.weight.numel() != self.width or not inside:
                continue
            sources[name] = _only(
                given for node in inside for given in node.all_input_nodes if self._is_from_outside(given, name)
            )
            out = inside[-1]  # its input may leave it as well, cast to what it is already
            readers[name] = tuple(dict.fromkeys(self._readers(out)))
        writers: set[str] = set()
        tables: set[str] = set()
        for leaf in self._leaves(set(sources.values())):
            kind, name = self._written_by(leaf)
            (writers if kind == "layer" else tables).add(name)
        found = Rotation(self.width, readers, tuple(sorted(writers)), tuple(map(self._names_of, sorted(tables))))
        self._check(found)
        return found

    def _is_from_outside(self, node: fx.Node, norm: str) -> bool:
        return _module_of(node) != norm and node.name not in self._parameters

    def _readers(self, node: fx.Node) -> Iterator[str]:
        """Linear layers that read `node`, token by token."""
        for user in node.users:
            if user.target == aten.linear.default and user.args[0] is node:
                yield self._owner(user.args[1])
            elif user.target in TOKENWISE:
                yield from self._readers(user)
            elif user.op == "output" or user.users:  # else it looks at a shape or a type
                raise _OtherwiseError

    def _leaves(self, ahead: set[fx.Node]) -> set[fx.Node]:
        """What is summed into the stream."""
        seen: set[fx.Node] = set()
        leaves = set()
        while ahead:
            node = ahead.pop()
            if node in seen:
                continue
            seen.add(node)
            scaled = node.target == aten.mul.Tensor and len(node.all_input_nodes) == 1  # by a number
            if node.target in TOKENWISE or scaled:
                ahead.add(node.all_input_nodes[0])
            elif node.target in (aten.add.Tensor, aten.cat.default):
                ahead |= set(node.all_input_nodes)
            else:
                leaves.add(node)
        return leaves

    def _written_by(self, leaf: fx.Node) -> tuple[str, str]:
        if leaf.name in self._parameters:
            return "table", self._parameters[leaf.name]
        if leaf.target == aten.embedding.default:
            return "table", f"{self._owner(leaf.args[0])}.weight"
        if leaf.target == aten.linear.default or leaf.target in _CONV:
            return "layer", self._owner(leaf.args[1])
        raise _OtherwiseError

    def _owner(self, weight: Any) -> str:
        name = self._parameters.get(getattr(weight, "name", ""), "")
        if not name.endswith(".weight"):
            raise _OtherwiseError
        return name.removesuffix(".weight")

    def _names_of(self, parameter: str) -> tuple[str, ...]:
        """All that the model has for it."""
        table = self._model.get_parameter(parameter)
        named = self._model.named_parameters(remove_duplicate=False)
        return tuple(name for name, found in named if found is table)

    def _check(self, found: Rotation) -> None:
        """Raises `_OtherwiseError` where a weight is read elsewhere, too, or a norm's bias has nowhere to go."""
        read = [name for readers in found.readers.values() for name in readers]
        if not read or max(Counter(read).values()) > 1:
            raise _OtherwiseError
        for name in {*read, *found.writers}:
            if len(self._names_of(f"{name}.weight")) > 1:
                raise _OtherwiseError
        for norm, readers in found.readers.items():
            has_bias = getattr(self._model.get_submodule(norm), "bias", None) is not None
            if has_bias and any(linear(self._model, name).bias is None for name in readers):
                raise _OtherwiseError


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return "Norm" in type(module).__name__ and not list(module.children()) and weight is not None and weight.dim() == 1


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    replace_parameter(module, name, value.to(getattr(module, name).dtype))


def _module_of(node: fx.Node) -> str | None:
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else None


def _only(nodes: Iterator[fx.Node]) -> fx.Node:
    found = set(nodes)
    if len(found) != 1:
        raise _OtherwiseError
    return found.pop()


@lru_cache(maxsize=2)
def _orthogonal(width: int) -> Tensor:
    """float32 `[width, width]`, random, the same each time. It leaves the mean of what it rotates as it was."""
    generator = torch.Generator().manual_seed(0)
    free, _ = torch.linalg.qr(torch.randn(width - 1, width - 1, dtype=torch.float64, generator=generator))
    mirror = torch.eye(width, dtype=torch.float64)
    normal = torch.full((width,), width**-0.5, dtype=torch.float64)
    normal[0] -= 1
    mirror -= 2 * torch.outer(normal, normal) / normal.dot(normal)  # swaps the mean and the first axis
    turn = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), free)
    return (mirror @ turn @ mirror).float()
