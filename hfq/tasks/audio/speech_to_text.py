"""Speech recognition by models that write their text token by token (Whisper, Radford et al. 2022).

They write as their generation_config.json says. Both texts are compared without what people spell differently, by the
normalizer that comes with Whisper's tokenizer: the English one where only English is written, else the basic one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...common.errors import DataError
from ...common.reading import read_json
from ..base import Batch, Columns, Encoding, Outputs, Processor
from ..stream import Stream
from .recordings import SAMPLES, undecoded, waveform
from .transcripts import Transcription

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

ENGLISH = ("en", "english", "<|en|>")
_SOUND = "sound"


@dataclass(frozen=True)
class Normalization:
    """Texts without what is spelled in more than one way. `spelling`: British words and American ones, for English."""

    english: bool
    spelling: Mapping[str, str]

    @property
    def how(self) -> str:
        return f"texts normalized as Whisper's {'English' if self.english else 'basic'} normalizer does"

    @cached_property
    def normalizer(self) -> Any:
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

        return EnglishTextNormalizer(dict(self.spelling)) if self.english else BasicTextNormalizer()

    def __call__(self, text: str) -> str:
        return " ".join(self.normalizer(text).split())


class SpeechToText(Transcription):
    """What is said. Outputs are the ids of the tokens that were written: int64 `[tokens]`."""

    name = "speech-to-text"
    auto_class = "AutoModelForSpeechSeq2Seq"
    discrete = True

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        return bool(config.get("is_encoder_decoder", True))

    @cached_property
    def normalization(self) -> Normalization:
        """By the checkpoint's tokenizer, and by the one language that its generation_config.json says, if it does."""
        path = (self.folder or Path()) / "generation_config.json"
        settings = read_json(path) if path.is_file() else {}
        only_english = settings.get("is_multilingual") is False or settings.get("language") in ENGLISH
        spelling = getattr(self.tokenizer, "english_spelling_normalizer", None)
        return Normalization(english=only_english and spelling is not None, spelling=spelling or {})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "normalization"}

    def align(self, splits: "Sequence[Dataset]", columns: Columns) -> Normalization:
        return self.normalization

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> Sequence[Encoding]:
        """Waveforms: what the model hears of a recording depends on those beside it, where one is long."""
        (column,) = columns["audio"]
        decode = partial(_sound, column=column, rate=processor.tool.sampling_rate)
        return Stream(undecoded(rows.select_columns([column]), column), decode, what=column)

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        """As transformers' pipeline has it: padded to the model's window, or to the longest if that is longer."""
        tool = processor.tool
        longest = max(encoding[SAMPLES] for encoding in encodings)
        window = getattr(tool, "n_samples", None)
        whole: dict[str, Any] = {} if window and longest <= window else {"truncation": False, "padding": "longest"}
        sounds = [encoding[_SOUND] for encoding in encodings]
        return dict(
            tool(sounds, sampling_rate=tool.sampling_rate, return_tensors="pt", return_attention_mask=True, **whole)
        )

    def calibration_inputs(self, model: "nn.Module", batch: Batch) -> Batch:
        """The decoder sees what the float model writes."""
        written = self._generated(model, batch)
        start = model.generation_config.decoder_start_token_id  # type: ignore[union-attr]
        shifted = torch.nn.functional.pad(written[:, :-1], (1, 0), value=start)  # type: ignore[arg-type]
        inputs = self.model_inputs(batch)
        window = _window(model)
        if window:
            inputs = {name: values[..., :window] for name, values in inputs.items()}
        return {**inputs, "decoder_input_ids": shifted}

    def outputs(self, model: "nn.Module", batch: Batch) -> list[Tensor]:
        return list(self._generated(model, batch).unbind())

    def _generated(self, model: Any, batch: Batch) -> Tensor:
        """int64 `[examples, tokens]`. More than a window is written piece by piece, by timestamps."""
        inputs = self.model_inputs(batch)
        window = _window(model)
        is_long = window is not None and inputs[model.main_input_name].shape[-1] > window
        if is_long and not hasattr(model.generation_config, "no_timestamps_token_id"):
            raise DataError(
                "A recording is longer than what the model hears at once, and generation_config.json has no "
                "no_timestamps_token_id, by which it would write more. Cut the recording, or mend that file."
            )
        long: dict[str, Any] = {"return_timestamps": True} if is_long else {}
        written: Tensor = model.generate(**inputs, **long)
        return written

    def write(self, outputs: Outputs) -> list[str]:
        texts = self.tokenizer.batch_decode([row.tolist() for row in outputs], skip_special_tokens=True)
        return [self.normalization(text) for text in texts]


def _window(model: Any) -> int | None:
    """Frames that Whisper hears at once; None for models that hear any number."""
    from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

    if not isinstance(model, WhisperGenerationMixin):
        return None
    encoder = model.get_encoder()
    return encoder.conv1.stride[0] * encoder.conv2.stride[0] * model.config.max_source_positions


def _sound(row: dict[str, Any], *, column: str, rate: int) -> Encoding:
    found = waveform(row[column], rate)
    return {_SOUND: found, SAMPLES: len(found)}
