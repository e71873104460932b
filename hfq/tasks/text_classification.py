"""Single-label text classification: one text or a pair of texts, one label.

Classifiers of natural language inference are such too: they read premise and hypothesis. Where a source's card calls one
a zero-shot classifier, which is what they are mostly used for, so does the card of its INT8 version.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .classification import Classification
from .labels import LabelNames
from .sequence import SequenceTask

ZERO_SHOT = "zero-shot-classification"
_OTHER_PROBLEMS = {"regression": "regression", "multi_label_classification": "multi-label-classification"}


class TextClassification(Classification, SequenceTask):
    """One of several labels for each text."""

    name = "text-classification"
    other_tags: ClassVar[Sequence[str]] = (ZERO_SHOT,)

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        return config.get("problem_type") not in _OTHER_PROBLEMS and len(LabelNames(config)) > 1

    def usage(self, tag: str) -> str:
        """With labels of the user's own, where it is a zero-shot classifier."""
        asked = (
            '\nmodel("I could watch it again", candidate_labels=["praise", "complaint"])' if tag == ZERO_SHOT else ""
        )
        return super().usage(tag) + asked
