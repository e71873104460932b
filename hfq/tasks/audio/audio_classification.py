"""Audio classification: one recording, one of several labels."""

from collections.abc import Mapping
from typing import Any

from ..base import Columns
from ..classification import Classification
from ..labels import find_label_column
from .recordings import AudioTask


class AudioClassification(Classification, AudioTask):
    """One of several labels for each recording."""

    name = "audio-classification"
    auto_class = "AutoModelForAudioClassification"
    pipeline_tag = "audio-classification"

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        heard = self.inputs(features, requested)
        labels = find_label_column(
            features, requested.get("label", ()), names=("label", "labels", "intent_class"), task=self.name
        )
        return {**heard, "label": labels}
