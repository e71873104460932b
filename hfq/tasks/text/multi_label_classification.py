"""Multi-label classification: one text or a pair of texts, any number of labels.

A label holds where its logit is positive, its probability above one half, as transformers' pipeline has it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...common.errors import DataError
from ..base import Columns, Metric, Outputs, References, Trivial
from ..labels import UNLABELLED, LabelMap, LabelNames, check_plain, check_varied, plain
from ..metrics import Torchmetric, stacked
from .sequence import SequenceTask

if TYPE_CHECKING:
    from datasets import Dataset

_HOLDS = {"1": True, "1.0": True, "true": True, "yes": True, "0": False, "0.0": False, "false": False, "no": False}
FORMS = "lists of labels, lists of 0 and 1, or a column of 0 and 1 for each label"


@dataclass(frozen=True)
class MultiLabels:
    """How rows say which labels hold. `labels`: from values in lists to ids; None where 0 and 1 stand for them."""

    how: str
    labels: LabelMap | None


class MultiLabelClassification(SequenceTask):
    """Any number of labels for each text."""

    name = "multi-label-classification"
    roles: ClassVar[Mapping[str, str]] = {
        "text": "a text, or a pair of two columns",
        "label": "lists of labels, lists of 0 and 1, or one column of 0 and 1 for each label",
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.labels = LabelNames(config)

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        return config.get("problem_type") == "multi_label_classification"

    def find_labels(self, features: Mapping[str, Any], requested: Sequence[str]) -> list[str]:
        by_name = {plain(name): name for name in features}
        each = [by_name.get(plain(name)) for name in self.labels.names]
        if not requested and all(each):
            return [name for name in each if name]
        if len(requested) == len(self.labels.names) > 1:
            if set(requested) != set(each):
                raise DataError(
                    f"The label columns {', '.join(requested)} are not called as the model's labels are "
                    f"({self.labels}), so which is which is not known. Rename them."
                )
            return [name for name in each if name]
        return super().find_labels(features, requested)

    def align(self, splits: Sequence["Dataset"], columns: Columns) -> MultiLabels:
        """Raises `DataError` also where the first split, by which models are judged, has the same labels in every row."""
        found = self._matched(splits, columns["label"])
        rows = self.references(splits[0], columns, found)
        held = [tuple(name for name, holds in zip(self.labels.names, row, strict=True) if holds) for row in rows if row]
        check_varied(splits[0], ", ".join(columns["label"]), held)
        return found

    def _matched(self, splits: Sequence["Dataset"], columns: Sequence[str]) -> MultiLabels:
        if len(columns) > 1:
            return MultiLabels(f"by name: a column for each label ({self.labels})", None)
        (column,) = columns
        rows = [row for split in splits for row in split[column] if row is not None]
        if not all(isinstance(row, list | tuple) for row in rows):
            raise DataError(
                f"The column {column!r} holds {next(row for row in rows if not isinstance(row, list | tuple))!r}, and this "
                f"checkpoint gives any number of labels. Expected {FORMS}."
            )
        if rows and all(self._is_multi_hot(row) for row in rows):
            return MultiLabels(f"by position: 0 or 1 for each label ({self.labels})", None)
        check_plain((value for row in rows for value in row), column, expected=FORMS)
        twice = next((row for row in rows if len(set(row)) < len(row)), None)
        if twice is not None:
            raise DataError(
                f"The column {column!r} holds {str(twice)[:100]}, in which a label is there twice; lists of 0 and 1 have a number "
                f"for each of {len(self.labels)} labels ({self.labels}). Expected {FORMS}."
            )
        feature = splits[0].features[column]
        labels = self.labels.align(
            getattr(feature, "feature", feature), sorted({v for row in rows for v in row}, key=str)
        )
        return MultiLabels(f"lists, {labels.how}", labels)

    def references(self, rows: "Dataset", columns: Columns, alignment: MultiLabels) -> list[Any]:
        names = columns["label"]
        if len(names) > 1:
            values = zip(*(rows[name] for name in names), strict=True)
            return [_flags(row, list(names)) for row in values]
        column = rows[names[0]]
        if alignment.labels is None:
            return [None if row is None or UNLABELLED in row else _flags(row, self.labels.names) for row in column]
        return [None if row is None else self._multi_hot(row, alignment.labels) for row in column]

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """Micro F1 counts labels, macro F1 is the mean over them."""
        shape: dict[str, Any] = {"num_labels": len(self.labels.names)}
        return {
            "micro_f1": Torchmetric("Micro F1", "f1_score", _decided, task="multilabel", average="micro", **shape),
            "macro_f1": Torchmetric("Macro F1", "f1_score", _decided, task="multilabel", average="macro", **shape),
            "mean_average_precision": Torchmetric(
                "Mean average precision", "average_precision", _logits, task="multilabel", average="macro", **shape
            ),
        }

    def per_example(self, outputs: Outputs, references: References) -> Tensor:
        """bool `[examples]`: whether every label is right."""
        given, right = _decided(outputs, references)
        return (given == right).all(1)

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Share of examples with the same labels."""
        return ((stacked(outputs) > 0) == (stacked(others) > 0)).all(1).double().mean().item()

    def margins(self, outputs: Outputs, others: Outputs) -> Tensor:
        """Of the logit that is nearest to being answered otherwise."""
        first, second = stacked(outputs), stacked(others)
        return torch.where(first > 0, second, -second).amin(1)

    def trivial(self, metric: str, references: References) -> Trivial:
        """The best of always answering the n most common labels."""
        frequent = torch.tensor(references).sum(0).argsort(descending=True).tolist()
        found = {}
        for count in range(1, len(frequent) + 1):
            constant = torch.full((len(frequent),), -1.0)
            constant[frequent[:count]] = 1.0
            found[count] = self.score(metric, [constant] * len(references), references)
        best = max(found, key=lambda count: found[count])
        return Trivial(
            found[best], f"answering the {best} most common labels" if best > 1 else "answering the most common label"
        )

    def usage(self, tag: str) -> str:
        """Every label with its probability: by itself, the pipeline names one."""
        return f'{super().usage(tag)}\nmodel("The sun shines.", top_k=None)'

    def _is_multi_hot(self, row: Sequence[Any]) -> bool:
        return len(row) == len(self.labels.names) and all(
            not isinstance(v, str) and v in (0, 1, UNLABELLED) for v in row
        )

    def _multi_hot(self, row: Sequence[Any], labels: LabelMap) -> list[int] | None:
        ids = [labels(value) for value in row]
        if None in ids:
            return None
        return [int(label in ids) for label in range(len(self.labels.names))]


def _flags(row: Sequence[Any], names: Sequence[str]) -> list[int] | None:
    """0 or 1 for each label; None if one is missing.

    Raises:
        DataError: a value says neither.
    """
    if any(value is None or value == UNLABELLED or (isinstance(value, float) and math.isnan(value)) for value in row):
        return None
    flags = [_HOLDS.get(str(value).strip().lower()) for value in row]
    if None in flags:
        wrong = flags.index(None)
        raise DataError(f"The label {names[wrong]!r} has the value {row[wrong]!r}; expected 0 or 1. Expected {FORMS}.")
    return [int(bool(flag)) for flag in flags]


def _decided(outputs: Outputs, references: References) -> tuple[Tensor, Tensor]:
    """bool `[examples, labels]`: what the model answers, and what is right."""
    return stacked(outputs) > 0, torch.tensor(references)


def _logits(outputs: Outputs, references: References) -> tuple[Tensor, Tensor]:
    return stacked(outputs).sigmoid(), torch.tensor(references)
