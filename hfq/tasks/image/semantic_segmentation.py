"""Semantic segmentation: an image, and for each of its pixels one of several labels.

Masks hold label ids, as the checkpoint's image processor takes them: where it reduces labels, 0 is the background, and
no label. Logits are brought to the size of the image before the largest is taken, as `post_process_semantic_segmentation`
of transformers does. IoU (Everingham et al. 2010) is of the pixels of the whole split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...common.errors import DataError
from ...common.reading import read_json
from ..base import Batch, Columns, Encoding, Metric, Outputs, Processor, References, SumMetric
from ..labels import LabelNames
from ..stream import Stream, find_file_column
from .pixels import ImageTask, as_images, picture

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

MASKS = ("label", "mask", "annotation", "segmentation", "labels", "masks")
NO_LABEL = 255  # of a pixel that counts for nothing


@dataclass(frozen=True)
class Ids:
    """How masks are read. `reduced`: 0 is no label, and 1 is the model's first."""

    reduced: bool
    labels: int

    @property
    def how(self) -> str:
        return "masks hold the model's ids" + (
            ", from 1; 0 is no label, as its image processor says" if self.reduced else ""
        )


@dataclass(frozen=True)
class Mask:
    """The labels of a row's pixels, decoded when they are asked for."""

    rows: "Dataset"
    column: str
    row: int
    ids: Ids

    def pixels(self) -> Tensor:
        """int64 `[height, width]`.

        Raises:
            DataError: it holds something else than label ids.
        """
        import numpy as np

        where = f"Row {self.row} (from 0) of split {str(self.rows.split or 'given')!r}"
        try:
            found = torch.from_numpy(np.array(self.rows[self.row][self.column]).astype(np.int64))
        except Exception as error:  # a decoder raises whatever it likes about a broken file
            raise DataError(f"{where} has a mask in column {self.column!r} that cannot be read: {error}.") from error
        if found.dim() != 2:
            raise DataError(
                f"{where} has a mask of {found.shape[-1]} channels in column {self.column!r}. Expected one channel, of label ids."
            )
        if self.ids.reduced:
            found = torch.where((found == 0) | (found == NO_LABEL), NO_LABEL, found - 1)
        strange = found[(found >= self.ids.labels) & (found != NO_LABEL)]
        if len(strange):
            raise DataError(
                f"{where} has the label {int(strange[0]) + self.ids.reduced} in its mask, and the model has "
                f"{self.ids.labels} labels. Expected their ids, and {NO_LABEL} for pixels without one."
            )
        return found


class MeanIoU(SumMetric):
    """The mean over labels of intersection over union, of those that a mask or the model has."""

    label = "Mean IoU"

    def __init__(self, labels: int) -> None:
        self.labels = labels

    def numbers(self, outputs: Outputs, references: References) -> Tensor:
        """Pixels in both and in either, of each label: `[examples, 2 × labels]`."""
        from torchmetrics.functional.classification import multiclass_stat_scores

        rows = []
        for output, mask in zip(outputs, references, strict=True):
            given, right = _pair(output, mask)
            counts = multiclass_stat_scores(
                given.flatten(), right.flatten(), num_classes=self.labels, average=None, ignore_index=NO_LABEL
            )
            right_ones, wrong_ones, _, missed = counts[:, :4].double().unbind(1)
            rows.append(torch.cat([right_ones, right_ones + wrong_ones + missed]))
        return torch.stack(rows)

    def of_sums(self, sums: Tensor) -> Tensor:
        both, either = sums.chunk(2, -1)
        return torch.where(either > 0, both / either, torch.nan).nanmean(-1)


class PixelAccuracy(SumMetric):
    """The share of pixels with the right label."""

    label = "Pixel accuracy"

    def numbers(self, outputs: Outputs, references: References) -> Tensor:
        """Right pixels, and all that have a label: `[examples, 2]`."""
        rows = []
        for output, mask in zip(outputs, references, strict=True):
            given, right = _pair(output, mask)
            counted = right != NO_LABEL
            rows.append([((given == right) & counted).sum().item(), counted.sum().item()])
        return torch.tensor(rows, dtype=torch.float64)

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]


class SemanticSegmentation(ImageTask):
    """Outputs are label ids in the size of the image: int16 `[height, width]`."""

    name = "semantic-segmentation"
    auto_class = "AutoModelForSemanticSegmentation"
    pipeline_tag = "image-segmentation"
    roles: ClassVar[Mapping[str, str]] = {"image": "an image", "label": "a mask: the label id of each pixel"}
    example: ClassVar[Mapping[str, Any]] = {"num_labels": 150}
    discrete = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.labels = LabelNames(config)
        self.reduced = False

    def bound(self, folder: Path) -> "SemanticSegmentation":
        """With what the image processor says of label 0."""
        path = folder / "preprocessor_config.json"
        settings = read_json(path) if path.is_file() else {}
        self.reduced = bool(settings.get("do_reduce_labels", settings.get("reduce_labels", False)))
        return self

    def inputs(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        from datasets import Image

        masks = _mask_columns(features, requested)
        seen = {name: kind for name, kind in features.items() if name not in masks}
        named = requested.get("image", ())
        return {"image": find_file_column(seen, named, kind=Image, role="image", what="image")}

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        from datasets import Image

        seen = self.inputs(features, requested)
        rest = {name: kind for name, kind in features.items() if name not in seen["image"]}
        masks = find_file_column(rest, _mask_columns(features, requested), kind=Image, role="label", what="mask")
        return {**seen, "label": masks}

    def align(self, splits: "Sequence[Dataset]", columns: Columns) -> Ids:
        return Ids(self.reduced, len(self.labels))

    def references(self, rows: "Dataset", columns: Columns, alignment: Ids) -> list[Any]:
        (column,) = columns["label"]
        rows = as_images(rows, column).select_columns([column])
        there = rows.data.column(column).is_valid().to_pylist() if rows._indices is None else [True] * len(rows)
        return [Mask(rows, column, row, alignment) if found else None for row, found in enumerate(there)]

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> Sequence[Encoding]:
        (column,) = columns["image"]
        rows = as_images(rows, column).select_columns([column])
        return Stream(rows, partial(_sized, column=column, tool=processor.tool), what=column)

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        """Pixels, and as `labels` the sizes of the images: int64 `[examples, 2]`."""
        sizes = torch.tensor([encoding["size"] for encoding in encodings])
        return {**super().collate(encodings, processor), "labels": sizes}

    def outputs(self, model: "nn.Module", batch: Batch) -> list[Tensor]:
        logits = model(**self.model_inputs(batch)).logits.float()
        return [
            torch.nn.functional.interpolate(row[None], size=size, mode="bilinear", align_corners=False)[0]
            .argmax(0)
            .to(torch.int16)
            for row, size in zip(logits, batch["labels"].tolist(), strict=True)
        ]

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        return {"mean_iou": MeanIoU(len(self.labels)), "pixel_accuracy": PixelAccuracy()}

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Share of pixels with the same label."""
        same = sum((a == b).sum().item() for a, b in zip(outputs, others, strict=True))
        return same / max(1, sum(output.numel() for output in outputs))


def _mask_columns(features: Mapping[str, Any], requested: Columns) -> list[str]:
    """The column that was asked for, else one that is called as masks are and holds images."""
    from datasets import Image

    named = list(requested.get("label", ()))
    return named or [name for name in MASKS if isinstance(features.get(name), Image)][:1]


def _sized(row: dict[str, Any], *, column: str, tool: Any) -> Encoding:
    image = picture(row[column])
    pixels = tool(image, return_tensors="pt")["pixel_values"][0]
    return {"pixel_values": pixels, "size": (image.height, image.width)}


def _pair(output: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """int64 `[height, width]`: the labels that were given, and those that are right.

    Raises:
        DataError: the mask has another size than its image.
    """
    right = mask.pixels()
    if right.shape != output.shape:
        raise DataError(
            f"Row {mask.row} (from 0) of split {str(mask.rows.split or 'given')!r} has a mask of {list(right.shape)} pixels "
            f"for an image of {list(output.shape)} (height, width). Save it in the size of its image."
        )
    return output.long(), right
