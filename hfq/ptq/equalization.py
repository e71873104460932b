"""Scales across layers: which factors between a layer and those that read it cost least in int8.

A fold's channels may be divided by any positive factors and multiplied back in the next weights (`graph.Fold`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .calibration import Statistics, watch
from .convert import int8_layer
from .graph import Fold, fold_into
from .inputs import Batch
from .layers import linear, twin, weight_rows
from .observers import min_max
from .scheme import LayerScheme
from .smoothquant import smoothed, smoothing_factors


def equalization_factors(model: nn.Module, folds: Sequence[Fold]) -> dict[str, Tensor]:
    """By producer name, float32 `[channels]`: what gives its rows and its consumers' columns the same range.

    Cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721, section 4.1): `sqrt(range of the row / range of
    the column)`. A LayerNorm's row is one number.
    """
    factors = {}
    for fold in folds:
        rows = linear(model, fold.producer).weight.detach().float().abs()
        row = rows if rows.dim() == 1 else rows.flatten(1).amax(1)
        columns = [weight_rows(linear(model, name)).abs().amax(0) for name in fold.consumers]
        column = torch.stack(columns).amax(0)
        factors[fold.producer] = (row.clamp(min=1e-5) / column.clamp(min=1e-5)).sqrt()
    return factors


def best_factors(
    model: nn.Module,
    folds: Sequence[Fold],
    statistics: Statistics,
    batches: Sequence[Batch],
    *,
    alphas: Sequence[float],
) -> dict[str, Tensor]:
    """By producer name, of all factors known for its fold those with the least squared error of int8 outputs.

    Tried are SmoothQuant with each of `alphas`, equalization, and leaving the fold as it is, which means that it is
    not among the results. The error is that of the producer and the consumers, each relative to its output, on the
    calibration inputs.
    """
    tried: list[dict[str, Tensor]] = [{}, equalization_factors(model, folds)]
    tried += [smoothing_factors(model, folds, statistics, alpha=alpha) for alpha in alphas]
    errors = [_errors(model, folds, factors, statistics, batches) for factors in tried]
    best: dict[str, Tensor] = {}
    for fold in folds:
        winner = min(range(len(tried)), key=lambda i: errors[i][fold.producer])
        if tried[winner]:
            best[fold.producer] = tried[winner][fold.producer]
    return best


def _errors(
    model: nn.Module,
    folds: Sequence[Fold],
    factors: Mapping[str, Tensor],
    statistics: Statistics,
    batches: Sequence[Batch],
) -> dict[str, float]:
    """By producer name, the int8 error of its fold's layers once rescaled by `factors`."""
    rescaled = twin(model)
    fold_into(rescaled, folds, factors)
    twins: dict[str, nn.Module] = {}
    for fold in folds:
        stats = {name: statistics[name] for name in fold.consumers}
        if fold.producer in factors:
            stats = {name: smoothed(seen, factors[fold.producer]) for name, seen in stats.items()}
        if fold.producer in statistics:  # else a LayerNorm, which stays float
            stats[fold.producer] = statistics[fold.producer]
        for name, seen in stats.items():
            twins[name] = int8_layer(linear(rescaled, name), LayerScheme.static(min_max(seen)))
    error, power = dict.fromkeys(twins, 0.0), dict.fromkeys(twins, 0.0)

    def compare(name: str, _: nn.Module, x: Tensor, y: Tensor) -> None:
        error[name] += (twins[name](x) - y).square().sum().item()
        power[name] += y.square().sum().item()

    watch(rescaled, list(twins), batches, compare)
    return {
        fold.producer: sum(
            error[name] / max(power[name], 1e-30) for name in (fold.producer, *fold.consumers) if name in twins
        )
        for fold in folds
    }
