"""When is a trial good enough."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """The largest tolerated loss of a score, relative to the float model's `baseline`, or in `absolute` points.

    `baseline`: None where nothing was there to evaluate with.
    """

    baseline: float | None
    tolerable_loss: float
    kind: str = "relative"
    higher_is_better: bool = True

    def loss(self, score: float) -> float:
        """How much worse than the baseline; negative when better."""
        assert self.baseline is not None  # asked for of scores
        loss = self.baseline - score if self.higher_is_better else score - self.baseline
        return loss / abs(self.baseline) if self.kind == "relative" and self.baseline else loss

    def met(self, score: float) -> bool:
        """Whether that score is good enough."""
        return self.loss(score) <= self.tolerable_loss + 1e-9  # equality counts, whatever the rounding

    @property
    def threshold(self) -> float:
        """The worst score that is."""
        assert self.baseline is not None
        allowed = self.tolerable_loss * (abs(self.baseline) if self.kind == "relative" and self.baseline else 1.0)
        return self.baseline - allowed if self.higher_is_better else self.baseline + allowed
