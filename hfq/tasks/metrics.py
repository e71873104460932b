"""Metrics that several tasks offer, by torchmetrics where it has them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Metric, Outputs, References, SumMetric


class MeanOf(SumMetric):
    """The mean over examples of a function of outputs and references, `[examples]`."""

    def __init__(
        self,
        label: str,
        value: Callable[[Outputs, References], Tensor],
        *,
        higher_is_better: bool = True,
        in_points: bool = True,
    ) -> None:
        self.label = label
        self.value = value
        self.higher_is_better = higher_is_better
        self.in_points = in_points

    @property
    def averages_shares(self) -> bool:
        return self.higher_is_better and self.in_points

    def numbers(self, outputs: Outputs, references: References) -> Tensor:
        values = self.value(outputs, references).double()
        return torch.stack([values, torch.ones_like(values)], 1)

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]


class Torchmetric(Metric):
    """One of `torchmetrics.functional`, by name. `given`: from outputs and references to what it takes."""

    def __init__(
        self,
        label: str,
        name: str,
        given: Callable[[Outputs, References], tuple[Tensor, Tensor]],
        **settings: Any,
    ) -> None:
        self.label = label
        self.name = name
        self.given = given
        self.settings = settings

    def score(self, outputs: Outputs, references: References) -> float:
        return self.of_values(*self.given(outputs, references))

    def of_some(self, outputs: Outputs, references: References) -> Callable[[list[int]], float]:
        given, right = self.given(outputs, references)
        given = given.int() if given.dtype == torch.bool else given
        given, right = torch.cat([given, given.amin(0) + given.amax(0) - given]), torch.cat([right, right])
        return lambda rows: self.of_values(given[rows], right[rows])

    def of_values(self, given: Tensor, right: Tensor) -> float:
        """From what torchmetrics takes."""
        from torchmetrics import functional  # takes a second to import

        value: Tensor = getattr(functional, self.name)(given, right, **self.settings)
        return value.item()


def stacked(outputs: Outputs) -> Tensor:
    """Outputs of one shape: `[examples, …]`."""
    return torch.stack(list(outputs))


def leads(outputs: Tensor, others: Tensor) -> Tensor:
    """By how much the entry that is largest in `outputs` `[.., n]` is ahead of all others in `others` `[.., n]`: `[..]`."""
    answer = outputs.argmax(-1, keepdim=True)
    return (others.gather(-1, answer) - others.scatter(-1, answer, -torch.inf).amax(-1, keepdim=True)).squeeze(-1)


def leads_among(answer: Tensor, known: Tensor, scores: Tensor) -> Tensor:
    """By how much `answer`, `[n, parts]`, is ahead of all others where only the best are known: `[n]`.

    `known`: `[n, best, parts]`, no answer twice, with their `scores` `[n, best]`. What is not among them is behind them all.
    """
    same = (known == answer[:, None]).all(2)
    own = scores.where(same, -torch.inf).amax(1).maximum(scores.amin(1))
    return own - scores.where(~same, -torch.inf).amax(1)


def other_scores(
    metrics: Mapping[str, Metric], decides: Metric, outputs: Outputs, others: Outputs, references: References
) -> list[str]:
    """Sentences about the metrics beside the one that decides: of a float model's outputs, and of INT8's `others`."""
    found = []
    for metric in metrics.values():
        before, after = (metric.score(rows, references) for rows in (outputs, others))
        if metric.label != decides.label and math.isfinite(before + after):
            found.append(f"{metric.label}: FP32 {before:.4f}, INT8 {after:.4f}.")
    return found
