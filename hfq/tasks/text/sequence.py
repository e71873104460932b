"""What tasks share whose model reads one text or a pair, and puts out one row of logits for it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...common.errors import WrongDataError
from ..base import Columns, Encoding, Processor
from ..labels import find_label_column
from .tokens import TextTask, find_texts, texts

if TYPE_CHECKING:
    from datasets import Dataset

# Column pairs in the order their datasets give them to a model (GLUE and its kin).
KNOWN_PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text", "text_pair"),
)


class SequenceTask(TextTask):
    """Columns, tokens and logits; what is right, and how it is judged, is left to each task."""

    auto_class = "AutoModelForSequenceClassification"
    pipeline_tag = "text-classification"
    roles: ClassVar[Mapping[str, str]] = {"text": "a text, or a pair of two columns", "label": "its label"}
    label_columns: ClassVar[tuple[str, ...]] = ("label", "labels")

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        labels = self.find_labels(features, requested.get("label", ()))
        return {"text": self._find_texts(features, requested.get("text", ()), labels), "label": labels}

    def inputs(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        labels = [name for name, kind in features.items() if name in self.label_columns or hasattr(kind, "names")]
        labels += requested.get("label", ())
        return {"text": self._find_texts(features, requested.get("text", ()), labels)}

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> list[Encoding]:
        encoded = self.tokens(processor, *(texts(rows, name) for name in columns["text"]))
        return [{name: encoded[name][row] for name in encoded} for row in range(len(rows))]

    def find_labels(self, features: Mapping[str, Any], requested: Sequence[str]) -> list[str]:
        """The columns of labels, as `find_label_column` finds one."""
        return find_label_column(features, requested, names=self.label_columns, task=self.name)

    def _find_texts(self, features: Mapping[str, Any], requested: Sequence[str], labels: Sequence[str]) -> list[str]:
        if both := [name for name in requested if name in labels]:
            raise WrongDataError(f"--text-column names the column {both[0]!r}, which holds the label and not a text.")
        return find_texts(features, requested, known=KNOWN_PAIRS, without=labels)
