"""Is a difference between two models on the same examples more than chance."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..tasks.base import Metric, Outputs, References, SumMetric
from .evaluate import Evaluation

RESAMPLES = 2000
RESAMPLES_OF_SETS = 500  # where the metric is computed anew for each
TRIED = 100  # examples of which the opposite is tried
_AT_ONCE = 1 << 22  # drawn indices held in memory


def mcnemar_p(only_first_right: int, only_second_right: int) -> float:
    """Exact two-sided p-value that both are equally often right (McNemar 1947, binomial form)."""
    n = only_first_right + only_second_right
    smaller = min(only_first_right, only_second_right)
    tail = sum(math.comb(n, k) for k in range(smaller + 1)) / 2**n
    return min(1.0, 2 * tail)


def resampled(
    metric: Callable[[Tensor], Tensor], first: Tensor, second: Tensor, *, seed: int, unseen: Tensor | None = None
) -> Tensor:
    """float64 `[RESAMPLES]`: metric(second) - metric(first), by bootstrap over pairs (Efron 1979).

    `first`, `second`: float64 `[examples, k]`, numbers of the same examples that add up. `metric`: from sums `[..., k]`.
    `unseen`: `[k]`, of an example that may be among those that were not drawn: as many as there may be of them.
    """
    examples = len(first)
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _AT_ONCE // (examples * first.shape[1]))
    differences = []
    for done in range(0, RESAMPLES, chunk):
        drawn = torch.randint(examples, (min(chunk, RESAMPLES - done), examples), generator=generator)
        after = second[drawn].sum(1)
        if unseen is not None:
            after += _unseen(len(drawn), examples, generator)[:, None] * (unseen - second.mean(0))
        differences.append(metric(after) - metric(first[drawn].sum(1)))
    return torch.cat(differences)


def resampled_sets(
    before: Callable[[list[int]], float],
    after: Callable[[list[int]], float],
    examples: int,
    *,
    seed: int,
    unseen: int | None = None,
) -> Tensor:
    """The same for a metric of a whole set, of examples by their numbers, as `Metric.of_some` has them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in _unseen(RESAMPLES_OF_SETS, examples, generator).int().tolist():
        drawn = torch.randint(examples, (examples,), generator=generator)
        others = drawn.clone()
        if unseen is not None:
            others[:count] = unseen  # they were drawn in random order
        found.append(after(others.tolist()) - before(drawn.tolist()))
    differences = torch.tensor(found, dtype=torch.float64)
    return differences[differences.isfinite()]


def _unseen(resamples: int, examples: int, generator: torch.Generator) -> Tensor:
    """float64 `[resamples]`: how many of so many examples may be of a kind that none of them was.

    By the posterior of its share under a uniform prior, 95 % of which lies below 3 / examples, as the rule of three has it
    (Hanley and Lippman-Hand 1983). A bootstrap alone takes what never happened for impossible.
    """
    share = 1 - torch.rand(resamples, generator=generator, dtype=torch.float64) ** (1 / examples)
    return torch.binomial(torch.full_like(share, examples), share, generator=generator)


def resampled_differences(
    judge: Metric,
    pair: tuple[Evaluation, Evaluation],
    references: References,
    *,
    seed: int,
    unseen: bool = False,
) -> Tensor:
    """The score of the second of two models less that of the first, on resamples of the examples.

    `unseen`: as if among them were some, too few to be seen, that the second answers as badly as can be. None are left
    where nothing that it might answer is worse: then these examples say nothing of others.
    """
    first, second = (found.outputs for found in pair)
    if isinstance(judge, SumMetric):
        numbers = [judge.numbers(outputs, references) for outputs in (first, second)]
        worst = _worst(judge, numbers[1], _opposites(judge, second, references)) if unseen else None
        return resampled(judge.of_sums, *numbers, seed=seed, unseen=worst)
    before, after = judge.of_some(first, references), judge.of_some(second, references)
    harmful = _most_harmful(judge, after, len(references), seed=seed) if unseen else None
    if unseen and harmful is None:
        return torch.empty(0, dtype=torch.float64)
    return resampled_sets(before, after, len(references), seed=seed, unseen=harmful)


def _worst(judge: SumMetric, numbers: Tensor, opposites: Tensor) -> Tensor:
    """`[k]`, of the example that, were there one more of it, would harm the metric most."""
    every = torch.cat([numbers, opposites])
    scores = judge.of_sums(numbers.sum(0) + every)
    return every[int(scores.argmin() if judge.higher_is_better else scores.argmax())]


def _opposites(judge: SumMetric, outputs: Outputs, references: References) -> Tensor:
    """float64 `[examples, k]`, of outputs that are the opposite; none where they are no scores."""
    if not all(output.is_floating_point() for output in outputs):
        return judge.numbers(outputs, references)[:0]
    return judge.numbers([-output for output in outputs], references)


def _most_harmful(judge: Metric, score: Callable[[list[int]], float], examples: int, *, seed: int) -> int | None:
    """The number of the example whose opposite, were it there too, would harm the metric most; None where none would."""
    every = list(range(examples))
    tried = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))[:TRIED].tolist()
    sign = 1 if judge.higher_is_better else -1
    scores = {examples + row: sign * score([*every, examples + row]) for row in tried}
    worst = min(scores, key=scores.__getitem__)
    return worst if scores[worst] < sign * score(every) else None


def on_others(differences: Tensor) -> Tensor:
    """What differences of all examples are on as many others as they are drawn from: those have the same luck of their own."""
    return differences + differences.flip(0) - differences.mean()


def middle(values: Tensor, *, chosen_of: int = 1) -> tuple[float, float]:
    """Where the middle 95 % of `values` begin and end; of the best of several, so far apart that it holds of all (Bonferroni)."""
    tail = 0.025 / chosen_of
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high
