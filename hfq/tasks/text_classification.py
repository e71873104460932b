"""Text classification: one text or a pair of texts, one label.

Label ids are the model's. How the dataset's labels become them is decided here, once, and said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, UnsupportedError

# Column pairs in the order their datasets give them to a model (GLUE and its kin).
KNOWN_PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text", "text_pair"),
)
LABEL_COLUMNS = ("label", "labels")
UNLABELLED = -1


@dataclass(frozen=True)
class LabelMap:
    """From a dataset's label values to the model's ids. `how` is said in the log, the report and the card."""

    ids: Mapping[Any, int]
    how: str

    def __call__(self, value: Any) -> int | None:
        """None: the dataset has no label for this example."""
        return None if value is None or value == UNLABELLED else self.ids.get(value)


class TextClassification:
    """Columns, labels and tokens of one checkpoint."""

    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: Mapping[str, Any]) -> None:
        problem = config.get("problem_type")
        names = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
        self.label_names = [str(names[key]) for key in sorted(names, key=int)]
        if problem in ("regression", "multi_label_classification") or len(self.label_names) < 2:
            raise UnsupportedError(
                f"This checkpoint is for {problem or 'regression (one label)'}; hfq measures single-label classification."
            )

    def text_columns(self, features: Mapping[str, Any], requested: Sequence[str], label_column: str) -> list[str]:
        """The columns to read, in order.

        Raises:
            DataError: a requested column does not exist, or the choice is not clear.
        """
        if requested:
            for name in requested:
                _require_column(name, features, "--text-column")
            if len(requested) > 2:
                raise DataError(f"--text-column was given {len(requested)} times; a model reads one text or a pair.")
            return list(requested)
        texts = [name for name, feature in features.items() if _is_text(feature) and name != label_column]
        for pair in KNOWN_PAIRS:
            if set(pair) <= set(texts):
                return list(pair)
        if len(texts) == 1:
            return texts
        raise DataError(
            f"Which columns hold the text is not clear. Columns: {', '.join(features)}; with text: "
            f"{', '.join(texts) or 'none'}. Name them with --text-column, in order."
        )

    def label_column(self, features: Mapping[str, Any], requested: str | None) -> str:
        """The column with the labels.

        Raises:
            DataError: it does not exist, or the choice is not clear.
        """
        if requested:
            _require_column(requested, features, "--label-column")
            return requested
        named = [name for name in LABEL_COLUMNS if name in features]
        classes = [name for name, feature in features.items() if hasattr(feature, "names")]
        if len(named or classes) == 1:
            return (named or classes)[0]
        raise DataError(
            f"Which column holds the label is not clear. Columns: {', '.join(features)}. Name it with --label-column."
        )

    def align(self, feature: Any, values: Sequence[Any]) -> LabelMap:
        """Match a label column, by its `datasets` feature and its distinct `values`, to the model's ids.

        Names are matched by name, never by position. Integers without names are the model's own ids.

        Raises:
            DataError: the labels do not fit; the message holds both sides.
        """
        dataset_names = list(getattr(feature, "names", None) or [])
        values = [value for value in values if value is not None and value != UNLABELLED]
        if dataset_names:
            return self._by_name(dict(enumerate(dataset_names)))
        if all(isinstance(value, bool) for value in values):
            raise self._mismatch(values)
        if all(isinstance(value, int) for value in values):
            if not all(0 <= value < len(self.label_names) for value in values):
                raise self._mismatch(sorted(values))
            ids = {i: i for i in range(len(self.label_names))}
            return LabelMap(ids, f"by id: integers are the model's ids ({self._names()})")
        if all(isinstance(value, str) for value in values):
            return self._by_name({value: value for value in sorted(values)})
        raise self._mismatch(values)

    def _by_name(self, names: Mapping[Any, str]) -> LabelMap:
        key = _key if len(set(map(_key, self.label_names))) == len(self.label_names) else str  # "A" and "a" may differ
        ours = {key(name): i for i, name in enumerate(self.label_names)}
        if all(key(name) in ours for name in names.values()):
            ids = {value: ours[key(name)] for value, name in names.items()}
            return LabelMap(ids, f"by name ({self._names()})")
        generic = all(name == f"LABEL_{i}" for i, name in enumerate(self.label_names))
        if generic and len(names) == len(self.label_names) and all(isinstance(value, int) for value in names):
            pairs = ", ".join(f"{value}={name}" for value, name in names.items())
            return LabelMap(
                {value: value for value in names},
                f"by position, since the model does not name its labels: taken as {pairs}",
            )
        raise self._mismatch(list(names.values()))

    def _mismatch(self, values: Sequence[Any]) -> DataError:
        return DataError(
            f"The dataset's labels do not fit the model's. Dataset: {list(values)[:20]}; model (label2id): {self._names()}. "
            "Rename the dataset's labels, mend label2id in config.json, or name another column with --label-column."
        )

    def _names(self) -> str:
        return ", ".join(f"{i}={name}" for i, name in enumerate(self.label_names))


def _key(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _require_column(name: str, features: Mapping[str, Any], flag: str) -> None:
    if name not in features:
        raise DataError(f"{flag} {name!r} is not a column of the dataset. Columns: {', '.join(features)}.")
