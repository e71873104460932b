"""Outputs of two models for the same examples, made up."""

import torch
from torch import Tensor

from hfq.measure.evaluate import Evaluation
from hfq.tasks.base import Outputs, References, SumMetric
from hfq.tasks.classification import right
from hfq.tasks.metrics import MeanOf

ACCURACY = MeanOf("Accuracy", right)


class F1(SumMetric):
    """Of label 1, whose numbers are true positives, false positives and false negatives."""

    label = "F1"

    def numbers(self, outputs: Outputs, references: References) -> Tensor:
        given, expected = torch.stack(list(outputs)).argmax(1) == 1, torch.tensor(references) == 1
        return torch.stack([given & expected, given & ~expected, ~given & expected], 1).double()

    def of_sums(self, sums: Tensor) -> Tensor:
        return 2 * sums[..., 0] / (2 * sums[..., 0] + sums[..., 1] + sums[..., 2]).clamp(min=1e-9)


def evaluation(rights: Tensor) -> Evaluation:
    """Of two labels, of which 1 is right."""
    return Evaluation(rights.double().mean().item(), list(torch.nn.functional.one_hot(rights.long(), 2).float()), 0.0)


def drawn(examples: int, *, lost: float, won: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which examples a float model of 90 % gets right, and an int8 model that loses and wins these shares of all."""
    chance = torch.rand(examples, generator=generator)
    first = chance < 0.9
    second = (chance >= lost) & (chance < 0.9 + won)
    return first, second
