"""SmoothQuant (Xiao et al. 2023, arXiv:2211.10438): move outliers from activations into weights.

The factors go into the layer before, where the graph allows it exactly (`hfq.ptq.graph`); a
checkpoint so smoothed needs no extra operation to run.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .graph import Fold
from .layers import linear
from .observers import InputStatistics


def smoothing_factors(
    model: nn.Module, folds: Sequence[Fold], statistics: Mapping[str, InputStatistics], *, alpha: float
) -> dict[str, Tensor]:
    """By producer name, float32 `[channels]`: `max|x|^alpha / max|w|^(1 - alpha)`. alpha in [0, 1]."""
    factors = {}
    for fold in folds:
        stats = statistics[fold.consumers[0]]
        activation = torch.maximum(stats.channel_min.abs(), stats.channel_max.abs()).clamp(min=1e-5)
        weights = [linear(model, name).weight.detach().float().abs().amax(0) for name in fold.consumers]
        weight = torch.stack(weights).amax(0).clamp(min=1e-5)
        factors[fold.producer] = (activation**alpha / weight ** (1 - alpha)).clamp(min=1e-5)
    return factors


def smoothed(stats: InputStatistics, factor: Tensor) -> InputStatistics:
    """Extremes of the input once its channels are divided by `factor`. Its histogram is not known: left empty."""
    low, high = stats.channel_min / factor, stats.channel_max / factor
    return InputStatistics(low, high, low.min().item(), high.max().item(), torch.zeros_like(stats.histogram))
