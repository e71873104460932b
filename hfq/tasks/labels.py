"""The labels that a model gives, and how a dataset's become them: decided here, once, and said.

Label ids are the model's. Names are matched by name, never by position.
"""

import json
import re
import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..common.errors import DataError, UnsupportedError, WrongDataError
from .base import require_columns

if TYPE_CHECKING:
    from datasets import Dataset

UNLABELLED = -1
WITHOUT_LABELS = "where there is none, --metric fidelity asks for agreement with FP32"


@dataclass(frozen=True)
class LabelMap:
    """From a dataset's label values to the model's ids. `names`: of the ids, by the dataset where the model has none."""

    ids: Mapping[Any, int]
    how: str
    names: Sequence[str] = ()

    def __call__(self, value: Any) -> int | None:
        """None: the dataset has no label for this example."""
        return self.ids.get(value) if isinstance(value, Hashable) else None


def count_labels(config: Mapping[str, Any], *, default: int = 2) -> int:
    """How many labels a model gives, as transformers reads its config: those of id2label, else num_labels, else two."""
    count = config.get("num_labels")
    return len(config.get("id2label") or ()) or (default if count is None else count)


class LabelNames:
    """The labels of one model, in the order of their ids."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """As transformers reads them: by id2label, else as many as num_labels says, else two. label2id may only name those.

        Raises:
            UnsupportedError: transformers would not know them.
        """
        given, count = config.get("id2label") or {}, config.get("num_labels")
        numbers = sorted(map(int, given))
        if numbers != list(range(len(given))):
            raise UnsupportedError(
                f"id2label in config.json numbers its {len(given)} labels {numbers[:20]}; expected 0 to {len(given) - 1}, as "
                "the model's outputs are numbered. Mend id2label."
            )
        self.names = [str(given[key]) for key in sorted(given, key=int)] or _nameless(count_labels(config))
        label2id = config.get("label2id")
        if self.names != _nameless(len(self.names)) or not isinstance(label2id, dict):
            return
        named = {i: str(name) for name, value in label2id.items() if (i := _as_number(value)) is not None}
        if sorted(named) == list(range(len(self.names))):
            self.names = [named[i] for i in range(len(self.names))]
        elif not given and count is None and len(label2id) > 2:
            raise UnsupportedError(
                f"config.json names {len(label2id)} labels in label2id alone, and transformers makes two of them without "
                f'id2label. Add "id2label": {json.dumps({str(i): named[i] for i in sorted(named)})[:500]} to config.json.'
            )

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return ", ".join(f"{i}={name}" for i, name in enumerate(self.names))

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
        ids = {value: n for value, n in numbers.items() if n is not None and n in range(len(self.names))}
        for named in (present, labelled):  # a model may call a label "-1"
            found = self._find({value: str(value) for value in named})
            if not found or found == ids:
                continue
            if len(ids) == len(found):
                raise DataError(
                    f"The dataset's labels {named[:20]} are names of the model's labels and ids of others "
                    f"({self}). Write them in words, in both places."
                )
            return LabelMap(found, f"by name ({self})", self.names)
        if not labelled:
            raise DataError(
                f"No example has a label, and the model's are {self}. Choose another split, or name another column with "
                f"--label-column; {WITHOUT_LABELS}."
            )
        if len(ids) < len(labelled):
            raise self._mismatch(sorted(labelled, key=lambda value: (_as_number(value) or 0, str(value))))
        every = {form: i for i in range(len(self.names)) for form in (i, str(i))}
        return LabelMap({**every, **ids}, f"by id: integers are the model's ids ({self})", self.names)

    def _find(self, names: Mapping[Any, str]) -> dict[Any, int]:
        """The ids of labels by their names; nothing if one of them is no name of the model's."""
        key = plain if len(set(map(plain, self.names))) == len(self.names) else str  # "A" and "a" may differ
        ours = {key(name): i for i, name in enumerate(self.names)}
        found = {value: ours[key(name)] for value, name in names.items() if key(name) in ours}
        return found if len(found) == len(names) else {}

    def _by_name(self, names: Mapping[Any, str]) -> LabelMap:
        if found := self._find(names):
            return LabelMap(found, f"by name ({self})", self.names)
        if self.names == _nameless(len(self.names)) and len(names) == len(self.names):
            pairs = ", ".join(f"{value}={name}" for value, name in names.items())
            return LabelMap(
                {value: value for value in names},
                f"by position, since the model does not name its labels: taken as {pairs}",
                list(names.values()),
            )
        raise self._mismatch(list(names.values()))

    def _mismatch(self, values: Sequence[Any]) -> DataError:
        return DataError(
            f"The dataset's labels do not fit the model's. Dataset: {list(values)[:20]}; model (id2label): {self}. "
            "Rename the dataset's labels, mend id2label in config.json, or name another column with --label-column."
        )


def find_label_column(
    features: Mapping[str, Any], requested: Sequence[str], *, names: Sequence[str], task: str
) -> list[str]:
    """The column of labels: the one asked for, one called by one of `names`, or the only one of classes.

    Raises:
        WrongDataError: it does not exist, or the choice is not clear.
    """
    if requested:
        require_columns(requested, features, "--label-column")
        if len(requested) > 1:
            raise WrongDataError(f"{len(requested)} label columns were given; {task} reads one.")
        return list(requested)
    named = [name for name in names if name in features]
    classes = [name for name, feature in features.items() if hasattr(feature, "names")]
    found = named or classes
    if len(found) == 1:
        return found
    raise WrongDataError(
        f"Which column holds the label is not clear. Columns: {', '.join(features)}. Name it with --label-column; "
        f"{WITHOUT_LABELS}."
    )


def distinct(splits: "Sequence[Dataset]", column: str) -> list[Any]:
    """The values of a column of labels, in some splits.

    Raises:
        DataError: they are no single labels.
    """
    from datasets import ClassLabel, Json, Value

    values: set[Any] = set()
    for rows in splits:
        kind = rows.features[column]
        if isinstance(kind, Json):  # of several types, which datasets keeps as they are
            values |= {value if isinstance(value, Hashable) else str(value) for value in rows[column]}
        elif isinstance(kind, ClassLabel | Value):
            values |= set(rows.unique(column))
        else:
            raise DataError(
                f"Column {column!r} holds {kind}, and not one label for each example. If the checkpoint gives any number "
                "of labels, pass --task multi-label-classification; else name another column with --label-column."
            )
    return sorted(values, key=str)


def check_plain(labels: Iterable[Any], column: str, *, expected: str) -> None:
    """Refuse lists and objects where a label stands.

    Raises:
        DataError: naming the first.
    """
    odd = next((label for label in labels if not isinstance(label, Hashable)), None)
    if odd is not None:
        raise DataError(
            f"Column {column!r} holds {str(odd)[:100]} where a label is expected. Expected {expected}. Mend it, or name another "
            "column with --label-column."
        )


def check_varied(rows: "Dataset", column: str, labels: Iterable[Any]) -> None:
    """Refuse a split, by which models are judged, whose `labels` are all the same. None is no label.

    Raises:
        DataError: they are.
    """
    found = {label for label in labels if label is not None}
    if len(found) == 1:
        raise DataError(
            f"Every label of split {str(rows.split or 'given')!r} is {found.pop()!r} (column {column!r}): answering that is "
            "always right, and nothing is told apart. Choose another split, or name another column with --label-column; or "
            "--metric fidelity asks for agreement with FP32."
        )


def plain(name: str) -> str:
    """A name without what people write differently in it, and with each accented letter in one of its two encodings."""
    return unicodedata.normalize("NFC", name).strip().lower().replace(" ", "_").replace("-", "_")


def _nameless(count: int) -> list[str]:
    return [f"LABEL_{i}" for i in range(count)]


def _as_number(value: Any) -> int | None:
    """The whole number that a label is, or is written as: 1, 1.0, "1" and "1.0", but no code such as "01"."""
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9]\d{0,8})(\.0+)?", value.strip()):
        value = float(value)
    whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
    return int(value) if whole else None
