"""How sure some examples make it that a loss is within the tolerance: acceptance that knows its uncertainty.

Two questions, two answers. How probable it is, given these examples: a posterior or a bootstrap, said beside a verdict.
Whether it may be claimed at a level of confidence: a test, whose false claims are bounded whatever the size of the split.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from ..tasks.base import Metric, References
from ..tasks.metrics import MeanOf
from ..tuning.goal import Goal
from .evaluate import Evaluation
from .statistics import RESAMPLES, resampled_differences

Pair = tuple[Evaluation, Evaluation]
DRAWS = 20_000
BETS = 64  # sizes of a bet, over whose wealth the mean is taken
LARGEST = 10**7  # examples, beyond which nobody asks how many would decide


@dataclass(frozen=True)
class Claim:
    """`against`, `for_`: p-values of the hypotheses that more is lost than may be, and that it is not; small ones refute.

    `needed`: examples of this kind that would decide at the level asked for; None where they decide already, or nobody
    has as many.
    """

    against: float
    for_: float
    needed: int | None = None


def claim(
    judge: Metric, pair: Pair, references: References, *, goal: Goal, level: float = 0.05, seed: int = 0
) -> Claim:
    """What two models' outputs for the same examples, float first, say of the goal. `level`: 1 less the confidence asked for.

    For a mean over examples of values in [0, 1] the test is exact for any number of them; for the metric of a whole set
    it is a bootstrap that reckons with what was not drawn, and as good as those are.
    """
    if not judge.averages_shares:
        seen = resampled_differences(judge, pair, references, seed=seed)
        differences = resampled_differences(judge, pair, references, seed=seed, unseen=True)
        if not len(differences) or not len(seen):
            return Claim(1.0, 1.0)
        met, for_ = _share_met(pair, differences, goal), _share_met(pair, seen, goal)
        found = Claim(max(1 - met, 1 / RESAMPLES), max(for_, 1 / RESAMPLES))
        if min(found.against, found.for_) <= level:
            return found
        losses = _losses(pair, differences, goal), _losses(pair, seen, goal)
        return replace(found, needed=_needed_of_set(losses, goal, examples=len(references), level=level))
    values, counts, (low, high) = _excess(judge, pair, references, goal)

    def refuted(more: float) -> float:
        return p_value_of_mean(values, counts * more, largest=high)

    def confirmed(more: float) -> float:
        return p_value_of_mean(-values, counts * more, largest=-low)

    against, for_ = refuted(1), confirmed(1)
    if min(against, for_) <= level:
        return Claim(against, for_)
    examples = counts.sum().item()
    return Claim(against, for_, _needed(refuted, examples, level) or _needed(confirmed, examples, level))


def within(
    judge: Metric, pair: Pair, references: References, *, goal: Goal, differences: Tensor, seed: int = 0
) -> float:
    """The probability, given these examples, that no more is lost than may be.

    `differences`: of the scores, resampled, which tell it for the metric of a whole set. For a mean over examples it is
    a posterior, which does not take what never happened for impossible, as resampling does.
    """
    if not judge.averages_shares:
        return _share_met(pair, differences, goal)
    return _posterior(*_excess(judge, pair, references, goal), seed=seed)


def plausible_differences(judge: Metric, pair: Pair, references: References, *, seed: int) -> Tensor:
    """float64 `[draws]`: the second score less the first on all examples of this kind, as far as these tell.

    By bootstrap; for a mean over examples of values in [0, 1] by the posterior, which leaves room for what never happened.
    """
    if not judge.averages_shares:
        return resampled_differences(judge, pair, references, seed=seed)
    assert isinstance(judge, MeanOf)
    first, second = (judge.value(found.outputs, references).double() for found in pair)
    values, counts = (second - first).unique(return_counts=True)
    return _drawn_means(values, counts.double(), (-1.0, 1.0), seed=seed)


def _share_met(pair: Pair, differences: Tensor, goal: Goal) -> float:
    met = [goal.met(pair[0].score + difference) for difference in differences.tolist()]
    return sum(met) / max(1, len(met))


def _excess(
    judge: Metric, pair: Pair, references: References, goal: Goal
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """float64 `[kinds]`, of examples, whose mean is above zero where more is lost than may be; how many are of each kind,
    float64 `[kinds]`; and how far such a number may go, down and up.
    """
    assert isinstance(judge, MeanOf)
    first, second = (judge.value(found.outputs, references).double() for found in pair)
    kept = 1 - goal.tolerable_loss if goal.kind == "relative" else 1.0
    allowed = 0.0 if goal.kind == "relative" else goal.tolerable_loss
    values, counts = (kept * first - second - allowed).unique(return_counts=True)
    return values, counts.double(), (-1 - allowed, kept - allowed)


def p_value_of_mean(values: Tensor, counts: Tensor, *, largest: float) -> float:
    """Of the hypothesis that the mean of what was drawn is at least zero, valid for any number of examples.

    By betting (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting"): who bets that
    the mean is below zero gains 1 - b * value of each example. Under the hypothesis nobody's wealth grows on average,
    so it exceeds 1 / p with a probability of p at most (Markov). Bets of many sizes are made side by side.

    `values` `[kinds]` and how often each was drawn, float64 `[kinds]`; none is above `largest`.
    """
    if largest <= 0:
        return 0.0
    bets = torch.arange(1, BETS + 1, dtype=torch.float64) / (BETS + 1) / largest
    wealth = (torch.log1p(-bets[:, None] * values) * counts).sum(1)
    logarithm = torch.logsumexp(wealth, 0) - torch.log(torch.tensor(BETS, dtype=torch.float64))
    return min(1.0, torch.exp(-logarithm).item())


def _needed(p_value: Callable[[float], float], examples: float, level: float) -> int | None:
    """Examples of which p would be below `level`, were there more of the same mixture."""
    more = 1.0
    while p_value(more) > level:
        more *= 1.1
        if more * examples > LARGEST:
            return None
    return int(more * examples) + 1


def _losses(pair: Pair, differences: Tensor, goal: Goal) -> Tensor:
    """float64 `[resamples]`, as the goal counts them."""
    return torch.tensor([goal.loss(pair[0].score + difference) for difference in differences.tolist()]).double()


def _needed_of_set(losses: tuple[Tensor, Tensor], goal: Goal, *, examples: int, level: float) -> int | None:
    """The same, of losses that were resampled with what was not drawn, and of what was seen alone.

    By the normal approximation: spread falls with the square root of the examples, and what may not have been drawn with
    their number.
    """
    with_unseen, seen = losses
    mean, spread = seen.mean().item(), NormalDist().inv_cdf(1 - level) * seen.std().item()
    gap = abs(goal.tolerable_loss - mean)
    unseen = max(0.0, with_unseen.quantile(1 - level).item() - mean - spread) if mean < goal.tolerable_loss else 0.0
    # spread / sqrt(more) + unseen / more = gap
    root = (spread + math.sqrt(spread**2 + 4 * unseen * gap)) / 2
    if root == 0 or root**2 * examples > LARGEST * gap**2:
        return None
    return max(examples, int((root / gap) ** 2 * examples)) + 1


def _posterior(values: Tensor, counts: Tensor, most: tuple[float, float], *, seed: int) -> float:
    """The probability that the mean is not above zero."""
    return (_drawn_means(values, counts, most, seed=seed) <= 0).double().mean().item()


def _drawn_means(values: Tensor, counts: Tensor, most: tuple[float, float], *, seed: int) -> Tensor:
    """float64 `[DRAWS]`: the mean of values, by a Dirichlet posterior of the shares of each kind of example.

    The extremes are among them though never drawn, each with half an example (Jeffreys' prior): what did not happen in
    a few hundred examples is not impossible.
    """
    kinds = torch.cat([values, torch.tensor(most, dtype=torch.float64)])
    weights = torch.cat([counts, torch.tensor([0.5, 0.5], dtype=torch.float64)])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch._standard_gamma(weights.expand(DRAWS, -1), generator=generator)
    return (drawn * kinds).sum(1) / drawn.sum(1)
