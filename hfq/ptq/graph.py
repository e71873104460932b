"""What may be rescaled without changing the model: SmoothQuant folds, read off the exported graph.

A fold is a layer whose output channels feed only Linear layers, through operations that keep channels apart
(reshapes, transposes, attention over values, the other side of a gate). Dividing the producer's channels and multiplying the
consumers' columns by the same factors then leaves the float model as it was.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..common.memory import drop_file_pages, weights_left_in_file
from ..common.silence import exporting
from ..runtime.fusion.snapshot import drawing_alike, unchanged
from .inputs import Batch
from .layers import linear, twin

aten = torch.ops.aten
EXACT = 1e-4  # relative difference of the output that float32 rounding accounts for
_TRANSPARENT = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.dropout.default,
    aten.expand.default,
    aten.alias.default,
    aten.detach.default,
    aten.relu.default,  # a positive factor passes through it
    aten.relu_.default,
    aten.mul.Tensor,  # by a number, or by another tensor, as a gate does; what multiplies itself is found out by `_exact`
}
TOKENWISE = _TRANSPARENT - {aten.relu.default, aten.relu_.default, aten.mul.Tensor} | {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.index.Tensor,
    aten.mean.dim,
}  # leave the features of a token as they are, or mix those of several tokens alike
_WEIGHTS: dict[Any, int] = {
    aten.linear.default: 1,
    aten.layer_norm.default: 2,
    aten.rms_norm.default: 2,
}  # where an operation has it


@dataclass(frozen=True)
class Fold:
    """`producer` (a Linear, LayerNorm or RMSNorm) feeds exactly `consumers` (Linear layers), by module name."""

    producer: str
    consumers: tuple[str, ...]


def find_folds(model: nn.Module, batch: Batch, linears: tuple[str, ...]) -> list[Fold]:
    """Folds whose consumers are all among `linears`. A model that cannot be exported has none."""
    graph = exported(model, batch)
    if graph is None:
        return []
    parameters = graph.graph_signature.inputs_to_parameters
    folds = []
    for node in graph.graph.nodes:
        producer = _layer(node, parameters)
        if producer is None:
            continue
        consumers = _consumers(node, parameters)
        if consumers and set(consumers) <= set(linears) and _same_width(model, producer, consumers):
            folds.append(Fold(producer, tuple(dict.fromkeys(consumers))))
    produced = [fold.producer for fold in folds]
    consumed = [name for fold in folds for name in fold.consumers]
    # A module that runs more than once (shared layers) cannot be rescaled for one of its places.
    once = [
        fold
        for fold in folds
        if produced.count(fold.producer) == 1 and all(consumed.count(name) == 1 for name in fold.consumers)
    ]
    return once if _exact(model, once, batch) else [fold for fold in once if _exact(model, [fold], batch)]


def exported(model: nn.Module, batch: Batch) -> torch.export.ExportedProgram | None:
    """The graph of a forward on `batch`; None where the model cannot be exported."""
    try:
        with unchanged(model), exporting():
            return torch.export.export(model, (), {**batch, **_without_cache(model)}, strict=False)
    except Exception:  # torch.export raises whatever the model's own code or its tracer raises
        return None


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """What keeps a decoder from answering with its cache, too: tracing takes no such object for an answer."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _exact(model: nn.Module, folds: Sequence[Fold], batch: Batch) -> bool:
    """Whether the model answers as before with its channels rescaled: shapes can lie about what a reshape mixes."""
    generator = torch.Generator().manual_seed(0)
    factors = {
        fold.producer: torch.rand(len(linear(model, fold.producer).weight), generator=generator) + 0.5 for fold in folds
    }
    rescaled = twin(model)
    fold_into(rescaled, folds, factors)
    return are_alike(model, rescaled, batch, within=EXACT)


def are_alike(model: nn.Module, other: nn.Module, batch: Batch, *, within: float) -> bool:
    """Whether `other` answers as `model` does, up to a relative difference of `within`."""
    with unchanged(model), weights_left_in_file(model, other, from_rows=1), torch.inference_mode():
        with drawing_alike():
            before = _first_tensor(model(**batch))
        with drawing_alike():
            after = _first_tensor(other(**batch))
    return bool((after - before).norm() <= within * before.norm())


def _first_tensor(output: Tensor | Sequence[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def fold_into(model: nn.Module, folds: Sequence[Fold], factors: Mapping[str, Tensor]) -> None:
    """Rescale producers and consumers in place, in new parameters. The float function does not change."""
    for fold in folds:
        if fold.producer not in factors:
            continue
        factor = factors[fold.producer]
        producer = linear(model, fold.producer)  # or a norm, which has a weight too
        by_row = factor if producer.weight.dim() == 1 else factor[:, None]
        replace_parameter(producer, "weight", producer.weight / by_row)
        if getattr(producer, "bias", None) is not None:
            replace_parameter(producer, "bias", producer.bias / factor)
        for name in fold.consumers:
            replace_parameter(linear(model, name), "weight", linear(model, name).weight * factor)


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Give `module` another parameter of that name; what it had is as it was."""
    drop_file_pages(getattr(module, name))  # read for the last time
    setattr(module, name, nn.Parameter(value.detach(), requires_grad=False))


def _layer(node: fx.Node, parameters: Mapping[str, str]) -> str | None:
    """The module name of a Linear or norm node with a weight of its own."""
    if node.target == aten.mul.Tensor:  # the end of an RMSNorm, as transformers writes it
        return next((name for part in node.args if (name := _owner(part, parameters))), None)
    position = _WEIGHTS.get(node.target)
    return _owner(node.args[position], parameters) if position is not None and len(node.args) > position else None


def _owner(weight: object, parameters: Mapping[str, str]) -> str | None:
    """The name of the module whose weight that is."""
    name = parameters.get(weight.name, "") if isinstance(weight, fx.Node) else ""
    return name.removesuffix(".weight") if name.endswith(".weight") else None


def _consumers(node: fx.Node, parameters: Mapping[str, str]) -> list[str] | None:
    """Linear layers that read `node` channel by channel; None when anything else reads it too."""
    found: list[str] = []
    for user in node.users:
        if user.target == aten.linear.default and user.args[0] is node:
            layer = _layer(user, parameters)
            inner = [layer] if layer else None
        elif user.target in _TRANSPARENT:
            inner = _consumers(user, parameters)
        elif user.target == aten.scaled_dot_product_attention.default and node not in user.args[:2]:
            inner = _consumers(user, parameters)  # the values: mixed over tokens, never over channels
        else:
            inner = None
        if inner is None:
            return None
        found += inner
    return found


def _same_width(model: nn.Module, producer: str, consumers: list[str]) -> bool:
    width = linear(model, producer).weight.shape[0]
    return all(linear(model, name).in_features == width for name in consumers)
