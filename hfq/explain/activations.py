"""What goes into a layer: its range, and the channels and tokens that stretch it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..ptq.calibration import as_rows, watch
from ..ptq.inputs import Batch
from ..ptq.observers import InputStatistics
from ..ptq.scheme import LayerScheme
from .explanation import OUTLIER, Activations

MOST = 8  # channels that are named
_MANY = 1 << 20  # values of which torch finds no quantile


def token_peaks(model: nn.Module, layers: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """By layer, the largest absolute value of each real token of its input: float32 `[tokens]`."""
    peaks: dict[str, list[Tensor]] = {name: [] for name in layers}

    def see(name: str, layer: nn.Module, x: Tensor, _: Tensor) -> None:
        peaks[name].append(as_rows(layer, x).abs().amax(1))

    watch(model, layers, batches, see, outputs=False)
    return {name: torch.cat(seen) for name, seen in peaks.items() if seen}


def activations(stats: InputStatistics, peaks: Tensor, scheme: LayerScheme) -> Activations:
    """What calibration saw of an input, beside the codes that it gets; `peaks`: as of `token_peaks`."""
    channels = torch.maximum(stats.channel_min.abs(), stats.channel_max.abs())
    factors = channels / channels.median().clamp(min=1e-12)
    largest = factors.argsort(descending=True)[:MOST].tolist()
    return Activations(
        low=stats.low,
        high=stats.high,
        outlier_channels=[channel for channel in largest if factors[channel] >= OUTLIER],
        outlier_factor=factors.max().item(),
        outlier_tokens=(peaks > OUTLIER * peaks[:_MANY].median()).float().mean().item(),
        clipped=_clipped(stats, scheme),
    )


def _clipped(stats: InputStatistics, scheme: LayerScheme) -> float:
    """The share of values beyond the range of static codes, by the histogram."""
    if scheme.approach != "static" or not stats.histogram.sum():
        return 0.0
    half = scheme.input_scale / 2  # what rounds to the last code is in range
    low = (-128 - scheme.input_zero_point) * scheme.input_scale - half
    high = (127 - scheme.input_zero_point) * scheme.input_scale + half
    centers = stats.bin_centers()
    beyond = stats.histogram[(centers < low) | (centers > high)].sum()
    return (beyond / stats.histogram.sum()).item()


def mapping_of(
    statistics: Mapping[str, InputStatistics], peaks: Mapping[str, Tensor], schemes: Mapping[str, LayerScheme]
) -> dict[str, Activations]:
    """`activations` of each layer that was seen."""
    return {
        name: activations(statistics[name], peaks[name], scheme)
        for name, scheme in schemes.items()
        if name in statistics and name in peaks
    }
