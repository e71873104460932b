"""The plan of an exported int8 model, read off the model itself: what is explained is what was written."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..common.errors import UsageError
from ..ptq.graph import Fold, fold_into
from ..ptq.layers import linear, twin, weight_rows
from ..ptq.scheme import LayerScheme, Plan, Rows, quantize_rows
from ..runtime.int8.conv import Int8Conv
from ..runtime.int8.embedding import Int8Embedding
from ..runtime.int8.linear import Int8Linear
from ..runtime.int8.packed import unpack_all

SAME = 1e-3  # relative difference of scales that were computed of the same weight


def plan_of(int8: nn.Module, floats: nn.Module, folds: Sequence[Fold]) -> Plan:
    """The plan by which `floats` becomes `int8`.

    Raises:
        UsageError: it was not made from that float model.
    """
    unpack_all(int8)
    found = {name: module for name, module in int8.named_modules() if isinstance(module, Int8Linear | Int8Conv)}
    embeddings = tuple(name for name, module in int8.named_modules() if isinstance(module, Int8Embedding))
    smoothing = {
        fold.producer: factor for fold in folds if (factor := _factor(int8, floats, fold.producer)) is not None
    }
    folded = twin(floats)
    fold_into(folded, folds, smoothing)
    schemes, weights, shifts = {}, {}, {}
    for name, module in found.items():
        layer = linear(folded, name)
        rows = weight_rows(layer)
        codes, scale = _rows(module)
        nearest = quantize_rows(rows).scale
        if codes.shape != rows.shape or (scale / nearest - 1).abs().median() > 0.5:
            raise UsageError(f"The weight of {name} is another's: the INT8 folder was not made from this --baseline.")
        schemes[name] = _scheme(module)
        weights[name] = Rows(codes, scale)
        if module.bias is not None:
            bias = torch.zeros(()) if layer.bias is None else layer.bias.detach().float()
            shifts[name] = module.bias.detach().float() - bias
    return Plan(schemes, embeddings, smoothing, weights, shifts)


def _factor(int8: nn.Module, floats: nn.Module, producer: str) -> Tensor | None:
    """What a producer's channels were divided by, float32 `[channels]`; None if they were not."""
    after, before = int8.get_submodule(producer), linear(floats, producer)
    if isinstance(after, Int8Linear):  # its scales are those of the rows, which were divided
        factor = (quantize_rows(weight_rows(before)).scale / _rows(after)[1]).flatten()
    else:
        factor = (before.weight / linear(int8, producer).weight).detach().float()
        factor = factor if factor.dim() == 1 else factor.nanmedian(1).values
    return None if bool(((factor - 1).abs() <= SAME).all()) else factor


def _scheme(module: Int8Linear | Int8Conv) -> LayerScheme:
    if module.activation != "static":
        return LayerScheme(module.activation)
    return LayerScheme("static", module.input_scale.item(), int(module.input_zero_point.item()))


def _rows(module: Int8Linear | Int8Conv) -> tuple[Tensor, Tensor]:
    """Codes with output channels first, and their scale `[out, 1]`."""
    if isinstance(module, Int8Linear):
        codes, scale = module.weight_rows()
        return codes, scale.reshape(-1, 1)
    return module.weight.detach(), module.weight_scale.detach().reshape(-1, 1)
