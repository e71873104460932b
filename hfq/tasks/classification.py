"""What tasks share that give one answer of several, such as a label, whatever their model reads."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.errors import UnsupportedError
from .base import Columns, Confusion, Metric, Outputs, References, Task, Trivial
from .labels import LabelMap, LabelNames, check_varied, distinct
from .metrics import MeanOf, Torchmetric, leads, stacked

if TYPE_CHECKING:
    from datasets import Dataset


FEW = 12  # labels, whose confusions are a table that can be read


class Choice(Task):
    """One answer of several: the one with the largest logit. Outputs are float32 `[answers]`."""

    def per_example(self, outputs: Outputs, references: References) -> Tensor:
        """bool `[examples]`: whether the answer is right."""
        return right(outputs, references)

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Share of examples with the same answer."""
        return (stacked(outputs).argmax(1) == stacked(others).argmax(1)).double().mean().item()

    def margins(self, outputs: Outputs, others: Outputs) -> Tensor:
        """Of logits."""
        return leads(stacked(outputs), stacked(others))


class Classification(Choice):
    """One label for each example. Outputs are logits: float32 `[labels]`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.labels = LabelNames(config)
        if len(self.labels) < 2:
            raise UnsupportedError("This checkpoint has one label: expected two or more, or --task regression.")

    def align(self, splits: "Sequence[Dataset]", columns: Columns) -> LabelMap:
        """Raises `DataError` also where the first split, by which models are judged, has one label only."""
        (column,) = columns["label"]
        found = self.labels.align(splits[0].features[column], distinct(splits, column))
        present = {found(value) for value in distinct(splits[:1], column)}
        if len(splits[0]) > 1 and None not in present:  # a row without a label is told first
            names = found.names or self.labels.names
            check_varied(splits[0], column, [names[label] for label in present if label is not None])
        return found

    def references(self, rows: "Dataset", columns: Columns, alignment: LabelMap) -> list[Any]:
        (column,) = columns["label"]
        return [alignment(value) for value in rows[column]]

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """For two labels, precision, recall and F1 are of label 1; else the mean over labels."""
        labels = len(self.labels)
        several: dict[str, Any] = {"task": "multiclass", "num_classes": labels}
        by_label = {"task": "binary"} if labels == 2 else {**several, "average": "macro"}
        return {
            "accuracy": MeanOf("Accuracy", right),
            "f1": Torchmetric("F1", "f1_score", _answered, **by_label),
            "precision": Torchmetric("Precision", "precision", _answered, **by_label),
            "recall": Torchmetric("Recall", "recall", _answered, **by_label),
            "matthews_correlation": Torchmetric("Matthews correlation", "matthews_corrcoef", _answered, **several),
        }

    def remarks(self, metric: Metric, outputs: Outputs, others: Outputs, references: References) -> list[str]:
        if metric.of_labels:
            return []
        lost = 100 * (1 - self.fidelity(outputs, others))
        return [
            f"INT8 gives another label than FP32 to {lost:.2f} % of these examples: on examples like them its accuracy is "
            f"lower by about {lost:.2f} points at most, whatever is right."
        ]

    def confusion(self, outputs: Outputs, others: Outputs, references: References) -> Confusion | None:
        """Counts by right label and answer, of up to `FEW` labels."""
        count = len(self.labels)
        if count > FEW:
            return None
        tables = []
        for rows in (outputs, others):
            answer, label = _answered(rows, references)
            cells = torch.bincount(label * count + answer, minlength=count**2)
            tables.append(cells.view(count, count).tolist())
        return Confusion(list(self.labels.names), *tables)

    def trivial(self, metric: str, references: References) -> Trivial:
        """Always the most common label."""
        common = int(torch.tensor(references).mode().values)
        constant = torch.nn.functional.one_hot(torch.tensor(common), len(self.labels)).float()
        return Trivial(self.score(metric, [constant] * len(references), references), "answering the most common label")


def right(outputs: Outputs, references: References) -> Tensor:
    """bool `[examples]`: whether the label of the largest logit is the one."""
    given, expected = _answered(outputs, references)
    return given == expected


def in_top_five(outputs: Outputs, references: References) -> Tensor:
    """bool `[examples]`: whether the label is one of those with the five largest logits."""
    logits = stacked(outputs)
    return (logits.topk(min(5, logits.shape[1])).indices == torch.tensor(references)[:, None]).any(1)


def _answered(outputs: Outputs, references: References) -> tuple[Tensor, Tensor]:
    """int64 `[examples]`: the label of the largest logit, and the right one."""
    return stacked(outputs).argmax(1), torch.tensor(references)
