"""What quantizing shifts on average can be put back: into biases and weight scales, at no cost when the model runs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .calibration import as_rows, watch
from .inputs import Batch
from .scheme import Rows


def bias_corrections(model: nn.Module, twins: Mapping[str, nn.Module], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """By layer, the mean of its float output less its int8 twin's on the same inputs: float32 `[out]`.

    Bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2), measured in one pass of the float model.
    """
    shifts: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(twins, 0)

    def compare(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        difference = as_rows(layer, y - twins[name](x))
        shifts[name] = shifts.get(name, torch.zeros(())) + difference.sum(0)
        counts[name] += len(difference)

    watch(model, list(twins), batches, compare)
    return {name: shift / max(counts[name], 1) for name, shift in shifts.items()}


def input_means(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """By layer, the mean of its real inputs: float32 `[in]`."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(names, 0)

    def add(name: str, layer: nn.Module, x: Tensor, _: Tensor) -> None:
        rows = as_rows(layer, x)
        sums[name] = sums.get(name, torch.zeros(())) + rows.sum(0)
        counts[name] += len(rows)

    watch(model, names, batches, add)
    return {name: total / max(counts[name], 1) for name, total in sums.items()}


def correct_weights(weight: Tensor, rows: Rows, input_mean: Tensor) -> tuple[Rows, Tensor]:
    """Give each output channel of `rows` the mean and the variance that `weight` `[out, ..]` has there.

    Banner et al. 2019 (arXiv:1810.05723, section 4.3). Symmetric codes have nothing but a scale, which takes the
    variance; the mean of a row times the sum of mean inputs goes into the bias.

    Returns: the rows, and what to add to the bias: float32 `[out]`. A convolution gets no shift: at its border, the
    mean input is another.
    """
    flat, codes = weight.detach().float().flatten(1), rows.codes.float().flatten(1)
    spread = codes.std(1, keepdim=True, correction=0)
    wanted = flat.std(1, keepdim=True, correction=0)
    scale = torch.where((spread > 0) & (wanted > 0), wanted / spread.clamp(min=1e-12), rows.scale)
    shift = torch.zeros(len(flat))
    if weight.dim() == 2:
        shift = (flat.mean(1) - (codes * scale).mean(1)) * input_mean.sum()
    return Rows(rows.codes, scale), shift
