"""Outputs of two models for the same examples, made up."""

import torch
from torch import Tensor

from hfq.measure.evaluate import Evaluation
from hfq.tasks.classification import right
from hfq.tasks.metrics import MeanOf

ACCURACY = MeanOf("Accuracy", right)


def evaluation(rights: Tensor) -> Evaluation:
    """Of two labels, of which 1 is right."""
    return Evaluation(rights.double().mean().item(), list(torch.nn.functional.one_hot(rights.long(), 2).float()), 0.0)


def drawn(examples: int, *, lost: float, won: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which examples a float model of 90 % gets right, and an int8 model that loses and wins these shares of all."""
    chance = torch.rand(examples, generator=generator)
    first = chance < 0.9
    second = (chance >= lost) & (chance < 0.9 + won)
    return first, second
