"""What tasks on images share: the checkpoint's own image processor, and images as `datasets` reads them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ...common.errors import DataError, UsageError
from ..base import Batch, Columns, Encoding, Processor, Task, require_column
from ..stream import Stream

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

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
        return {"image": self.find_images(features, requested.get("image", ()))}

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> Sequence[Encoding]:
        from datasets import Image

        (column,) = columns["image"]
        if not isinstance(rows.features[column], Image):
            rows = rows.cast_column(column, Image())
        return Stream(rows.select_columns([column]), partial(_pixels, column=column, tool=processor.tool), what=column)

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

    def outputs(self, model: "nn.Module", batch: Batch) -> list["Tensor"]:
        """Logits: float32 `[labels]` for each image."""
        return list(model(**batch).logits.float().unbind())

    def find_images(self, features: Mapping[str, Any], requested: Sequence[str]) -> list[str]:
        """The column of images.

        Raises:
            DataError: it does not exist, or the choice is not clear.
        """
        for name in requested:
            require_column(name, features, "--column image=")
        found = list(requested) or [name for name, feature in features.items() if is_image(feature)]
        if len(found) == 1 and is_image(features[found[0]]):
            return found
        raise DataError(
            f"Which column holds the image is not clear. Columns: {', '.join(features)}; with images: "
            f"{', '.join(name for name in features if is_image(features[name])) or 'none'}. Name one with --column image=NAME."
        )


def is_image(feature: Any) -> bool:
    """Whether a column of this `datasets` feature holds images, or their files as Parquet has them without a note."""
    from datasets import Image

    return isinstance(feature, Image) or (isinstance(feature, Mapping) and set(feature) == {"bytes", "path"})


def _pixels(row: dict[str, Any], *, column: str, tool: Any) -> Encoding:
    """float32 `[channels, height, width]`, of an image turned as its EXIF says and in RGB, as transformers' pipelines have it."""
    from transformers.image_utils import load_image

    if row[column] is None:
        raise ValueError("there is no image")
    return {"pixel_values": tool(load_image(row[column]), return_tensors="pt")["pixel_values"][0]}
