"""Image embeddings: a vector for each image, judged by whether its nearest neighbour is of the same kind.

As the DINO family is judged (Oquab et al. 2023), with one neighbour: the other images of the split are what an image is
compared with, by cosine.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ...common.errors import DataError
from ..base import Batch, Columns, Metric, Outputs, References, Trivial
from ..labels import UNLABELLED, find_label_column
from ..metrics import MeanOf, stacked
from ..registry import find_architecture
from .pixels import ImageTask

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

AT_ONCE = 1024  # images that are compared with all others at a time


class SameKind:
    """Any labels will do: the model knows none."""

    how = "the dataset's own: an image is right if the nearest of the others has its label"


class ImageEmbedding(ImageTask):
    """Outputs are vectors: float32 `[features]`, what the model pools, else its first token."""

    name = "image-embedding"
    auto_class = "AutoModel"
    pipeline_tag = "image-feature-extraction"

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """An encoder of pixels without a head."""
        return getattr(find_architecture(config), "main_input_name", None) == "pixel_values"

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        seen = self.inputs(features, requested)
        labels = find_label_column(features, requested.get("label", ()), names=self.label_columns, task=self.name)
        return {**seen, "label": labels}

    def align(self, splits: "Sequence[Dataset]", columns: Columns) -> SameKind:
        (column,) = columns["label"]
        if all(len(set(rows[column])) == len(rows) for rows in splits):
            raise DataError(
                f"No two images have the same label in column {column!r}, so that none can be told by its neighbour. Name "
                "another column with --label-column, or --metric fidelity, agreement with FP32."
            )
        return SameKind()

    def references(self, rows: "Dataset", columns: Columns, alignment: SameKind) -> list[Any]:
        (column,) = columns["label"]
        return [None if value in (None, UNLABELLED) else str(value) for value in rows[column]]

    def outputs(self, model: "nn.Module", batch: Batch) -> list[Tensor]:
        found = model(**self.model_inputs(batch))
        pooled = getattr(found, "pooler_output", None)
        if pooled is None:
            state = found.last_hidden_state
            pooled = state.mean((2, 3)) if state.dim() == 4 else state[:, 0]
        return list(pooled.flatten(1).float().unbind())

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        return {"nearest_neighbour_accuracy": MeanOf("Nearest neighbour accuracy", _nearest_alike)}

    def per_example(self, outputs: Outputs, references: References) -> Tensor:
        """bool `[examples]`: whether the nearest of the others has the same label."""
        return _nearest_alike(outputs, references)

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Mean cosine of the vectors of the same image."""
        return cosine_similarity(stacked(outputs), stacked(others)).double().mean().clamp(0, 1).item()

    def remarks(self, metric: Metric, outputs: Outputs, others: Outputs, references: References) -> list[str]:
        """Whether images have the same neighbour."""
        same = nearest(stacked(outputs)) == nearest(stacked(others))
        return [f"Of {same.double().mean():.1%} of the images, the nearest other one is the same."]

    def trivial(self, metric: str, references: References) -> Trivial:
        """Always the most common label."""
        common = max(references.count(label) for label in set(references))
        return Trivial(common / len(references), "answering the most common label")


def nearest(vectors: Tensor) -> Tensor:
    """int64 `[examples]`: for each of `[examples, features]`, which of the others has the largest cosine."""
    vectors = normalize(vectors)
    found = []
    for start in range(0, len(vectors), AT_ONCE):
        alike = vectors[start : start + AT_ONCE] @ vectors.T
        rows = torch.arange(len(alike))
        alike[rows, start + rows] = -torch.inf
        found.append(alike.argmax(1))
    return torch.cat(found)


def _nearest_alike(outputs: Outputs, references: References) -> Tensor:
    return torch.tensor([references[i] == references[j] for i, j in enumerate(nearest(stacked(outputs)).tolist())])
