"""Observers: from what a layer's input looked like on the calibration slice to the range int8 should cover.

Each is a pure function of `InputStatistics`; none sees the model. Ranges always hold zero, so that padding
and ReLU outputs are exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

BINS = 2048
CODES = 256


@dataclass
class InputStatistics:
    """One layer's input over the calibration slice, padding tokens left out.

    `channel_min`, `channel_max`: float32 `[in]`. `average_min`, `average_max`: moving averages of the batch
    extremes. `histogram`: float32 `[BINS]` counts over `[low, high]`, the extremes of the whole slice.
    """

    channel_min: Tensor
    channel_max: Tensor
    average_min: float
    average_max: float
    histogram: Tensor

    @property
    def low(self) -> float:
        return min(self.channel_min.min().item(), 0.0)

    @property
    def high(self) -> float:
        return max(self.channel_max.max().item(), 0.0)

    def bin_centers(self) -> Tensor:
        """float32 `[BINS]`."""
        width = (self.high - self.low) / BINS
        return self.low + width * (torch.arange(BINS) + 0.5)


Range = tuple[float, float]
Observer = Callable[[InputStatistics], Range]


def min_max(stats: InputStatistics) -> Range:
    """The extremes: nothing is clipped, one outlier widens every step."""
    return stats.low, stats.high


def moving_average(stats: InputStatistics) -> Range:
    """Exponential moving average of each batch's extremes, as in Jacob et al. 2018 (arXiv:1712.05877)."""
    return min(stats.average_min, 0.0), max(stats.average_max, 0.0)


def percentile(stats: InputStatistics, *, percent: float) -> Range:
    """The range that holds `percent` of the values, the rest shared by both tails (Wu et al. 2020, arXiv:2004.09602)."""
    mass = stats.histogram.double().cumsum(0) / stats.histogram.sum().clamp(min=1)
    tail = (1 - percent / 100) / 2
    low_bin = int((mass <= tail).sum())
    high_bin = min(int((mass < 1 - tail).sum()) + 1, BINS)
    width = (stats.high - stats.low) / BINS
    return min(stats.low + low_bin * width, 0.0), max(stats.low + high_bin * width, 0.0)


def mse(stats: InputStatistics) -> Range:
    """The range with the least squared rounding and clipping error over the histogram, both ends searched."""
    ends = torch.linspace(0.05, 1.0, 39)
    low, high = torch.cartesian_prod(stats.low * ends, stats.high * ends).unbind(1)  # [candidates]
    centers = stats.bin_centers()
    scale, zero_point = affine(low, high)
    scale, zero_point = scale[:, None], zero_point[:, None]
    best_error, best = float("inf"), (stats.low, stats.high)
    for chunk in torch.arange(len(low)).split(256):  # 256 x BINS floats at a time: 2 MiB
        codes = (centers / scale[chunk] + zero_point[chunk]).round().clamp(-128, 127)
        restored = (codes - zero_point[chunk]) * scale[chunk]
        error = ((restored - centers).square() * stats.histogram).sum(1)
        winner = int(error.argmin())
        if error[winner] < best_error:
            best_error, best = error[winner].item(), (low[chunk][winner].item(), high[chunk][winner].item())
    return best


def entropy(stats: InputStatistics) -> Range:
    """The range whose int8 histogram has the least Kullback-Leibler divergence from the float one.

    Migacz, "8-bit inference with TensorRT" (GTC 2017), for asymmetric ranges: both ends shrink together,
    clipped mass is added to the outermost bins that stay, and a code's mass is spread over its non-empty bins.
    """
    total = stats.histogram.sum()
    if total == 0 or stats.high == stats.low:
        return stats.low, stats.high
    centers = stats.bin_centers()
    counts = stats.histogram.double()
    zero = int(centers.abs().argmin())  # always exact, and after ReLU most of the mass: it must not decide
    counts[zero] = torch.cat([counts[max(zero - 1, 0) : zero], counts[zero + 1 : zero + 2]]).mean()
    p = counts / counts.sum().clamp(min=1)
    best_divergence, best = float("inf"), (stats.low, stats.high)
    for ratio in torch.linspace(0.1, 1.0, 91).tolist():
        low, high = stats.low * ratio, stats.high * ratio
        inside = ((centers >= low) & (centers <= high)).nonzero().flatten()
        if len(inside) < CODES:
            continue
        first, last = int(inside[0]), int(inside[-1]) + 1
        clipped = p[first:last].clone()
        clipped[0] += p[:first].sum()
        clipped[-1] += p[last:].sum()
        filled = (p[first:last] > 0).double()
        code = ((centers[first:last] - low) / (high - low) * CODES).long().clamp(0, CODES - 1)
        mass = torch.zeros(CODES, dtype=torch.double).scatter_add_(0, code, p[first:last])
        bins = torch.zeros(CODES, dtype=torch.double).scatter_add_(0, code, filled)
        q = (mass / bins.clamp(min=1))[code] * filled
        q = q / q.sum()
        seen = clipped > 0
        divergence = (clipped[seen] * (clipped[seen] / q[seen].clamp(min=1e-12)).log()).sum().item()
        if divergence < best_divergence:
            best_divergence, best = divergence, (low, high)
    return best


OBSERVERS: dict[str, Observer] = {
    "min-max": min_max,
    "moving-average": moving_average,
    "percentile-99.99": partial(percentile, percent=99.99),
    "percentile-99.999": partial(percentile, percent=99.999),
    "mse": mse,
    "entropy": entropy,
}


def affine(low: Tensor, high: Tensor, *, codes: int = CODES) -> tuple[Tensor, Tensor]:
    """Asymmetric int8 parameters: `x = (code - zero_point) * scale`; both float32.

    The range takes the middle `codes` of [-128, 127]: all of them by default.
    """
    scale = ((high - low) / (codes - 1)).clamp(min=torch.finfo(torch.float32).eps)
    return scale, (-codes / 2 - low / scale).round().clamp(-128, 127)
