"""What tasks on sound share: the checkpoint's own feature extractor, and recordings decoded by libsndfile.

`datasets` decodes with torchcodec, which needs FFmpeg's libraries on the machine; libsndfile comes in a wheel, and reads
WAV, FLAC, Ogg and MP3.
"""

import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ...common.errors import UnsupportedError, UsageError
from ..base import Batch, Columns, Encoding, Processor, Task
from ..stream import Stream, find_file_column

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

    from ...source.checkpoint import Checkpoint

SAMPLES = "samples"  # of a recording, at the model's rate: an encoding says it beside what the model takes


class AudioTask(Task):
    """One whose model hears recordings: waveforms float32 `[samples]`, or what its feature extractor makes of them."""

    roles: ClassVar[Mapping[str, str]] = {"audio": "a recording", "label": "its label"}
    text_role = "audio"

    def processor(self, checkpoint: "Checkpoint", *, max_length: int | None, trust_remote_code: bool) -> Processor:
        from ...source.model import load_feature_extractor  # imports torch

        if max_length is not None:
            raise UsageError(f"--max-length is in tokens, and {self.name} reads recordings. Leave it out.")
        require_decoder()
        return Processor(load_feature_extractor(checkpoint, trust_remote_code=trust_remote_code))

    def inputs(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        from datasets import Audio

        named = requested.get("audio", ())
        return {"audio": find_file_column(features, named, kind=Audio, role="audio", what="recording")}

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> Sequence[Encoding]:
        (column,) = columns["audio"]
        rows = undecoded(rows.select_columns([column]), column)
        decode = partial(_features, column=column, tool=processor.tool, least=self.least_samples)
        return Stream(rows, decode, what=column)

    @property
    def least_samples(self) -> int:
        """What a model that hears waveforms makes one frame of: its convolutions see so many."""
        least = hop = 1
        pairs = zip(self.config.get("conv_kernel") or [], self.config.get("conv_stride") or [], strict=False)
        for kernel, stride in pairs:
            least, hop = least + (kernel - 1) * hop, hop * stride
        return least

    def lengths(self, encodings: Sequence[Encoding]) -> Sequence[int]:
        """Thousandths of a second, by the files' headers. Raises `DataError` for one that cannot be read."""
        assert isinstance(encodings, Stream)
        header = Stream(encodings.rows, partial(_header, column=encodings.what), what=encodings.what)
        return [int(1000 * found["seconds"]) for found in header.ordered(encodings.places)]

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        """What the extractor makes of them together, its attention mask where it says one; `labels`: their samples, int64."""
        import torch

        rows = [{name: value for name, value in row.items() if name != SAMPLES} for row in encodings]
        padded = processor.tool.pad(rows, padding=True, return_tensors="pt")
        return {**padded, "labels": torch.tensor([encoding[SAMPLES] for encoding in encodings])}


def undecoded(rows: "Dataset", column: str) -> "Dataset":
    """The rows with the files themselves in a column of recordings."""
    from datasets import Audio

    return rows.cast_column(column, Audio(decode=False))


def require_decoder() -> None:
    """Raises `UnsupportedError` where recordings cannot be decoded."""
    try:
        import soundfile  # noqa: F401
        import soxr  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"Recordings need {error.name}: install hfq with its extra, `hfq[audio]`, or `pip install soundfile soxr`."
        ) from error


def waveform(value: Mapping[str, Any], rate: int, *, least: int = 1) -> "NDArray[Any]":
    """float32 `[samples]`, one channel, the mean of those there are, at `rate` samples a second.

    Raises:
        ValueError: it is empty or has less than `least` samples, or is silent throughout.
    """
    import numpy as np
    import soundfile
    import soxr

    with _opened(value) as file:
        samples, found = soundfile.read(file, dtype="float32", always_2d=True)
    if not samples.size:
        raise ValueError("it holds no sound")
    mono = samples.mean(1)
    if not np.any(mono):
        raise ValueError("it is silent throughout")
    if not np.isfinite(mono).all():
        raise ValueError("it holds samples that are no numbers")
    heard: NDArray[Any] = mono if found == rate else soxr.resample(mono, found, rate)
    if len(heard) < least:
        raise ValueError(f"it has {len(heard)} samples at {rate} Hz, and the model hears no less than {least}")
    return heard


def _opened(value: Mapping[str, Any] | None) -> Any:
    if value is None:
        raise ValueError("there is no recording")
    return io.BytesIO(value["bytes"]) if value["bytes"] is not None else open(value["path"], "rb")  # noqa: PTH123


def _header(row: dict[str, Any], *, column: str) -> Encoding:
    import soundfile

    with _opened(row[column]) as file:
        return {"seconds": soundfile.info(file).duration}


def extracted(sound: "NDArray[Any]", tool: Any) -> Encoding:
    """What the feature extractor makes of a waveform alone, and how many samples it has."""
    found = tool(sound, sampling_rate=tool.sampling_rate, return_tensors="np")
    return {**{name: value[0] for name, value in found.items()}, SAMPLES: len(sound)}


def _features(row: dict[str, Any], *, column: str, tool: Any, least: int) -> Encoding:
    return extracted(waveform(row[column], tool.sampling_rate, least=least), tool)
