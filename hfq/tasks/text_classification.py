"""Single-label text classification: one text or a pair of texts, one label."""

from collections.abc import Mapping
from typing import Any

from .classification import Classification
from .labels import LabelNames
from .sequence import SequenceTask

_OTHER_PROBLEMS = {"regression": "regression", "multi_label_classification": "multi-label-classification"}


class TextClassification(Classification, SequenceTask):
    """One of several labels for each text."""

    name = "text-classification"

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        return config.get("problem_type") not in _OTHER_PROBLEMS and len(LabelNames(config)) > 1
