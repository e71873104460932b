"""Text classification: one text or a pair of texts, one label.

Label ids are the model's. How the dataset's labels become them is decided here, once, and said.
"""

import json
import re
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
        return self.ids.get(value)


class TextClassification:
    """Columns, labels and tokens of one checkpoint."""

    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config`: of the checkpoint.

        Raises:
            UnsupportedError: its model does not choose one of several labels, or transformers would not know them.
        """
        problem = config.get("problem_type")
        self.label_names = _label_names(config)
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
                if name == label_column:
                    raise DataError(f"--text-column names the column {name!r}, which holds the label and not a text.")
            if len(requested) > 2:
                raise DataError(f"--text-column was given {len(requested)} times; a model reads one text or a pair.")
            return list(requested)
        texts = [name for name, feature in features.items() if is_text(feature) and name != label_column]
        texts = texts or [name for name, feature in features.items() if _is_mixed(feature) and name != label_column]
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

        Names are matched by name, never by position. Numbers that are no names are the model's own ids.

        Raises:
            DataError: the labels do not fit, or do in two ways; the message holds both sides.
        """
        if dataset_names := list(getattr(feature, "names", None) or []):
            return self._by_name(dict(enumerate(dataset_names)))
        present = [value for value in values if value is not None and value == value]  # NaN is not equal to itself
        labelled = [value for value in present if _as_number(value) != UNLABELLED]
        numbers = {value: _as_number(value) for value in labelled}
        most = len(self.label_names)
        ids = {value: number for value, number in numbers.items() if number is not None and 0 <= number < most}
        for named in (present, labelled):  # a model may call a label "-1"
            found = self._find({value: str(value) for value in named})
            if not found or found == ids:
                continue
            if len(ids) == len(found):
                raise DataError(
                    f"The dataset's labels {named[:20]} are names of the model's labels and ids of others "
                    f"({self._names()}). Write them in words, in both places."
                )
            return LabelMap(found, f"by name ({self._names()})")
        if not labelled or len(ids) < len(labelled):
            raise self._mismatch(sorted(labelled, key=lambda value: (_as_number(value) or 0, str(value))))
        every = {form: i for i in range(most) for form in (i, str(i))}
        return LabelMap({**every, **ids}, f"by id: integers are the model's ids ({self._names()})")

    def _find(self, names: Mapping[Any, str]) -> dict[Any, int]:
        """The ids of labels by their names; nothing if one of them is no name of the model's."""
        key = _key if len(set(map(_key, self.label_names))) == len(self.label_names) else str  # "A" and "a" may differ
        ours = {key(name): i for i, name in enumerate(self.label_names)}
        found = {value: ours[key(name)] for value, name in names.items() if key(name) in ours}
        return found if len(found) == len(names) else {}

    def _by_name(self, names: Mapping[Any, str]) -> LabelMap:
        if found := self._find(names):
            return LabelMap(found, f"by name ({self._names()})")
        if self.label_names == _nameless(len(self.label_names)) and len(names) == len(self.label_names):
            pairs = ", ".join(f"{value}={name}" for value, name in names.items())
            return LabelMap(
                {value: value for value in names},
                f"by position, since the model does not name its labels: taken as {pairs}",
            )
        raise self._mismatch(list(names.values()))

    def _mismatch(self, values: Sequence[Any]) -> DataError:
        return DataError(
            f"The dataset's labels do not fit the model's. Dataset: {list(values)[:20]}; model (id2label): {self._names()}. "
            "Rename the dataset's labels, mend id2label in config.json, or name another column with --label-column."
        )

    def _names(self) -> str:
        return ", ".join(f"{i}={name}" for i, name in enumerate(self.label_names))


def _label_names(config: Mapping[str, Any]) -> list[str]:
    """As transformers reads them: by id2label, else as many as num_labels says, else two. label2id may only name those."""
    given, count = config.get("id2label") or {}, config.get("num_labels")
    names = [str(given[key]) for key in sorted(given, key=int)] or _nameless(2 if count is None else count)
    label2id = config.get("label2id")
    if names != _nameless(len(names)) or not isinstance(label2id, dict):
        return names
    named = {i: str(name) for name, i in label2id.items() if isinstance(i, int)}
    if sorted(named) == list(range(len(names))):
        return [named[i] for i in range(len(names))]
    if not given and count is None and len(label2id) > 2:
        raise UnsupportedError(
            f"config.json names {len(label2id)} labels in label2id alone, and transformers makes two of them without "
            f'id2label. Add "id2label": {json.dumps({str(i): named[i] for i in sorted(named)})[:500]} to config.json.'
        )
    return names


def _nameless(count: int) -> list[str]:
    return [f"LABEL_{i}" for i in range(count)]


def _as_number(value: Any) -> int | None:
    """The whole number that a label is, or is written as: 1, 1.0, "1" and "1.0", but no code such as "01"."""
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9]\d{0,8})(\.0+)?", value.strip()):
        value = float(value)
    whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
    return int(value) if whole else None


def _key(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def is_text(feature: Any) -> bool:
    """Whether a column, by its `datasets` feature, holds strings."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_mixed(feature: Any) -> bool:
    """Whether a column of a JSON file holds several types, of which some may be texts: the others are found by row."""
    from datasets import Json

    return isinstance(feature, Json)


def _require_column(name: str, features: Mapping[str, Any], flag: str) -> None:
    if name not in features:
        raise DataError(f"{flag} {name!r} is not a column of the dataset. Columns: {', '.join(features)}.")
