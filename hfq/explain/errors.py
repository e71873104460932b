"""What a layer's own output loses in int8, one way or another, and how much of that reaches the model's output.

Errors are squared and relative to what the float layer, or the float model, puts out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..common.memory import return_freed_memory
from ..ptq.calibration import encoder_output, watch
from ..ptq.convert import quantize_model
from ..ptq.inputs import Batch
from ..ptq.layers import twin, weight_rows
from ..ptq.scheme import LayerScheme, Plan, Rows
from ..runtime.kernels.kernel import token_scale
from ..tuning.candidates import Space


class Way(NamedTuple):
    """A layer in int8: how its input becomes codes, and its weight's codes."""

    scheme: LayerScheme
    rows: Rows


def own_errors(
    model: nn.Module, ways: Mapping[str, Mapping[str, Way]], batches: Sequence[Batch]
) -> dict[str, dict[str, float]]:
    """By layer and name of the way, from one pass of `model`, whose inputs each is fed.

    Computed in float on values that codes stand for, so that no kernel packs a weight for each way.
    """
    error = {name: dict.fromkeys(of, 0.0) for name, of in ways.items()}
    power = dict.fromkeys(ways, 0.0)
    twins = {name: twin(model.get_submodule(name)) for name in ways}  # a call of the layer itself would be watched

    def compare(name: str, _: nn.Module, x: Tensor, y: Tensor) -> None:
        layer = twins[name]
        power[name] += y.square().sum().item()
        for how, (scheme, rows) in ways[name].items():
            found: Tensor = functional_call(layer, {"weight": _restored(layer, rows)}, (_rounded(x, scheme),))
            error[name][how] += (found - y).square().sum().item()

    watch(model, list(ways), batches, compare)
    return {name: {how: sum_ / max(power[name], 1e-30) for how, sum_ in of.items()} for name, of in error.items()}


def effects(
    space: Space, plan: Plan, batches: Sequence[Batch], *, track: Callable[[Iterable[str]], Iterable[str]] = iter
) -> dict[str, float]:
    """By layer and embedding, the error of the encoder's output when it alone is int8."""
    reference = encoder_output(space.model, batches)
    found = {}
    for name in track([*plan.layers, *plan.embeddings]):
        return_freed_memory()
        found[name] = encoder_output(alone(space, plan, name), batches).error(reference)
    return found


def alone(space: Space, plan: Plan, name: str) -> nn.Module:
    """The float model with one layer or embedding of `plan` in int8, and those that share its weight."""
    layers = {name: plan.layers[name]} if name in plan.layers else {}
    embeddings = () if layers else space.layers.tied.get(name, (name,))
    return quantize_model(space.model, replace(plan, layers=layers, embeddings=embeddings), space.folds)


def embedding_error(model: nn.Module, name: str, rows: Rows) -> float:
    """Of all rows of an embedding."""
    weight = weight_rows(model.get_submodule(name))
    return ((rows.codes * rows.scale - weight).square().sum() / weight.square().sum().clamp(min=1e-30)).item()


def _restored(layer: nn.Module, rows: Rows) -> Tensor:
    weight = rows.codes.flatten(1) * rows.scale
    return weight.t() if isinstance(layer, Conv1D) else weight.view_as(cast(Tensor, layer.weight))


def _rounded(x: Tensor, scheme: LayerScheme) -> Tensor:
    """`x` as int8 codes have it, in float."""
    if scheme.approach == "weight-only":
        return x
    if scheme.approach == "dynamic":
        scale = token_scale(x)
        return (x / scale).round().clamp(-128, 127) * scale
    codes = (x / scheme.input_scale).round() + scheme.input_zero_point
    return (codes.clamp(-128, 127) - scheme.input_zero_point) * scheme.input_scale
