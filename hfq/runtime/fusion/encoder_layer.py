"""A transformer's encoder layer as a handful of calls, one after the other.

Between two matmuls, a model's own code takes twenty steps through its modules. For a single short text they take as long
as the matmuls do, and they hold on to tensors whose memory is wanted for the next.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..int8.known_forward import KnownForward, runs_known_code
from ..int8.linear import Int8Linear
from ..int8.shared_matmul import SharedMatmul
from .attention import NAME, in_whole_registers
from .flow import example_output, standing_in
from .probe import noise
from .residual import NormalizedSum

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_LAYER_NORM = torch.ops.aten.layer_norm.default
_ADD = torch.ops.aten.add.Tensor
_SOFTMAX = torch.ops.aten.softmax.int
_ARGUMENTS = [argument.name for argument in _ATTENTION._schema.arguments]
_MASK = "attention_mask"


class EncoderLayer:
    """The `forward` of a layer: in known forwards its steps without its modules', else that of its class.

    The steps: `projection`, query, key and value in one matmul; attention of `heads`, with products times `scale`; the
    residual sum `attended`; the matmul `inner`; and the residual sum `outer`. `attention`: the module that has the first.
    """

    def __init__(  # noqa: PLR0913 - the parts of a layer
        self,
        layer: nn.Module,
        known: KnownForward,
        *,
        attention: nn.Module,
        projection: SharedMatmul,
        heads: int,
        scale: float | None,
        attended: NormalizedSum,
        inner: Int8Linear,
        outer: NormalizedSum,
    ) -> None:
        self.layer, self.known, self.attention = layer, known, attention
        self.projection, self.heads, self.scale = projection, heads, scale
        self.attended, self.inner, self.outer = attended, inner, outer

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self.known.runs_directly and self.projection.is_used:
            others = [*args[2:], *(value for name, value in named.items() if name != _MASK)]
            plain = len(args) > 0 and all(value is None or value is False for value in others)
            if plain and self.implementation in (NAME, "sdpa"):
                return self.steps(args[0], args[1] if len(args) > 1 else named.get(_MASK))
        return type(self.layer).forward(self.layer, *args, **named)

    @property
    def implementation(self) -> str:
        """The name of the attention that the model is to use."""
        config: Any = self.attention.config
        name: str = config._attn_implementation
        return name

    def steps(self, hidden: Tensor, mask: Tensor | None, products: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """float `[batch, length, features]` to the same. No name outlives what it names. `products`: of `projection`."""
        batch, length, _ = hidden.shape
        parts = (products or self.projection.products)(hidden).view(batch, length, 3 * self.heads, -1).transpose(1, 2)
        y = self.attend(parts, mask, hidden.dtype)
        del parts
        hidden = self.attended(y.to(hidden.dtype).reshape(batch, length, -1), hidden)
        del y
        return self.outer(self.inner.forward(hidden), hidden)

    def attend(self, parts: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Queries, keys and values `[batch, 3 * heads, length, size]` to `[batch, length, heads, size]`, `dtype` or narrower."""
        query, key, value = parts.split(self.heads, 1)
        plain = (mask is None or mask.dtype == torch.bool) and not getattr(self.attention, "is_causal", True)
        if plain and (query.dtype != dtype or self.implementation != NAME):  # else it is to be narrowed
            key, value, mask = in_whole_registers(key, value, mask)
            y = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
            return y.transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS[self.implementation]
        return attend(self.attention, query, key, value, mask, dropout=0.0, scaling=self.scale)[0]


class BiasedEncoderLayer(EncoderLayer):
    """The same of a layer that multiplies queries and keys itself, and adds a bias to each pair of positions, as MPNet does.

    Its mask is float, and added too. It returns a tuple of its output. Attention is torch's here, of bfloat16 on CPUs
    with AMX where that is wanted: `narrows`.
    """

    narrows = False

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self.known.runs_directly and self.projection.is_used and len(args) == 3:
            hidden, mask, bias = args
            plain = all(value is None or value is False for value in named.values())
            if plain and bias is not None and (mask is None or mask.dtype == bias.dtype):
                return (self.steps(hidden, _sum_of(bias, mask)),)
        return type(self.layer).forward(self.layer, *args, **named)

    def attend(self, parts: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self.narrows:
            parts = parts.to(torch.bfloat16)
        query, key, value = parts.split(self.heads, 1)
        key, value, mask = in_whole_registers(key, value, mask)
        y = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        return y.transpose(1, 2)


def _sum_of(bias: Tensor, mask: Tensor | None) -> Tensor:
    """What a forward's layers all add to their scores. It is kept for as long as the bias is."""
    found = getattr(bias, "_hfq_sum", None)
    if found is None or found[0] is not mask:
        found = bias._hfq_sum = (mask, bias if mask is None else bias + mask)  # type: ignore[attr-defined]
    total: Tensor = found[1]
    return total


def run_directly(model: nn.Module, known: KnownForward, *, narrow: bool) -> None:
    """Let layers of `model` run their steps so in forwards that are `known`, if their outputs are the same.

    `narrow`: attention may multiply bfloat16 where a layer has its own.
    """
    for layer in list(model.modules()):
        if _has_steps(layer):
            with suppress(Exception):  # a forward of the model's own, which wants something else
                found = _read(layer, known)
                if all(_is_equal(found, *added) for added in _examples(found)):
                    layer.forward = found
                    if isinstance(found, BiasedEncoderLayer):
                        found.narrows = narrow


def _has_steps(layer: nn.Module) -> bool:
    """Whether it is made of what these steps need. Embeddings have less, and an encoder mostly more."""
    if "forward" in layer.__dict__ or len(_linears(layer)) != 6 or len(_norms(layer)) != 2:
        return False
    named = list(inspect.signature(layer.forward).parameters)[1:2] == [_MASK]
    return named and all(map(_runs_plainly, layer.modules()))  # other code may do more than compute an output


def _runs_plainly(module: nn.Module) -> bool:
    plain = not (module._forward_hooks or module._forward_pre_hooks or "parametrizations" in module._modules)
    return plain and runs_known_code(module)


def _read(layer: nn.Module, known: KnownForward) -> EncoderLayer:
    """The steps of `layer` as one forward shows them.

    Raises:
        Exception: they are others.
    """
    outputs, seen = _Outputs(_linears(layer)), _Operations()
    with torch.inference_mode(), standing_in(outputs.layers, outputs), seen:
        hidden = _hidden(outputs.layers[0])
        layer.forward(hidden, None)
    kind = EncoderLayer if seen.calls else BiasedEncoderLayer
    heads, scale, causal = seen.attention
    *projected, first, inner, last = outputs.order
    projection = projected[0].shared_matmul
    plain = first.is_plain and last.is_plain
    if projection is None or list(projection.modules) != projected or causal or not plain:
        raise NotImplementedError
    norms = {norm.weight.data_ptr(): norm for norm in _norms(layer)}
    (weight, normed), (last_weight, _) = seen.norms
    then, at_end = norms[weight], norms[last_weight]
    added = {id(x): y for x, y in seen.added}
    _, _, _, output, _, last_output = outputs.outputs
    if added[id(output)].data_ptr() != hidden.data_ptr() or added[id(last_output)].data_ptr() != normed.data_ptr():
        raise NotImplementedError  # it adds a copy, which may be written over, while what was copied is to stay
    attention = next(module for module in layer.modules() if projected[0] in module._modules.values())
    return kind(
        layer, known, attention=attention, projection=projection, heads=heads, scale=scale,
        attended=NormalizedSum(first, then), inner=inner, outer=NormalizedSum(last, at_end),
    )  # fmt: skip


def _is_equal(found: EncoderLayer, *added: Tensor | None) -> bool:
    """Whether the outputs of the steps for an example are the layer's, other numbers in place of matmuls.

    `added`: what the layer is given beside its input: a mask, and maybe a bias.
    """
    layers = found.projection.modules
    hidden = _hidden(layers[0])

    def products(x: Tensor) -> Tensor:
        return torch.cat([layer.forward(x) for layer in layers], -1)

    mask, bias = (*added, None)[:2]
    outputs = _Outputs(_linears(found.layer))
    with torch.inference_mode(), standing_in(outputs.layers, outputs):
        expected = found.layer.forward(hidden, *added)
        output = found.steps(hidden, mask if bias is None else _sum_of(bias, mask), products)
    if isinstance(found, BiasedEncoderLayer):
        (expected,) = expected
    return isinstance(expected, Tensor) and torch.allclose(output, expected, rtol=1e-4, atol=1e-4)


def _examples(found: EncoderLayer) -> list[tuple[Tensor | None, ...]]:
    """Masks, and biases where the layer takes them, to try it with."""
    mask = _mask()
    if not isinstance(found, BiasedEncoderLayer):
        return [(None,), (mask,)]
    bias = noise(found.heads * 36).view(4, found.heads, 6, 6)[:2]
    return [(None, bias), ((~mask).float() * torch.finfo(torch.float32).min, bias.clone())]


class _Outputs:
    """What stands in for matmuls: of each layer another function of what it is given.

    `order`: the layers that were called, with `outputs`.
    """

    def __init__(self, layers: Sequence[Int8Linear]) -> None:
        self.layers = layers
        self.order: list[Int8Linear] = []
        self.outputs: list[Tensor] = []

    def __call__(self, layer: Int8Linear, x: Tensor) -> Tensor:
        self.order.append(layer)
        self.outputs.append(example_output(layer, x, self.layers.index(layer) + 1))
        return self.outputs[-1]


class _Operations(TorchDispatchMode):
    """Notes calls of torch's attention, scores that a softmax is taken of, the address of each norm's weight with its output, and what is added to what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, float | None, bool]] = []
        self.scores: list[Tensor] = []
        self.norms: list[tuple[int, Tensor]] = []
        self.added: list[tuple[Tensor, Tensor]] = []

    @property
    def attention(self) -> tuple[int, float | None, bool]:
        """Of the one that there was, the number of heads, the scale, and whether it is causal."""
        if not self.calls:
            (scores,) = self.scores
            return scores.shape[1], None, False
        ((query, scale, causal),) = self.calls
        return query.shape[1], scale, causal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATTENTION:
            named = {**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})}
            self.calls.append((named["query"], named.get("scale"), named.get("is_causal", False)))
        elif func is _SOFTMAX:
            self.scores.append(args[0])
        elif func is _ADD:
            self.added.append((args[0], args[1]))
        output = func(*args, **(kwargs or {}))
        if func is _LAYER_NORM:
            self.norms.append((args[2].data_ptr(), output))
        return output


def _linears(layer: nn.Module) -> list[Int8Linear]:
    return [module for module in layer.modules() if isinstance(module, Int8Linear)]


def _norms(layer: nn.Module) -> list[nn.LayerNorm]:
    return [module for module in layer.modules() if type(module) is nn.LayerNorm]


def _hidden(layer: Int8Linear) -> Tensor:
    return noise(layer.in_features).repeat(3, 1).view(2, 6, -1) * torch.linspace(1, 2, 12).view(2, 6, 1)


def _mask() -> Tensor:
    """bool `[2, 1, 6, 6]`: two tokens of padding in the second row."""
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[1, :, :, 4:] = False
    return mask
