"""Audio classification: one recording, one of several labels."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..base import Batch, Columns
from ..classification import Classification
from ..labels import find_label_column
from .recordings import AudioTask

if TYPE_CHECKING:
    from torch import Tensor, nn


class AudioClassification(Classification, AudioTask):
    """One of several labels for each recording."""

    name = "audio-classification"
    auto_class = "AutoModelForAudioClassification"
    pipeline_tag = "audio-classification"

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        labels = find_label_column(
            features, requested.get("label", ()), names=("label", "labels", "intent_class"), task=self.name
        )
        return {**self.inputs(features, requested), "label": labels}

    def outputs(self, model: "nn.Module", batch: Batch) -> list["Tensor"]:
        """Logits: float32 `[labels]` for each recording."""
        heard = {name: value for name, value in batch.items() if name != "labels"}
        return list(model(**heard).logits.float().unbind())
