"""Single-label text classification: one text or a pair of texts, one label.

Classifiers of natural language inference are such too: they read premise and hypothesis. Where a source's card calls one
a zero-shot classifier, which is what they are mostly used for, so does the card of its INT8 version.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..base import Columns
from ..classification import Classification
from ..labels import LabelMap, LabelNames, distinct, plain
from .sequence import SequenceTask

if TYPE_CHECKING:
    from datasets import Dataset

ZERO_SHOT = "zero-shot-classification"
NO_ENTAILMENT = ("neutral", "contradiction")  # which classifiers of two labels have as one
_OTHER_PROBLEMS = {"regression": "regression", "multi_label_classification": "multi-label-classification"}


class TextClassification(Classification, SequenceTask):
    """One of several labels for each text."""

    name = "text-classification"
    other_tags: ClassVar[Sequence[str]] = (ZERO_SHOT,)

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        return config.get("problem_type") not in _OTHER_PROBLEMS and len(LabelNames(config)) > 1

    def align(self, splits: "Sequence[Dataset]", columns: Columns) -> LabelMap:
        """Also from three labels of inference to the two of a model that has not_entailment."""
        (column,) = columns["label"]
        ours = [plain(name) for name in self.labels.names]
        names = getattr(splits[0].features[column], "names", None)
        given = dict(enumerate(names or [])) or {value: str(value) for value in distinct(splits, column)}
        theirs = {value: plain(name) for value, name in given.items()}
        if set(ours) != {"entailment", "not_entailment"} or not set(NO_ENTAILMENT) & {*theirs.values()}:
            return super().align(splits, columns)
        merged = {value: "not_entailment" if name in NO_ENTAILMENT else name for value, name in theirs.items()}
        if not {*merged.values()} <= {*ours}:
            return super().align(splits, columns)
        ids = {value: ours.index(name) for value, name in merged.items()}
        return LabelMap(ids, f"by name, neutral and contradiction as not_entailment ({self.labels})", self.labels.names)

    def usage(self, tag: str) -> str:
        """With labels of the user's own, where it is a zero-shot classifier."""
        asked = (
            '\nmodel("I could watch it again", candidate_labels=["praise", "complaint"])' if tag == ZERO_SHOT else ""
        )
        return super().usage(tag) + asked
