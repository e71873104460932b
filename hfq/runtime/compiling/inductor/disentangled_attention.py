"""Attention that also multiplies query and key by what stands for their distance, in an exported graph.

DeBERTa does: `softmax(mask((q k^T + gather(q a^T) + gather(k b^T)^T) * scale)) v`, with `a` and `b` of each distance.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

Node = Any  # of torch.fx, where an argument of a node may be anything
_aten = torch.ops.aten
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten.contiguous.default)


@dataclass
class DisentangledAttention:
    """What is multiplied, `[batch, heads, length, size]`, and the operations that do it, in order.

    `hidden`: where a score becomes `fill`; None: nowhere. `by_query`, `by_key`: what each is multiplied by,
    `[1, heads, distances, size]`, and which of the products are added to its scores, `[1, length, length]`.
    """

    scale: float = 1.0
    query: Node = None
    key: Node = None
    value: Node = None
    hidden: Node | None = None
    fill: float = 0.0
    by_query: tuple[Node | None, Node | None] = (None, None)
    by_key: tuple[Node | None, Node | None] = (None, None)
    operations: list[Node] = field(default_factory=list)

    @property
    def tensors(self) -> list[Node]:
        """All that is read, but for the mask and the indices."""
        return [x for x in (self.query, self.key, self.value, self.by_query[0], self.by_key[0]) if x is not None]


class _NoAttentionError(Exception):
    """What is read is something else."""


class _Product(NamedTuple):
    """`left right^T * scale`, of which what `taken` says is taken along the last axis, if anything, and then `turned`."""

    left: Node
    right: Node
    scale: float
    taken: Node | None
    turned: bool


def read_disentangled(node: Node) -> DisentangledAttention | None:
    """What ends in `node`, a product of matrices. None if that is no such attention, or others read what is in between."""
    found = DisentangledAttention()
    try:
        _read(node, found)
    except _NoAttentionError:
        return None
    found.operations.sort()
    return found


def _read(node: Node, found: DisentangledAttention) -> None:
    weights, value = node.args
    (heads,) = node.users if len(node.users) == 1 else (None,)
    _expect(heads is not None and heads.target in _VIEWS and heads.meta["val"].dim() == 4)
    found.operations += [heads, node]
    softmax = _pass(weights, found, _VIEWS)
    _expect(softmax.target is _aten.softmax.int and softmax.args[1] in (-1, softmax.meta["val"].dim() - 1))
    scores = _pass(softmax, found, (_aten.softmax.int,))
    scores = _pass(scores, found, _VIEWS)
    if scores.target is _aten.masked_fill.Scalar:
        found.hidden, found.fill = scores.args[1:]
        scores = _pass(scores, found, (_aten.masked_fill.Scalar,))
    products = [_product(term, found) for term in _terms(scores, found)]
    plain = [product for product in products if product.taken is None]
    _expect(len(plain) == 1 and 1 < len(products) <= 3 and not plain[0].turned)
    found.scale = plain[0].scale
    for product in products:
        _expect(abs(product.scale / found.scale - 1) < 1e-5)
        by = None if product.taken is None else (_in_heads(_before_repeat(product.right)), product.taken)
        if by is None:
            continue
        _expect(product.left is (plain[0].right if product.turned else plain[0].left))
        _expect((found.by_key if product.turned else found.by_query)[0] is None)
        if product.turned:
            found.by_key = by
        else:
            found.by_query = by
    found.query, found.key, found.value = map(_in_heads, (plain[0].left, plain[0].right, value))


def _terms(node: Node, found: DisentangledAttention) -> list[Node]:
    """What is summed up to `node`."""
    node = _pass(node, found, _VIEWS)
    if node.target not in _SUMS or node.kwargs:
        return [node]
    _keep(node, found)
    first, other = node.args
    return [term for x in (first, other) if isinstance(x, fx.Node) or x != 0 for term in _terms(x, found)]


def _product(node: Node, found: DisentangledAttention) -> _Product:
    """What is multiplied in `node`, a term."""
    scale, index, turned = 1.0, None, False
    _expect(isinstance(node, fx.Node))
    while node.target is not _aten.bmm.default:
        _keep(node, found)
        if node.target in (_aten.div.Tensor, _aten.mul.Tensor):
            scale = _scaled(scale, node)
        elif _turns(node):
            _expect(index is None)
            turned = not turned
        elif node.target is _aten.gather.default and index is None and node.args[1] in (-1, 2):
            index = _alike_in_all(node.args[2])
        else:
            raise _NoAttentionError
        node = node.args[0]
    _keep(node, found)
    left, right = node.args
    if right.target in (_aten.div.Tensor, _aten.mul.Tensor):
        scale = _scaled(scale, right)
        right = right.args[0]
    _expect(_turns(right))
    return _Product(left, right.args[0], scale, index, turned)


def _pass(node: Node, found: DisentangledAttention, targets: tuple[Any, ...]) -> Node:
    """What `node` is made from by operations of `targets` alone."""
    while node.target in targets:
        _keep(node, found)
        node = node.args[0]
    return node


def _keep(node: Node, found: DisentangledAttention) -> None:
    _expect(len(node.users) == 1)
    found.operations.append(node)


def _expect(condition: bool) -> None:
    if not condition:
        raise _NoAttentionError


def _turns(node: Node) -> bool:
    """Whether it transposes matrices."""
    return node.target is _aten.transpose.int and sorted(axis % 3 for axis in node.args[1:]) == [1, 2]


def _in_heads(node: Node) -> Node:
    """`[batch, heads, length, size]` of which `node` is `[batch * heads, length, size]`."""
    source = node
    while source.target in _VIEWS and source.meta["val"].dim() != 4:
        source = source.args[0]
    if source.target is _aten.contiguous.default:
        source = source.args[0]
    x, y = node.meta["val"].shape, source.meta["val"].shape
    _expect(len(y) == 4 and tuple(x[1:]) == tuple(y[2:]))
    return source


def _before_repeat(node: Node) -> Node:
    """What is the same for all of a batch."""
    _expect(node.target is _aten.repeat.default and list(node.args[1][1:]) == [1, 1])
    return node.args[0]


def _alike_in_all(index: Node) -> Node:
    """`[1, length, length]`, of what is the same for all of a batch and for all heads."""
    _expect(index.target is _aten.expand.default)
    found = index.args[0]
    _expect(found.meta["val"].dim() == 3 and found.meta["val"].shape[0] == 1)
    return found


def _scaled(scale: float, node: Node) -> float:
    """`scale`, times or divided by what `node` multiplies or divides by."""
    by = _constant(node.args[1])
    _expect(isinstance(by, int | float) or (by is not None and by.numel() == 1))
    number = float(by)
    return scale / number if node.target is _aten.div.Tensor else scale * number


def _constant(x: Any) -> Any:
    """What `x` is in every forward; None if that depends on inputs."""
    if not isinstance(x, fx.Node):
        return x
    if x.op == "get_attr":
        return getattr(x.graph.owning_module, str(x.target))
    if x.op != "call_function" or x.kwargs:
        return None
    arguments = [_constant(y) for y in x.args]
    operation: Any = x.target
    return None if any(y is None for y in arguments) else operation(*arguments)
