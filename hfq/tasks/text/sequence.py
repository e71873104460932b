"""What tasks share whose model reads one text or a pair, and puts out one row of logits for it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...common.errors import DataError
from ..base import Columns, Encoding, Processor, require_column
from ..labels import find_label_column
from .tokens import TextTask, is_mixed, is_text, known_texts, texts

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
        if requested:
            for name in requested:
                require_column(name, features, "--text-column")
                if name in labels:
                    raise DataError(f"--text-column names the column {name!r}, which holds the label and not a text.")
            if len(requested) > 2:
                raise DataError(f"--text-column was given {len(requested)} times; a model reads one text or a pair.")
            return list(requested)
        if pair := known_texts(features, KNOWN_PAIRS, without=labels):
            return pair
        found = [name for name, feature in features.items() if is_text(feature) and name not in labels]
        found = found or [name for name, feature in features.items() if is_mixed(feature) and name not in labels]
        if len(found) == 1:
            return found
        raise DataError(
            f"Which columns hold the text is not clear. Columns: {', '.join(features)}; with text: "
            f"{', '.join(found) or 'none'}. Name them with --text-column, in order."
        )
