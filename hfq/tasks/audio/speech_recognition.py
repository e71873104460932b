"""Speech recognition by CTC: a recording, and the text that is spoken (Graves et al. 2006).

The text is read off greedily: the likeliest token of each frame, repetitions and blanks left out, as transformers'
pipeline does without a language model. Models that write their text token by token are in `speech_to_text.py`.

A recording of more than a minute is heard in windows that overlap, as by that pipeline with `chunk_length_s=30`: of each,
the frames that have seconds around them count.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...common.errors import DataError
from ..base import Batch, Columns, Encoding, Outputs, Processor
from ..stream import Stream
from .recordings import extracted, undecoded, waveform
from .transcripts import Transcription

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

LONGEST = 60  # seconds that are heard at once
WINDOW, STRIDE = 30, 5  # seconds of a window, and of it that the windows on each side hear too
_WINDOWS = "windows"


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


class SpeechRecognition(Transcription):
    """What is said. Outputs are logits float32 `[frames, tokens]`, of the frames of the recording and none of its padding."""

    name = "speech-recognition"
    auto_class = "AutoModelForCTC"

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

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> Sequence[Encoding]:
        (column,) = columns["audio"]
        frame = math.prod(self.config.get("conv_stride") or [1])  # samples
        decode = partial(_heard, column=column, tool=processor.tool, frame=frame, least=self.least_samples)
        return Stream(undecoded(rows.select_columns([column]), column), decode, what=column)

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        """What the extractor makes of windows: `[examples, windows, …]`; `labels`: the samples of each, 0 for none."""
        counts = torch.tensor([len(encoding[_WINDOWS]) for encoding in encodings])
        there = torch.arange(int(counts.max())) < counts[:, None]
        flat = super().collate([window for encoding in encodings for window in encoding[_WINDOWS]], processor)
        return {name: _by_example(rows, there) for name, rows in flat.items()}

    def model_inputs(self, batch: Batch) -> Batch:
        """All windows, one after the other."""
        there = batch["labels"] > 0
        return {name: rows[there] for name, rows in super().model_inputs(batch).items()}

    def calibration_inputs(self, model: "nn.Module", batch: Batch) -> Batch:
        """The first windows."""
        return self.model_inputs({name: rows[:, :1] for name, rows in batch.items()})

    def outputs(self, model: "nn.Module", batch: Batch) -> list[Tensor]:
        samples, inputs = batch["labels"], self.model_inputs(batch)
        windows: list[Tensor] = []
        for start in range(0, int((samples > 0).sum()), len(samples)):
            part = {name: rows[start : start + len(samples)] for name, rows in inputs.items()}
            logits = model(**part).logits.float()
            heard = samples[samples > 0][start : start + len(samples)].cpu()
            windows += [row[:count] for row, count in zip(logits, _frames(model, heard, logits.shape[1]), strict=True)]
        counts = (samples > 0).sum(1).tolist()
        rows = iter(windows)
        return [_joined([next(rows) for _ in range(count)]) for count in counts]

    def write(self, outputs: Outputs) -> list[str]:
        """The text of each example."""
        return [self.tokenizer.decode(logits.argmax(-1)) for logits in outputs]


def _frames(model: "nn.Module", samples: Tensor, most: int) -> list[int]:
    """Of each recording, those that its samples make; all where the model does not say."""
    count = getattr(model, "_get_feat_extract_output_lengths", None)
    return [min(most, int(frames)) for frames in count(samples)] if count else [most] * len(samples)


def _heard(row: dict[str, Any], *, column: str, tool: Any, frame: int, least: int) -> Encoding:
    sound = waveform(row[column], tool.sampling_rate, least=least)
    return {_WINDOWS: [extracted(window, tool) for window in _windows(sound, tool.sampling_rate, frame)]}


def _windows(sound: Any, rate: int, frame: int) -> Iterator[Any]:
    """A recording, or where it is long its windows, each as many samples as make whole frames."""
    if len(sound) <= LONGEST * rate:
        yield sound
        return
    size, stride = (round(seconds * rate / frame) * frame for seconds in (WINDOW, STRIDE))
    for start in range(0, len(sound) - stride, size - 2 * stride):
        yield sound[start : start + size]
        if start + size >= len(sound):
            return


def _joined(windows: list[Tensor]) -> Tensor:
    """Logits `[frames, tokens]` of a recording, of those `[frames, tokens]` of its windows."""
    if len(windows) == 1:
        return windows[0]
    edge = round(len(windows[0]) * STRIDE / WINDOW)
    last = len(windows) - 1
    cut = [row[edge if i else 0 : None if i == last else len(row) - edge] for i, row in enumerate(windows)]
    return torch.cat(cut)


def _by_example(rows: Tensor, there: Tensor) -> Tensor:
    """Of windows `[n, …]` to `[examples, windows, …]`, zero where `there` is not."""
    found = rows.new_zeros((*there.shape, *rows.shape[1:]))
    found[there] = rows
    return found
