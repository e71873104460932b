"""What an evaluation of a model on a split is done with, and what it finds."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Engine:
    """Lightning's `Trainer` arguments of the same names."""

    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"


@dataclass(frozen=True)
class Evaluation:
    """`score`: the metric. `logits` float32 `[examples, labels]` and `labels` `[examples]`, in the data's order."""

    score: float
    logits: Tensor
    labels: Tensor
    duration_s: float

    @property
    def right(self) -> Tensor:
        """bool `[examples]`: which answers are correct."""
        return self.logits.argmax(1) == self.labels

    @property
    def accuracy(self) -> float:
        """Share of correct answers, whatever the metric."""
        return self.right.double().mean().item()
