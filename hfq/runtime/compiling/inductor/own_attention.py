"""Attention that a model computes from matmuls and a softmax of its own, in an exported graph.

MPNet does, which adds a number for the distance between tokens to scores: `softmax(q k^T * scale + bias + mask) v`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

Node = Any  # of torch.fx, where an argument of a node may be anything
_aten = torch.ops.aten
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_SCALES = {_aten.mul.Tensor: lambda scale, by: scale * by, _aten.div.Tensor: lambda scale, by: scale / by}


@dataclass
class OwnAttention:
    """What is multiplied, the scale of the products, what is added to them, and the operations that do it, last first."""

    query: Node
    key: Node
    value: Node
    scale: float = 1.0
    added: list[Node] = field(default_factory=list)
    operations: list[Node] = field(default_factory=list)


def read_attention(node: Node) -> OwnAttention | None:
    """What ends in the matmul `node`. None if that is no attention, or if anybody else reads what is in between."""
    if node.target is not _aten.matmul.default:
        return None
    weights, value = node.args
    if weights.target is not _aten.softmax.int or weights.args[1] not in (-1, 3) or len(weights.users) != 1:
        return None
    found = _scores(weights.args[0])
    if found is not None:
        found.value = value
        found.operations = [node, weights, *found.operations]
    return found


def _scores(node: Node) -> OwnAttention | None:
    """What is known of attention with the scores `node`, but for its value."""
    if len(node.users) != 1 or node.kwargs:
        return None
    found = None
    if node.target is _aten.matmul.default:
        query, columns = node.args
        if columns.target is _aten.transpose.int and sorted(axis % 4 for axis in columns.args[1:]) == [2, 3]:
            found = OwnAttention(query, columns.args[0], None)
    elif node.target in _SCALES and isinstance(node.args[1], int | float):
        found = _scores(node.args[0])
        if found is None or found.added:
            return None
        found.scale = _SCALES[node.target](found.scale, node.args[1])
    elif node.target in _SUMS and isinstance(node.args[1], fx.Node):
        scores, other = node.args
        found = _scores(scores)
        if found is None and node.target is _aten.add.Tensor:
            scores, other = other, scores
            found = _scores(scores)
        if found is None or other is scores or not isinstance(other.meta["val"], torch.Tensor):
            return None
        found.added.append(other)
    if found is not None:
        found.operations.insert(0, node)
    return found


def before_it_is_repeated(node: Node) -> Node:
    """What broadcasts to `node`, if that only lays it out several times: a matrix, or several."""
    source = node.args[0] if node.target is _aten.contiguous.default else node
    while source.target is _aten.expand.default and source.args[0].meta["val"].dim() > 1:
        node = source = source.args[0]
    return node
