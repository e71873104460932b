"""What tasks on images share: the checkpoint's own image processor, and images as `datasets` reads them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ...common.errors import DataError, UsageError
from ..base import Batch, Columns, Encoding, Processor, Task
from ..stream import Stream, find_file_column

if TYPE_CHECKING:
    from datasets import Dataset

    from ...source.checkpoint import Checkpoint


class ImageTask(Task):
    """One whose model sees pixels: float32 `[images, channels, height, width]`."""

    roles: ClassVar[Mapping[str, str]] = {"image": "an image", "label": "its label"}
    text_role = "image"
    label_columns: ClassVar[tuple[str, ...]] = ("label", "labels")

    def processor(self, checkpoint: "Checkpoint", *, max_length: int | None, trust_remote_code: bool) -> Processor:
        from ...source.model import load_image_processor  # imports torch

        if max_length is not None:
            raise UsageError(f"--max-length is in tokens, and {self.name} reads images. Leave it out.")
        return Processor(load_image_processor(checkpoint, trust_remote_code=trust_remote_code))

    def inputs(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        from datasets import Image

        named = requested.get("image", ())
        return {"image": find_file_column(features, named, kind=Image, role="image", what="image")}

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> Sequence[Encoding]:
        (column,) = columns["image"]
        rows = as_images(rows, column).select_columns([column])
        return Stream(rows, partial(_pixels, column=column, tool=processor.tool), what=column)

    def lengths(self, encodings: Sequence[Encoding]) -> Sequence[int]:
        """All alike: a processor makes images of one size."""
        return [0] * len(encodings)

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        import torch

        sizes = {tuple(encoding["pixel_values"].shape) for encoding in encodings}
        if len(sizes) > 1:
            raise DataError(
                f"The image processor of this checkpoint makes images of different sizes ({sorted(sizes)[:3]}), which "
                "cannot be batched. Pass --batch-size 1, or let preprocessor_config.json resize them."
            )
        return {"pixel_values": torch.stack([encoding["pixel_values"] for encoding in encodings])}


def as_images(rows: "Dataset", column: str) -> "Dataset":
    """The rows with images in a column, where Parquet has their files without a note of what they are."""
    from datasets import Image

    return rows if isinstance(rows.features[column], Image) else rows.cast_column(column, Image())


def picture(value: Any) -> Any:
    """An image turned as its EXIF says and in RGB, as transformers' pipelines have it.

    Raises:
        ValueError: there is none, or one of more than 8 bits, of which RGB would be what is left below 256.
    """
    from transformers.image_utils import load_image

    if value is None:
        raise ValueError("there is no image")
    if value.mode == "F" or (value.mode.startswith("I") and value.getextrema()[1] > 255):
        raise ValueError(f"its pixels are of mode {value.mode!r}, which RGB would cut off at 255; save it with 8 bits")
    return load_image(value)


def _pixels(row: dict[str, Any], *, column: str, tool: Any) -> Encoding:
    """float32 `[channels, height, width]`."""
    return {"pixel_values": tool(picture(row[column]), return_tensors="pt")["pixel_values"][0]}
