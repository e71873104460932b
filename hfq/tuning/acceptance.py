"""When is a trial good enough, and is a difference more than chance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True)
class Goal:
    """The largest tolerated accuracy loss. `kind`: relative to the float score, or absolute points."""

    baseline: float
    tolerable_loss: float
    kind: str = "relative"
    higher_is_better: bool = True

    def loss(self, score: float) -> float:
        """How much worse than the baseline; negative when better."""
        loss = self.baseline - score if self.higher_is_better else score - self.baseline
        return loss / abs(self.baseline) if self.kind == "relative" and self.baseline else loss

    def met(self, score: float) -> bool:
        return self.loss(score) <= self.tolerable_loss + 1e-9  # equality counts, whatever the rounding


def mcnemar_p(only_first_right: int, only_second_right: int) -> float:
    """Exact two-sided p-value that both are equally often right (McNemar 1947, binomial form)."""
    n = only_first_right + only_second_right
    smaller = min(only_first_right, only_second_right)
    tail = sum(math.comb(n, k) for k in range(smaller + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_interval(first_right: Tensor, second_right: Tensor, *, seed: int) -> tuple[float, float]:
    """95 % interval of mean(second) - mean(first), bool `[examples]` each: percentile bootstrap over pairs."""
    difference = second_right.float() - first_right.float()
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [
            difference[torch.randint(len(difference), (len(difference),), generator=generator)].mean()
            for _ in range(RESAMPLES)
        ]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high
