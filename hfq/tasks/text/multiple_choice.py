"""Multiple choice: a text and several choices, of which one is right, such as endings of a story.

The model reads each choice after the text and gives it one number. Of two columns of text the second begins each choice,
as in SWAG (Zellers et al. 2018) and in transformers' example: the pair is (sent1, sent2 + ending).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...common.errors import DataError, WrongDataError
from ..base import Batch, Columns, Encoding, Metric, Processor, References, Trivial, require_columns
from ..classification import Choice, right
from ..labels import find_label_column
from ..metrics import MeanOf
from .tokens import TextTask, find_texts, is_mixed, is_text, texts

if TYPE_CHECKING:
    from datasets import Dataset

KNOWN_TEXTS = (
    ("sent1", "sent2"),
    ("context", "question"),
    ("article", "question"),
    ("ctx",),
    ("question",),
    ("goal",),
    ("premise",),
    ("sentence",),
    ("text",),
)
KNOWN_CHOICES = ("choices", "endings", "options")
KNOWN_LABELS = ("label", "labels", "answer", "answerKey", "gold")
_NUMBERED = re.compile(r"(ending|choice|option|sol|answer)_?(\d)")
_LETTERS = "ABCDEFGHIJ"
_UNLABELLED = (None, "", -1, "-1")


@dataclass(frozen=True)
class Places:
    """How labels say which choice is right. `names`: of the choices, in order."""

    how: str
    names: Sequence[str]


class MultipleChoice(Choice, TextTask):
    """One of several choices. Outputs are float32 `[choices]`."""

    name = "multiple-choice"
    auto_class = "AutoModelForMultipleChoice"
    pipeline_tag = "multiple-choice"
    roles: ClassVar[Mapping[str, str]] = {
        "text": "what the choices follow; of two columns the second begins each choice",
        "choices": "a list of texts, or a column for each",
        "label": "the right one: its place, from 0 or from 1, or its letter",
    }

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        inputs = self.inputs(features, requested)
        rest = {name: kind for name, kind in features.items() if name not in chain(*inputs.values())}
        named = next(([name] for name in KNOWN_LABELS if name in rest), [])
        labels = find_label_column(features, requested.get("label") or named, names=(), task=self.name)
        return {**inputs, "label": labels}

    def inputs(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        choices = _find_choices(features, requested.get("choices", ()))
        what = "the text before the choices"
        found = find_texts(features, requested.get("text", ()), known=KNOWN_TEXTS, without=choices, what=what)
        return {"text": found, "choices": choices}

    def align(self, splits: Sequence["Dataset"], columns: Columns) -> Places:
        (column,) = columns["label"]
        choices = len(_choices(splits[0], columns["choices"])[0]) if len(splits[0]) else 0
        names = getattr(splits[0].features[column], "names", None)
        values = [value for rows in splits for value in rows[column] if value not in _UNLABELLED]
        found = {str(names[value] if names else value).strip() for value in values}
        places = {
            "places from 0": [str(place) for place in range(choices)],
            "places from 1": [str(place + 1) for place in range(choices)],
            "letters": list(_LETTERS[:choices]),
        }
        for how, names_of in places.items():
            if found and {value.upper() for value in found} <= {*names_of}:
                return Places(f"{how}, of {choices} choices", names_of)
        raise DataError(
            f"Column {column!r} holds {sorted(found)[:20]}, and there are {choices} choices. Expected the place of the right "
            f"one (0 to {choices - 1}, or 1 to {choices}), or its letter (A to {_LETTERS[choices - 1]}). Name another column with "
            "--label-column."
        )

    def references(self, rows: "Dataset", columns: Columns, alignment: Places) -> list[Any]:
        (column,) = columns["label"]
        names = getattr(rows.features[column], "names", None)
        found: list[int | None] = []
        for row, value in enumerate(rows[column]):
            text = "" if value in _UNLABELLED else str(names[value] if names else value).strip()
            if text and text.upper() not in alignment.names:
                raise DataError(
                    f"Row {row} (from 0) has {value!r} in column {column!r}; expected one of {', '.join(alignment.names)}."
                )
            found.append(alignment.names.index(text.upper()) if text else None)
        return found

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> list[Encoding]:
        choices = _choices(rows, columns["choices"])
        first, *second = (texts(rows, name) for name in columns["text"])
        begun = second[0] if second else [""] * len(rows)
        befores = [text for text, several in zip(first, choices, strict=True) for _ in several]
        afters = [
            f"{begin} {choice}".strip() for begin, several in zip(begun, choices, strict=True) for choice in several
        ]
        encoded = self.tokens(processor, befores, afters)
        each = len(choices[0])
        return [
            {name: encoded[name][start : start + each] for name in encoded} for start in range(0, len(befores), each)
        ]

    def length(self, encoding: Encoding) -> int:
        return max(map(len, encoding["input_ids"]))

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        """Tokens of each choice: `[examples, choices, length]`."""
        flat = [{name: row[name][i] for name in row} for row in encodings for i in range(len(row["input_ids"]))]
        return {
            name: rows.unflatten(0, (len(encodings), -1)) for name, rows in super().collate(flat, processor).items()
        }

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        return {"accuracy": MeanOf("Accuracy", right)}

    def trivial(self, metric: str, references: References) -> Trivial:
        """Always the choice in the place where it is most often right."""
        places = torch.tensor(references)
        place = int(places.mode().values)
        return Trivial((places == place).double().mean().item(), f"taking choice {place + 1}")

    def usage(self, tag: str) -> str:
        """transformers has no pipeline for it."""
        return (
            "from transformers import AutoModelForMultipleChoice, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("{model}")\n'
            'model = AutoModelForMultipleChoice.from_pretrained("{model}")\n'
            'question, choices = "What do bees make?", ["Honey.", "Bread."]\n'
            'tokens = tokenizer([question] * 2, choices, padding=True, return_tensors="pt")\n'
            "print(choices[model(**{name: rows[None] for name, rows in tokens.items()}).logits.argmax()])"
        )


def _find_choices(features: Mapping[str, Any], requested: Sequence[str]) -> list[str]:
    if requested:
        require_columns(requested, features, "--column choices=")
        return list(requested)
    numbered: dict[str, list[str]] = {}
    for name, kind in features.items():
        if (match := _NUMBERED.fullmatch(name)) and (is_text(kind) or is_mixed(kind)):
            numbered.setdefault(match[1], []).append(name)
    several = [sorted(names) for names in numbered.values() if len(names) > 1]
    lists = [[name] for name in KNOWN_CHOICES if name in features]
    found = lists or several
    if len(found) == 1:
        return found[0]
    raise WrongDataError(
        f"Which columns hold the choices is not clear. Columns: {', '.join(features)}. Name one with lists, or one for each "
        "choice, with --column choices=…"
    )


def _choices(rows: "Dataset", columns: Sequence[str]) -> list[list[str]]:
    """The choices of each row, as many in every row.

    Raises:
        DataError: a row has others, or holds something else.
    """
    if len(columns) > 1:
        return [
            list(row) for row in zip(*(texts(rows, name, flag="--column choices=") for name in columns), strict=True)
        ]
    (column,) = columns
    found = []
    for row, value in enumerate(rows[column]):
        several = value.get("text") if isinstance(value, dict) else value  # with their letters, as in CommonsenseQA
        if not isinstance(several, list) or len(several) < 2 or not all(isinstance(choice, str) for choice in several):
            raise DataError(
                f"Row {row} (from 0) has {str(value)[:100]!r} in column {column!r}; expected a list of two or more texts."
            )
        found.append(several)
        if len(several) != len(found[0]):
            raise DataError(
                f"Row {row} (from 0) has {len(several)} choices in column {column!r}, and row 0 has {len(found[0])}. Expected "
                "as many in every row."
            )
    return found
