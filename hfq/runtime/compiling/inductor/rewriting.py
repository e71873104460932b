"""What is changed in an exported graph before it is compiled: which operations together become one of ours.

They are found by what computes them, in whatever model.
"""

import operator
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels.cpu import compiles_to_bfloat16
from ...kernels.layouts import VNNI
from .disentangled_attention import read_disentangled
from .own_attention import before_it_is_repeated, read_attention

LANES = 16  # float32 numbers, of which rows are multiples: one AVX-512 register, or two of AVX2
Node = Any  # of torch.fx, where an argument of a node may be anything
_aten = torch.ops.aten
_ATTENTION, _LAYER_NORM = _aten.scaled_dot_product_attention.default, _aten.layer_norm.default
_VIEWS = (
    _aten.reshape.default, _aten.view.default, _aten.slice.Tensor, _aten.transpose.int, _aten.permute.default,
    _aten.select.int, _aten.unflatten.int, _aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default,
    _aten.unbind.int, operator.getitem,
)  # fmt: skip
_NORMS = {torch.ops.hfq.layer_norm.default: {0, 1}, torch.ops.hfq.int8_linear_norm.default: {6}}  # what each adds
_KEEP_ORDER = (_aten.reshape.default, _aten.view.default, _aten.contiguous.default)
_MULTIPLIED = {0, 1, 2, 7, 9}  # of what attention is given
_FUNCTIONS = {
    _aten.relu.default: "relu", _aten.relu_.default: "relu", _aten.gelu.default: "gelu", _aten.gelu_.default: "gelu",
}  # fmt: skip


def rewrite(module: fx.GraphModule, *, fusions: Collection[str]) -> None:
    """Put `hfq::layer_norm` and, if wanted, `hfq::attention` where they compute the same and what they quantize.

    `fusions`: "compiled-attention", and "compiled-residual", which has residual sums read bfloat16.
    """
    graph = module.graph
    _simplify(graph)
    _leave_out_tokens(graph)
    graph.eliminate_dead_code()  # who has no other reader is looked for
    changed = {_origin(node): node for node in graph.nodes if _writes(node)}  # by whom last
    for node in graph.find_nodes(op="call_function", target=_LAYER_NORM):
        if node not in changed:
            _replace_norm(graph, node, changed)
    for node in graph.find_nodes(op="call_function", target=torch.ops.hfq.quantize_rows.default):
        _multiply_in_rows(graph, node)
    graph.eliminate_dead_code()  # sums that norms compute now
    if "compiled-residual" in fusions:
        for target in _NORMS:
            for node in graph.find_nodes(op="call_function", target=target):
                _narrow_sums(node)
    if "compiled-attention" in fusions:
        for node in graph.find_nodes(op="call_function", target=_ATTENTION):
            arguments = _arguments(node)
            if arguments is not None and changed.keys().isdisjoint(map(_origin, [node, *filter(None, arguments[0])])):
                _replace_attention(graph, [node], *arguments)
        _replace_own_attention(graph, changed)
        _replace_disentangled_attention(graph, changed)
        graph.eliminate_dead_code()  # who reads query, key and value no more
    for node in graph.find_nodes(op="call_function", target=torch.ops.hfq.attention.default):
        for i in _MULTIPLIED:
            if i < len(node.args) and node.args[i] is not None:
                _narrow(graph, node.args[i])
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def _simplify(graph: fx.Graph) -> None:
    """Take out what does nothing and stands between the operations that are looked for."""
    for node in list(graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif (source := _equal(node)) is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _equal(node: Node) -> Node | None:
    """What `node` only passes on."""
    if node.target is _aten.dropout.default and not node.args[2]:
        return node.args[0]
    if node.target is _aten.to.dtype and node.args[1:] == (node.args[0].meta["val"].dtype,) and not node.kwargs:
        return node.args[0]
    if node.target is _aten.slice.Tensor and node.args[2:] == (0, sys.maxsize):
        return node.args[0]
    source = node.args[0] if _is_first(node) else node  # of as many tokens, all equal, the first is the one there was
    if source.target is _aten.expand.default and _same(node.meta["val"].shape, source.args[0].meta["val"].shape):
        return source.args[0]
    return None


def _leave_out_tokens(graph: fx.Graph) -> None:
    """Have norms and sums computed for the first token of each row alone, where nobody reads a further one."""
    for node in reversed(list(graph.nodes)):
        norm = node.target is _LAYER_NORM and len(node.args[1]) == 1
        alike = node.target is _aten.add.Tensor and not node.kwargs and _are_alike(*node.args, node)
        if (
            not (norm or alike)
            or node.meta["val"].dim() != 3
            or not node.users
            or not all(map(_reads_first, node.users))
        ):
            continue
        count = 1 if norm else 2
        with graph.inserting_before(node):
            first = graph.call_function(
                node.target, (*(_first(graph, x) for x in node.args[:count]), *node.args[count:]), node.kwargs
            )
        first.meta["val"] = node.meta["val"][:, :1]
        for user in [user for user in node.users if _is_first(user)]:
            user.replace_all_uses_with(first)
            graph.erase_node(user)
        node.replace_all_uses_with(first)
        graph.erase_node(node)


def _first(graph: fx.Graph, x: Node) -> Node:
    """The first token of each row of `x`."""
    found = graph.call_function(_aten.slice.Tensor, (x, 1, 0, 1))
    found.meta["val"] = x.meta["val"][:, :1]
    source = _equal(found)
    if source is None:
        return found
    graph.erase_node(found)
    return source


def _reads_first(node: Node) -> bool:
    return _is_first(node) or (node.target is _aten.select.int and node.args[1:] == (1, 0))


def _is_first(node: Node) -> bool:
    """Whether it takes the first token of each row."""
    return node.target is _aten.slice.Tensor and node.args[1:] == (1, 0, 1)


def _writes(node: Node) -> bool:
    """Whether it changes a tensor that it is given."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _origin(node: Node) -> Node:
    """Where the memory of `node`'s output comes from."""
    while node.target is operator.getitem or (
        isinstance(node.target, OpOverload) and any(y.alias_info for y in node.target._schema.returns)
    ):
        node = node.kwargs.get("out") or node.args[0]
    return node


def _replace_norm(graph: fx.Graph, node: Node, changed: Mapping[Node, Node]) -> None:
    """Have the norm `node` return the codes that its readers quantize its outputs to.

    `changed`: what is written to after it was computed.
    """
    x, shape, *others = node.args
    weight, bias, eps = (*others, *(None, None, 1e-5)[len(others) :])[:3]
    found = x.meta["val"]
    suits = found.dim() == 3 and found.dtype == torch.float32 and len(shape) == 1 and shape[0] % LANES == 0
    suits &= all(y is None or y.meta["val"].dtype == torch.float32 for y in (weight, bias))
    readers = list(_readers(node))
    codes = next((y.args[1] for y in readers if _quantizes(y) and y.args[1].op == "placeholder"), None)
    quantized = [y for y in readers if _quantizes(y) and y.args[1] is codes]
    quantized = quantized or [y for y in readers if _quantizes_rows(y, shape[0])]
    if not suits or not quantized or node.kwargs:
        return
    residual = None
    adds = x.target is _aten.add.Tensor and len(x.users) == 1 and not x.kwargs and _are_alike(*x.args, x)
    if adds and changed.keys().isdisjoint(map(_origin, x.args)):
        x, residual = x.args
    both = len(quantized) < len(readers)
    operation, operands = torch.ops.hfq.layer_norm.default, (x, residual)
    if residual is not None:
        for product, other in ((x, residual), (residual, x)):
            matmul = _matmul_behind(product)
            if matmul is not None:
                operation, operands = torch.ops.hfq.int8_linear_norm.default, (*_operands(matmul), other)
    with graph.inserting_before(node):
        results = graph.call_function(operation, (*operands, weight, bias, codes, eps, both, False))
        count = 1 + both + (codes is None)
        outputs = [graph.call_function(operator.getitem, (results, i)) for i in range(count)]
    coded = outputs[both]
    for y in quantized:
        if codes is None:
            _read_rows(graph, y, coded, outputs[-1])
            continue
        with graph.inserting_before(y):
            _stand_in(y, graph.call_function(_aten.reshape.default, (coded, [-1, y.meta["val"].shape[1]])))
        graph.erase_node(y)
    if both:
        _stand_in(node, outputs[0])


def _multiply_in_rows(graph: fx.Graph, node: Node) -> None:
    """Have what `node` quantizes in rows found with these, if it is of an int8 matmul and an activation function."""
    function = _behind_views(node.args[0])
    is_known = function.target in _FUNCTIONS and function.kwargs.get("approximate", "none") == "none"
    matmul = _matmul_behind(function.args[0]) if is_known and len(function.users) == 1 else None
    if matmul is None or matmul.meta["val"].shape[1] != node.args[0].meta["val"].shape[1]:
        return
    with graph.inserting_before(node):
        arguments = *_operands(matmul), _FUNCTIONS[function.target]
        results = graph.call_function(torch.ops.hfq.int8_linear_rows.default, arguments)
        _read_rows(graph, node, *(graph.call_function(operator.getitem, (results, i)) for i in range(2)))
    function.replace_all_uses_with(function.args[0])
    graph.erase_node(function)  # no dead code if it works in place


def _read_rows(graph: fx.Graph, node: Node, codes: Node, scales: Node) -> None:
    """Have `codes` and `scales` of rows read in the place of those of `node`, which quantizes the same."""
    for user in list(node.users):
        found = (codes, scales)[user.args[1]]
        with graph.inserting_before(user):
            _stand_in(user, graph.call_function(_aten.reshape.default, (found, [-1, user.meta["val"].shape[1]])))
        graph.erase_node(user)
    graph.erase_node(node)


def _operands(matmul: Node) -> tuple[Any, ...]:
    """All that `hfq::int8_linear` takes."""
    return (*matmul.args, None, None)[:6]


def _narrow_sums(norm: Node) -> None:
    """Have the numbers of `norm` kept as bfloat16, if nothing reads them but sums that are normed."""
    *_, both, _ = norm.args
    numbers = [user for user in norm.users if both and user.args[1] == 0]
    if all(map(_only_sums_read, numbers)):
        norm.args = (*norm.args[:-1], bool(numbers))


def _only_sums_read(x: Node) -> bool:
    return _only_read(x, _NORMS, (*_VIEWS, *_KEEP_ORDER))


def _only_read(x: Node, places: Mapping[Any, set[int]], through: Collection[Any]) -> bool:
    """Whether nothing reads `x`, or what is `through` others the same, but operations that take it in such `places`."""

    def reads(user: Node) -> bool:
        if user.target in places:
            return places[user.target].issuperset(i for i, y in enumerate(user.args) if y is x)
        return user.target in through and _only_read(user, places, through)

    return all(map(reads, x.users))


def _matmul_behind(node: Node) -> Node | None:
    """The int8 matmul whose products `node` is, if nobody else reads them and a norm can be computed with it."""
    node = _behind_views(node)
    if node.target is not torch.ops.hfq.int8_linear.default or len(node.users) != 1:
        return None
    return node if node.args[1].meta["val"].shape[-1] == VNNI.block else None


def _behind_views(node: Node) -> Node:
    """What `node` shows in another shape, if nobody else reads it."""
    while node.target in _KEEP_ORDER and len(node.users) == 1:
        node = node.args[0]
    return node


def _stand_in(node: Node, other: Node) -> None:
    """Have `other`, which computes the same, read in the place of `node`."""
    other.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(other)


def _quantizes(node: Node) -> bool:
    if node.target is not torch.ops.hfq.quantize.default:
        return False
    shape = node.meta["val"].shape
    return len(shape) == 2 and isinstance(shape[1], int)


def _quantizes_rows(node: Node, features: int) -> bool:
    """Whether it quantizes rows of so many numbers."""
    return node.target is torch.ops.hfq.quantize_rows.default and node.args[0].meta["val"].shape[-1] == features


def _readers(node: Node) -> Iterator[Node]:
    """What reads the numbers of `node`, in whatever shape."""
    for user in node.users:
        if user.target in _KEEP_ORDER and user.users:
            yield from _readers(user)
        else:
            yield user


def _are_alike(*nodes: Any) -> bool:
    """Whether these are tensors of one shape and type."""
    if not all(isinstance(node, fx.Node) for node in nodes):
        return False
    first, *others = (node.meta["val"] for node in nodes)
    return all(other.dtype == first.dtype and _same(other.shape, first.shape) for other in others)


def _arguments(node: Node) -> tuple[list[Any], float] | None:
    """Query, key, value, mask and bias, and the scale; None if torch is to compute it."""
    query, key, value, *others = node.args
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), others, strict=False)) | node.kwargs
    mask, scale = given.get("attn_mask"), given.get("scale")
    if any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        return None
    if not _suits(query, key, value) or (mask and mask.meta["val"].dtype not in (torch.bool, torch.float32)):
        return None
    size = query.meta["val"].shape[-1]
    mask = mask and before_it_is_repeated(mask)
    return [query, key, value, mask, None], size**-0.5 if scale is None else float(scale)


def _suits(*tensors: Node) -> bool:
    """Whether they are query, key and value that `hfq::attention` takes."""
    q, k, v = (x.meta["val"] for x in tensors)
    return (
        all(x.dim() == 4 and x.dtype == torch.float32 for x in (q, k, v))
        and isinstance(q.shape[-1], int)
        and q.shape[-1] % LANES == 0
        and _same(q.shape[:2], k.shape[:2])
        and _same(k.shape, v.shape)
    )


def _replace_own_attention(graph: fx.Graph, changed: Mapping[Node, Node]) -> None:
    """Have attention that the model computes itself computed so, too. `changed`: what is written to, and by whom last."""
    rows: dict[Node, Node] = {}  # what is added, as it is read: once for all layers

    def in_rows(source: Node, before: Node) -> Node:
        if source not in rows:
            with graph.inserting_before(before):
                rows[source] = graph.call_function(_aten.contiguous.default, (source,))
            rows[source].meta["val"] = source.meta["val"]
        return rows[source]

    for node in graph.find_nodes(op="call_function", target=_aten.matmul.default):
        found = read_attention(node)
        if found is None or not _suits(found.query, found.key, found.value) or len(found.added) > 2:
            continue
        _, softmax, *_, first = scores = found.operations
        added = list(map(before_it_is_repeated, found.added))
        tensors = [found.query, found.key, found.value]
        stay = changed.keys().isdisjoint(map(_origin, [node, *tensors]))
        # What was a copy is read where it was copied from, so nobody may have written to it since.
        stay &= all(_origin(x) not in changed or changed[_origin(x)] < x for x in added)
        alike = all(_are_alike(x, first) for x in scores[1:])  # nothing that is added makes more of them
        plain = all(x.meta["val"].dtype == torch.float32 and x.meta["val"].dim() > 1 for x in added)
        if stay and alike and plain:
            mask, bias = [*(in_rows(x, softmax) for x in added), None, None][:2]
            _replace_attention(graph, found.operations[::-1], [*tensors, mask, bias], found.scale)


def _replace_disentangled_attention(graph: fx.Graph, changed: Mapping[Node, Node]) -> None:
    """Have attention computed so that also multiplies by what stands for distances. `changed`: as above."""
    masks: dict[Node, Node] = {}  # what is added to scores: once for all layers
    for node in graph.find_nodes(op="call_function", target=_aten.bmm.default):
        found = read_disentangled(node)
        if found is None or not _suits(found.query, found.key, found.value):
            continue
        if not changed.keys().isdisjoint(map(_origin, found.tensors)):
            continue
        if found.hidden is not None and found.hidden not in masks:
            with graph.inserting_after(found.hidden):
                numbers = graph.call_function(_aten.to.dtype, (found.hidden, torch.float32))
            with graph.inserting_after(numbers):
                mask = masks[found.hidden] = graph.call_function(_aten.mul.Tensor, (numbers, found.fill))
            numbers.meta["val"] = mask.meta["val"] = found.hidden.meta["val"].float()
        tensors = [found.query, found.key, found.value, masks.get(found.hidden), None]
        _replace_attention(graph, found.operations, tensors, found.scale, [*found.by_query, *found.by_key])


def _replace_attention(
    graph: fx.Graph, operations: list[Node], tensors: list[Any], scale: float, by_distance: Sequence[Any] = ()
) -> None:
    """`operations`: those that compute it, in order. `by_distance`: the last that `hfq::attention` takes."""
    *before, node = operations
    dead = [node, *_until_quantized(node)]
    last = dead[-1]
    with graph.inserting_before(last):
        if any(map(_is_first, dead)):
            query, key, value, *added = tensors
            for i, x in enumerate(added):
                if x is not None and x.meta["val"].shape[-2] != 1:
                    added[i] = graph.call_function(_aten.slice.Tensor, (x, -2, 0, 1))
            tensors = [graph.call_function(_aten.slice.Tensor, (query, 2, 0, 1)), key, value, *added]
            by_distance = list(by_distance)
            for i, axis in ((1, 1), (3, 2)):
                if i < len(by_distance) and by_distance[i] is not None:
                    by_distance[i] = graph.call_function(_aten.slice.Tensor, (by_distance[i], axis, 0, 1))
        codes = last.args[1] if len(dead) > 1 else None
        found = graph.call_function(torch.ops.hfq.attention.default, (*tensors, codes, scale, *by_distance))
        if codes is None:
            found = graph.call_function(_aten.transpose.int, (found, 1, 2))
        else:
            found = graph.call_function(_aten.reshape.default, (found, [-1, last.meta["val"].shape[1]]))
        _stand_in(last, found)
    for unused in reversed([*before, *dead]):
        graph.erase_node(unused)


def _narrow(graph: fx.Graph, x: Node) -> None:
    """Have `x` kept in 16 bits until attention reads it, if nothing else does.

    As the bfloat16 that is multiplied there, or else as float16, which is closer. A number that is out of its range is
    kept as the largest.
    """
    while x.target in _VIEWS:
        x = x.args[0]
    is_tensor = x.op == "call_function" and isinstance(x.meta.get("val"), torch.Tensor)
    if not is_tensor or x.target is _aten.to.dtype or not _only_attention_reads(x):
        return
    users = list(x.users)
    dtype, bounded = torch.bfloat16, x
    with graph.inserting_after(x):
        if not compiles_to_bfloat16():
            dtype = torch.float16
            largest = torch.finfo(dtype).max
            bounded = graph.call_function(_aten.clamp.default, (x, -largest, largest))
    with graph.inserting_after(bounded):
        narrow = graph.call_function(_aten.to.dtype, (bounded, dtype))
    for user in users:
        user.replace_input_with(x, narrow)


def _only_attention_reads(x: Node) -> bool:
    return _only_read(x, {torch.ops.hfq.attention.default: _MULTIPLIED}, _VIEWS)


def _until_quantized(node: Node) -> list[Node]:
    """What only puts the outputs `[batch, heads, length, size]` of `node` in rows of `heads * size`, and quantizes them.

    Or those of the first token of each row alone.
    """
    found: list[Node] = []
    swapped = False
    shape = node.meta["val"].shape
    while len(node.users) == 1:
        (node,) = node.users
        found.append(node)
        if swapped and _quantizes(node):
            return found
        if _swaps_heads(node) and not swapped:
            swapped = True
        elif swapped and _is_first(node) and _same(node.args[0].meta["val"].shape[:2], (shape[0], shape[2])):
            continue
        elif node.target not in _KEEP_ORDER or not (swapped or _same(shape, node.meta["val"].shape)):
            return []
    return []


def _swaps_heads(node: Node) -> bool:
    """Whether it turns `[batch, heads, length, size]` into `[batch, length, heads, size]`."""
    if node.target is _aten.permute.default:
        return [axis % 4 for axis in node.args[1]] == [0, 2, 1, 3]
    return node.target is _aten.transpose.int and node.args[1:] == (1, 2)


def _same(shape: Any, other: Any) -> bool:
    return len(shape) == len(other) and all(statically_known_true(a == b) for a, b in zip(shape, other, strict=True))
