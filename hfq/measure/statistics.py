"""Is a difference between two models on the same examples more than chance."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..tasks.base import Metric, References, SumMetric
from .evaluate import Evaluation

RESAMPLES = 2000
RESAMPLES_OF_SETS = 500  # where the metric is computed anew for each
_AT_ONCE = 1 << 22  # drawn indices held in memory


def mcnemar_p(only_first_right: int, only_second_right: int) -> float:
    """Exact two-sided p-value that both are equally often right (McNemar 1947, binomial form)."""
    n = only_first_right + only_second_right
    smaller = min(only_first_right, only_second_right)
    tail = sum(math.comb(n, k) for k in range(smaller + 1)) / 2**n
    return min(1.0, 2 * tail)


def resampled(metric: Callable[[Tensor], Tensor], first: Tensor, second: Tensor, *, seed: int) -> Tensor:
    """float64 `[RESAMPLES]`: metric(second) - metric(first), by bootstrap over pairs (Efron 1979).

    `first`, `second`: float64 `[examples, k]`, numbers of the same examples that add up. `metric`: from sums `[..., k]`.
    """
    examples = len(first)
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _AT_ONCE // (examples * first.shape[1]))
    differences = []
    for done in range(0, RESAMPLES, chunk):
        drawn = torch.randint(examples, (min(chunk, RESAMPLES - done), examples), generator=generator)
        differences.append(metric(second[drawn].sum(1)) - metric(first[drawn].sum(1)))
    return torch.cat(differences)


def resampled_sets(difference: Callable[[list[int]], float], examples: int, *, seed: int) -> Tensor:
    """The same for a metric of a whole set. `difference`: second less first, on the examples of the given numbers."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(examples, (examples,), generator=generator).tolist() for _ in range(RESAMPLES_OF_SETS)]
    found = torch.tensor([difference(rows) for rows in drawn], dtype=torch.float64)
    return found[found.isfinite()]


def resampled_differences(
    judge: Metric, pair: tuple[Evaluation, Evaluation], references: References, *, seed: int
) -> Tensor:
    """The score of the second of two models less that of the first, on resamples of the examples."""
    first, second = (found.outputs for found in pair)
    if isinstance(judge, SumMetric):
        return resampled(judge.of_sums, judge.numbers(first, references), judge.numbers(second, references), seed=seed)
    before, after = judge.of_some(first, references), judge.of_some(second, references)
    return resampled_sets(lambda rows: after(rows) - before(rows), len(references), seed=seed)


def middle(values: Tensor, *, chosen_of: int = 1) -> tuple[float, float]:
    """Where the middle 95 % of `values` begin and end; of the best of several, so far apart that it holds of all (Bonferroni)."""
    tail = 0.025 / chosen_of
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high
