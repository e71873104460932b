"""Speech recognition by CTC: a recording, and the text that is spoken (Graves et al. 2006).

The text is read off greedily: the likeliest token of each frame, repetitions and blanks left out, as transformers'
pipeline does without a language model. Models that write their text token by token (Whisper) are not here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...common.errors import DataError
from ..base import Batch, Columns, Metric, Outputs, References, SumMetric, Task, Trivial, require_column
from ..text.tokens import is_text
from .recordings import AudioTask

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

TEXTS = ("text", "sentence", "transcription", "transcript", "normalized_text")


@dataclass(frozen=True)
class Spelling:
    """How texts are brought to what the model can write: its case, and the characters of its vocabulary."""

    upper: bool
    lower: bool
    characters: frozenset[str]

    @property
    def how(self) -> str:
        case = "in upper case, " if self.upper else "in lower case, " if self.lower else ""
        return f"texts {case}without characters that the model does not write"

    def __call__(self, text: str) -> str:
        cased = text.upper() if self.upper else text.lower() if self.lower else text
        kept = "".join(
            letter if letter in self.characters else " " if letter in "-\u2010\u2013\u2014/" else "" for letter in cased
        )
        return " ".join(kept.split())


class ErrorRate(SumMetric):
    """Edits from what was written to what was said, by what was said: of words, or of characters. May exceed one."""

    higher_is_better = False

    def __init__(self, task: "SpeechRecognition", unit: str) -> None:
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


class SpeechRecognition(AudioTask):
    """What is said. Outputs are logits float32 `[frames, tokens]`, of the frames of the recording and none of its padding."""

    name = "speech-recognition"
    auto_class = "AutoModelForCTC"
    pipeline_tag = "automatic-speech-recognition"
    roles: ClassVar[Mapping[str, str]] = {"audio": "a recording", "text": "what is said in it"}
    label_role = "text"

    folder: Path | None = None

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
        named = requested.get("text", ())
        for name in named:
            require_column(name, features, "--label-column")
        found = list(named) or [name for name in TEXTS if name in features and is_text(features[name])][:1]
        found = found or [name for name, feature in features.items() if is_text(feature)]
        if len(found) != 1:
            raise DataError(
                f"Which column holds what is said is not clear. Columns: {', '.join(features)}. Name it with --label-column."
            )
        return {**heard, "text": found}

    def align(self, splits: "Sequence[Dataset]", columns: Columns) -> Spelling:
        tokenizer = self.tokenizer
        space = getattr(tokenizer, "word_delimiter_token", None) or " "
        single = {
            token for token in tokenizer.get_vocab() if len(token) == 1 and token not in tokenizer.all_special_tokens
        }
        letters = {token for token in single if token.upper() != token.lower()}
        characters = frozenset((single - {space}) | {" "})
        if not single - {space}:
            raise DataError(
                f"The vocabulary of {self.folder} has no single characters, of which texts are spelled here. Expected a CTC "
                "model that writes letters."
            )
        return Spelling(
            upper=bool(letters) and all(letter == letter.upper() for letter in letters),
            lower=bool(letters) and all(letter == letter.lower() for letter in letters),
            characters=characters,
        )

    def references(self, rows: "Dataset", columns: Columns, alignment: Spelling) -> list[Any]:
        """What is said, as the model writes. None where nothing is left of it."""
        (column,) = columns["text"]
        return [(alignment(text) or None) if isinstance(text, str) else None for text in rows[column]]

    def outputs(self, model: "nn.Module", batch: Batch) -> list[Tensor]:
        logits = model(**self.model_inputs(batch)).logits.float()
        frames = _frames(model, batch["labels"].cpu(), logits.shape[1])
        return [row[:count] for row, count in zip(logits, frames, strict=True)]

    def write(self, outputs: Outputs) -> list[str]:
        """The text of each example."""
        return [self.tokenizer.decode(logits.argmax(-1)) for logits in outputs]

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


def _frames(model: "nn.Module", samples: Tensor, most: int) -> list[int]:
    """Of each recording, those that its samples make; all where the model does not say."""
    count = getattr(model, "_get_feat_extract_output_lengths", None)
    return [min(most, int(frames)) for frames in count(samples)] if count else [most] * len(samples)
