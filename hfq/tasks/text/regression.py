"""Regression: one text or a pair of texts, one number."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...common.errors import DataError, UnsupportedError
from ..base import Alignment, Columns, Metric, Outputs, References, Trivial
from ..labels import check_varied, count_labels
from ..metrics import MeanOf, Torchmetric, stacked
from .sequence import SequenceTask

if TYPE_CHECKING:
    from datasets import Dataset

UNLABELLED = -1.0  # in a split whose every value it is, as in GLUE's test split


@dataclass(frozen=True)
class Numbers:
    """A column of numbers."""

    how: str = "numbers, as they are"


class Regression(SequenceTask):
    """A number for each text or pair, such as how alike two sentences are."""

    name = "regression"
    roles: ClassVar[Mapping[str, str]] = {"text": "a text, or a pair of two columns", "label": "a number"}
    label_columns: ClassVar[tuple[str, ...]] = ("label", "labels", "score", "similarity_score", "target")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        outputs = count_labels(config, default=1)
        if outputs != 1:
            raise UnsupportedError(f"This checkpoint puts out {outputs} numbers; hfq measures regression of one.")

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        outputs = count_labels(config)
        return config.get("problem_type") == "regression" or (config.get("problem_type") is None and outputs == 1)

    def align(self, splits: Sequence["Dataset"], columns: Columns) -> Alignment:
        check_varied(splits[0], columns["label"][0], self.references(splits[0], columns, None))
        return Numbers()

    def references(self, rows: "Dataset", columns: Columns, alignment: Any) -> list[Any]:
        (column,) = columns["label"]
        values = [as_number(value, row, column) for row, value in enumerate(rows[column])]
        return [None] * len(values) if set(values) == {UNLABELLED} else values

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """Correlations need no scale; the error has the labels'."""
        return {
            "spearman": Torchmetric("Spearman", "spearman_corrcoef", _pairs),
            "pearson": Torchmetric("Pearson", "pearson_corrcoef", _pairs),
            "mean_squared_error": MeanOf(
                "Mean squared error", _squared_errors, higher_is_better=False, in_points=False
            ),
        }

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """How much of the numbers' variance is left of the other's: 1 - squared difference / variance, at least 0."""
        a, b = values_of(outputs), values_of(others)
        spread, error = (a - a.mean()).square().sum().item(), (a - b).square().sum().item()
        return max(0.0, 1 - error / spread) if spread else float(error == 0)

    def trivial(self, metric: str, references: References) -> Trivial | None:
        """Always the mean: it correlates with nothing."""
        if metric != "mean_squared_error":
            return Trivial(0.0, "answering the same number")
        right = torch.tensor(references, dtype=torch.float64)
        return Trivial(right.var(correction=0).item(), "answering the mean")

    def usage(self, tag: str) -> str:
        """The number as it is: of one number, the pipeline takes the sigmoid where config.json names no problem_type."""
        return f'{super().usage(tag)}\nmodel("The sun shines.", function_to_apply="none")'


def as_number(value: Any, row: int, column: str) -> float | None:
    """Raises `DataError` where it is none."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise DataError(
            f"Row {row} (from 0) has {value!r} in column {column!r}; expected a number. "
            "Mend or remove such rows, or name another column with --label-column."
        )
    return None if math.isnan(number) else number


def values_of(outputs: Outputs) -> Tensor:
    """float64 `[examples]`."""
    return stacked(outputs).reshape(len(outputs)).double()


def _pairs(outputs: Outputs, references: References) -> tuple[Tensor, Tensor]:
    return values_of(outputs), torch.tensor(references, dtype=torch.float64)


def _squared_errors(outputs: Outputs, references: References) -> Tensor:
    given, right = _pairs(outputs, references)
    return (given - right).square()
