"""Image classification: one image, one of several labels."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from ..base import Columns, Metric
from ..classification import Classification, in_top_five
from ..labels import find_label_column
from ..metrics import MeanOf
from .pixels import ImageTask


class ImageClassification(Classification, ImageTask):
    """One of several labels for each image."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
    pipeline_tag = "image-classification"
    example: ClassVar[Mapping[str, Any]] = {"num_labels": 1000}

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        seen = self.inputs(features, requested)
        labels = find_label_column(features, requested.get("label", ()), names=self.label_columns, task=self.name)
        return {**seen, "label": labels}

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """As for text; with more than five labels also whether the right one is among the first five."""
        top_five = {"top5_accuracy": MeanOf("Top-5 accuracy", in_top_five)} if len(self.labels) > 5 else {}
        return {**super().metrics, **top_five}
