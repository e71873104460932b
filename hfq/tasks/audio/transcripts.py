"""What tasks share that write what is said: texts, and error rates of words and characters."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...common.errors import DataError
from ..base import Columns, Metric, Outputs, References, SumMetric, Task, Trivial, find_column
from ..text.tokens import is_text
from .recordings import AudioTask

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = ("text", "sentence", "transcription", "transcript", "normalized_text")


class ErrorRate(SumMetric):
    """Edits from what was written to what was said, by what was said: of words, or of characters. May exceed one."""

    higher_is_better = False

    def __init__(self, task: "Transcription", unit: str) -> None:
        self.task = task
        self.unit = unit
        self.label = f"{unit.capitalize()} error rate"

    def numbers(self, outputs: Outputs, references: References) -> Tensor:
        """Edits, and units that were said: `[examples, 2]`, for rates of sets are of their sums."""
        from torchmetrics.functional.text import char_error_rate, word_error_rate

        rate = word_error_rate if self.unit == "word" else char_error_rate
        rows = []
        for written, said in zip(self.task.write(outputs), references, strict=True):
            units = len(said.split()) if self.unit == "word" else len(said)
            rows.append([round(float(rate([written], [said])) * units), units])
        return torch.tensor(rows, dtype=torch.float64)

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]


class Transcription(AudioTask):
    """What is said in a recording. How outputs become texts, and texts comparable, each kind of model says itself."""

    pipeline_tag = "automatic-speech-recognition"
    roles: ClassVar[Mapping[str, str]] = {"audio": "a recording", "text": "what is said in it"}
    label_role = "text"

    folder: Path | None = None

    @abstractmethod
    def write(self, outputs: Outputs) -> list[str]:
        """The text of each example, as its reference is spelled."""

    def bound(self, folder: Path) -> Task:
        self.folder = folder
        return self

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's.

        Raises:
            DataError: it has none.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except Exception as error:  # transformers raises many types for one cause: there is none
            raise DataError(
                f"The tokenizer of {self.folder} cannot be loaded, which writes what the model hears: {error}. Save it there."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """Without the tokenizer, which another process loads itself."""
        return {name: value for name, value in vars(self).items() if name != "tokenizer"}

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        heard = self.inputs(features, requested)
        held = [name for name, feature in features.items() if is_text(feature)]
        known = [name for name in TEXTS if name in held]
        asked, flag = requested.get("text", ()), "--label-column"
        return {**heard, "text": find_column(features, asked, known=known, held=held, what="what is said", flag=flag)}

    def references(self, rows: "Dataset", columns: Columns, alignment: Any) -> list[Any]:
        """What is said, as the model writes. None where nothing is left of it."""
        (column,) = columns["text"]
        return [(alignment(text) or None) if isinstance(text, str) else None for text in rows[column]]

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        return {"wer": ErrorRate(self, "word"), "cer": ErrorRate(self, "character")}

    def per_example(self, outputs: Outputs, references: References) -> Tensor:
        """bool `[examples]`: whether every word is right."""
        return torch.tensor([a == b for a, b in zip(self.write(outputs), references, strict=True)])

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Share of characters that stay, from one text to the other."""
        from torchmetrics.functional.text import char_error_rate

        first, second = self.write(outputs), self.write(others)
        if not any(first):
            return float(not any(second))
        return max(0.0, 1 - float(char_error_rate(second, first)))

    def trivial(self, metric: str, references: References) -> Trivial:
        """Always writing nothing."""
        return Trivial(1.0, "writing nothing")
