"""Second-order weight rounding (GPTQ: Frantar et al. 2022, arXiv:2210.17323), for int8.

Rounding to the nearest code treats every weight alike. What matters is the layer's output, whose squared error is
`d H d^T` for a row's rounding error `d` and the second moments `H` of the layer's inputs. Columns are rounded one
after the other, and what one loses the later ones make up for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .calibration import as_rows, watch
from .inputs import Batch
from .scheme import Rows

DAMPING = 0.01  # of the mean diagonal, so that the Cholesky factor of few samples exists
BLOCK = 128  # columns whose updates are applied together


def second_moments(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean of `x x^T` over the real inputs of each Linear: float32 `[in, in]`."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(names, 0)

    def add(name: str, layer: nn.Module, x: Tensor, _: Tensor) -> None:
        rows = as_rows(layer, x)
        sums[name] = sums[name].addmm_(rows.t(), rows) if name in sums else rows.t() @ rows
        counts[name] += len(rows)

    watch(model, names, batches, add)
    return {name: moments / max(counts[name], 1) for name, moments in sums.items()}


def gptq_rows(weight: Tensor, moments: Tensor, *, nearest: Rows) -> Rows:
    """Codes for `weight` float `[out, in]` with the scale of `nearest`, by row never with more error than its codes.

    `moments`: float `[in, in]`, the second moments of the inputs.
    """
    order = moments.diagonal().argsort(descending=True)  # the inputs that matter most are rounded while others can help
    factor = _inverse_factor(moments[order][:, order].double())
    rest = weight.detach().double()[:, order]
    scale = nearest.scale.double()
    codes = torch.empty_like(rest)
    for start in range(0, rest.shape[1], BLOCK):
        stop = min(start + BLOCK, rest.shape[1])
        errors = torch.empty_like(rest[:, start:stop])
        for i in range(start, stop):
            codes[:, i] = (rest[:, i] / scale[:, 0]).round().clamp(-127, 127)
            error = (rest[:, i] - codes[:, i] * scale[:, 0]) / factor[i, i]
            rest[:, i:stop] -= error[:, None] * factor[i, i:stop]
            errors[:, i - start] = error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    found = codes[:, order.argsort()].to(torch.int8)
    better = output_error(weight, found, nearest.scale, moments) < output_error(weight, *nearest, moments)
    return Rows(torch.where(better[:, None], found, nearest.codes), nearest.scale)


def output_error(weight: Tensor, codes: Tensor, scale: Tensor, moments: Tensor) -> Tensor:
    """Expected squared error of each output, float64 `[out]`."""
    difference = weight.detach().double() - codes.double() * scale.double()
    return ((difference @ moments.double()) * difference).sum(1)


def _inverse_factor(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of `moments`, damped."""
    diagonal = moments.diagonal()
    damped = moments + torch.diag(torch.full_like(diagonal, DAMPING) * diagonal.mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
