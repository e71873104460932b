"""When is a trial good enough."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """The largest tolerated loss of a score, relative to the float model's `baseline`, or in `absolute` points.

    `baseline`: None where nothing was there to evaluate with. `confidence`: how sure the examples must make it that the
    loss is tolerable; None where the score alone decides.
    """

    baseline: float | None
    tolerable_loss: float
    kind: str = "relative"
    higher_is_better: bool = True
    confidence: float | None = None

    def loss(self, score: float) -> float:
        """How much worse than the baseline; negative when better."""
        assert self.baseline is not None  # asked for of scores
        loss = self.baseline - score if self.higher_is_better else score - self.baseline
        return loss / abs(self.baseline) if self.kind == "relative" and self.baseline else loss

    def met(self, score: float) -> bool:
        """Whether that score is good enough."""
        return self.loss(score) <= self.tolerable_loss + 1e-9  # equality counts, whatever the rounding

    def proved(self, p_value: float | None, *, trial: int) -> bool:
        """Whether a p-value supports the claim, of the trial with this number (from 1) of those on one split.

        Each trial spends 6 / (pi * number)^2 of the level, which adds up to all of it over any number of trials: the best
        of several is accepted no more often by luck than one would be (a weighted Bonferroni correction).
        """
        if self.confidence is None:
            return True
        return p_value is not None and p_value <= (1 - self.confidence) * 6 / (math.pi * trial) ** 2

    @property
    def threshold(self) -> float:
        """The worst score that is."""
        assert self.baseline is not None
        allowed = self.tolerable_loss * (abs(self.baseline) if self.kind == "relative" and self.baseline else 1.0)
        return self.baseline - allowed if self.higher_is_better else self.baseline + allowed
