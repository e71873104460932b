"""Object detection: boxes and labels, judged by average precision as COCO defines it (Lin et al. 2014).

Boxes come as COCO has them, `[x, y, width, height]` in pixels from the upper left. What the model finds is read by the
checkpoint's own image processor, `post_process_object_detection`. pycocotools computes the metric.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...common.errors import DataError, UnsupportedError
from ..base import Batch, Columns, Encoding, Metric, Outputs, Processor, References, find_column
from ..labels import LabelMap, LabelNames
from ..stream import Stream
from .pixels import ImageTask, as_images, picture

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

OBJECTS = ("objects", "annotations", "label", "labels")
BOXES = ("bbox", "boxes", "bboxes")
CATEGORIES = ("category", "categories", "category_id", "label", "labels", "class")
MOST = 100  # of an image, the likeliest, as COCO counts them
SURE = 0.5  # score, from which two models' detections are compared
OVERLAP = 0.5  # IoU, from which two boxes are of one object
_ORIENTATION = 0x0112  # in EXIF: from 5 on, width and height change places
_SIDE = 1000.0  # to which boxes in fractions of the image are scaled: COCO's numbers are pixels


@dataclass(frozen=True)
class Objects:
    """What is in an image: corners `[objects, 4]` in fractions of the image, and the model's ids of their labels."""

    boxes: Tensor
    labels: Tensor


class AveragePrecision(Metric):
    """COCO's: the mean over labels, and over IoU thresholds from 0.5 to 0.95, or at one of them."""

    def __init__(self, label: str, labels: int, *, at: float | None = None) -> None:
        self.label = label
        self.labels = labels
        self.at = at

    def score(self, outputs: Outputs, references: References) -> float:
        return self.of_some(outputs, references)(list(range(len(outputs))))

    def of_some(self, outputs: Outputs, references: References) -> Callable[[list[int]], float]:
        none = [output[:0] for output in outputs]  # the opposite of what is found
        found = _matched([*outputs, *none], [*references, *references], self.labels)
        thresholds = found.params.iouThrs
        kept = slice(None) if self.at is None else abs(thresholds - self.at) < 1e-6
        by_label = _by_label(found, 2 * len(outputs))

        def value(rows: list[int]) -> float:
            with _quiet():
                found.evalImgs = [matches[row] for matches in by_label for row in rows]
                found._paramsEval.imgIds = list(range(len(rows)))
                found.accumulate()
            precision = found.eval["precision"][kept, :, :, 0, -1]
            there = precision[precision > -1]
            return float(there.mean()) if there.size else float("nan")

        return value


class ObjectDetection(ImageTask):
    """Outputs are float32 `[detections, 6]`, likeliest first: score, label, and corners in fractions of the image."""

    name = "object-detection"
    auto_class = "AutoModelForObjectDetection"
    pipeline_tag = "object-detection"
    roles: ClassVar[Mapping[str, str]] = {
        "image": "an image",
        "label": "objects as COCO has them: `bbox` of x, y, width and height, and `category`",
    }
    example: ClassVar[Mapping[str, Any]] = {"num_labels": 91}

    folder: Path | None = None

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.labels = LabelNames(config)

    def bound(self, folder: Path) -> "ObjectDetection":
        try:
            import pycocotools  # noqa: F401
        except ImportError as error:
            raise UnsupportedError(
                "Object detection is judged by pycocotools: install hfq with its extra, `hfq[detection]`, or "
                "`pip install pycocotools`."
            ) from error
        self.folder = folder
        return self

    @cached_property
    def reader(self) -> Any:
        """The checkpoint's image processor, which reads detections off."""
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        """Without what another process loads itself."""
        return {name: value for name, value in vars(self).items() if name != "reader"}

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        asked, flag = requested.get("label", ()), "--label-column"
        named = find_column(features, asked, known=OBJECTS, what="the objects", flag=flag)
        _keys(features[named[0]], named[0])
        return {**self.inputs(features, requested), "label": named}

    def align(self, splits: "Sequence[Dataset]", columns: Columns) -> LabelMap:
        (column,) = columns["label"]
        _, category = _keys(splits[0].features[column], column)
        feature = _fields(splits[0].features[column])[category]
        values = {value for rows in splits for found in rows[column] for value in _listed(found, category)}
        return self.labels.align(getattr(feature, "feature", feature), sorted(values, key=str))

    def references(self, rows: "Dataset", columns: Columns, alignment: LabelMap) -> list[Any]:
        from datasets import Image

        (image,), (column,) = columns["image"], columns["label"]
        keys = _keys(rows.features[column], column)
        files = rows.select_columns([image]).cast_column(image, Image(decode=False))
        sizes = Stream(files, partial(_size, column=image), what=image)
        split = str(rows.split or "given")
        return [
            _objects(
                found,
                keys,
                size=sizes[row]["size"],
                alignment=alignment,
                where=f"Row {row} (from 0) of split {split!r}",
            )
            for row, found in enumerate(rows[column])
        ]

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> Sequence[Encoding]:
        """Images: the processor makes a batch of them at once, padded to the largest."""
        (column,) = columns["image"]
        rows = as_images(rows, column).select_columns([column])
        return Stream(rows, partial(_image, column=column), what=column)

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        made = processor.tool([encoding["image"] for encoding in encodings], return_tensors="pt")
        return {name: made[name] for name in ("pixel_values", "pixel_mask") if name in made}

    def outputs(self, model: "nn.Module", batch: Batch) -> list[Tensor]:
        found = model(**self.model_inputs(batch))
        sizes = torch.ones(len(batch["pixel_values"]), 2)
        rows = self.reader.post_process_object_detection(found, threshold=-1.0, target_sizes=sizes)
        return [_likeliest(row) for row in rows]

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        labels = len(self.labels)
        return {"map": AveragePrecision("mAP", labels), "map_50": AveragePrecision("mAP at IoU 0.5", labels, at=0.5)}

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Of detections that either model is sure of, the share that the other has too, in its place."""
        shared = total = 0
        for first, second in zip(outputs, others, strict=True):
            a, b = (rows[rows[:, 0] >= SURE] for rows in (first, second))
            shared += 2 * _pairs(a, b)
            total += len(a) + len(b)
        return shared / total if total else 1.0


def _likeliest(found: Mapping[str, Tensor]) -> Tensor:
    """float32 `[MOST, 6]`, of what the processor reads off; rows of zeros where there are fewer."""
    order = found["scores"].argsort(descending=True)[:MOST]
    rows = torch.cat([found["scores"][:, None], found["labels"][:, None], found["boxes"]], 1).float()[order]
    return torch.nn.functional.pad(rows, (0, 0, 0, MOST - len(rows)))


def _pairs(first: Tensor, second: Tensor) -> int:
    """How many detections `[n, 6]` of two models are of the same object, each in one pair."""
    overlaps = _iou(first[:, 2:], second[:, 2:]).masked_fill(first[:, None, 1] != second[None, :, 1], 0)
    count = 0
    while overlaps.numel() and overlaps.max() >= OVERLAP:
        row, column = divmod(int(overlaps.argmax()), overlaps.shape[1])
        overlaps[row], overlaps[:, column] = 0, 0
        count += 1
    return count


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """`[n, m]`, of corners `[n, 4]` and `[m, 4]`."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1) for boxes in (first, second)]
    return both / (areas[0][:, None] + areas[1][None] - both).clamp(min=1e-12)


def _matched(outputs: Outputs, references: References, labels: int) -> Any:
    """COCOeval with every image's detections matched to its objects."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    right: dict[str, Any] = {
        "images": [{"id": row} for row in range(len(outputs))],
        "categories": [{"id": label} for label in range(labels)],
        "annotations": [
            _annotation(row, box, label, iscrowd=0)
            for row, found in enumerate(references)
            for box, label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True)
        ],
    }
    given = [
        _annotation(row, box, label, score=score)
        for row, found in enumerate(outputs)
        for score, label, *box in found.tolist()
        if box[2] > box[0]
    ]
    for number, annotation in enumerate(right["annotations"], 1):
        annotation["id"] = number
    with _quiet():
        truth = COCO()
        truth.dataset = right
        truth.createIndex()
        found = COCOeval(truth, truth.loadRes(given) if given else COCO(), "bbox")
        found.params.areaRng, found.params.areaRngLbl = found.params.areaRng[:1], found.params.areaRngLbl[:1]
        found.params.maxDets = [MOST]
        found.evaluate()
    return found


def _annotation(row: int, box: Sequence[float], label: float, **more: float) -> dict[str, Any]:
    x, y, right, bottom = (_SIDE * value for value in box)
    width, height = right - x, bottom - y
    return {"image_id": row, "category_id": int(label), "bbox": [x, y, width, height], "area": width * height, **more}


def _by_label(found: Any, images: int) -> list[list[Any]]:
    """What COCOeval knows of each image, by label."""
    return [found.evalImgs[start : start + images] for start in range(0, len(found.evalImgs), images)]


def _quiet() -> Any:
    """pycocotools prints what it does."""
    import io
    from contextlib import redirect_stdout

    return redirect_stdout(io.StringIO())


def _fields(feature: Any) -> Mapping[str, Any]:
    """The columns of a list of objects, as `datasets` has it: a list of structs, or a struct of lists."""
    inner = getattr(feature, "feature", feature)
    return inner if isinstance(inner, Mapping) else {}


def _keys(feature: Any, column: str) -> tuple[str, str]:
    """What boxes and labels are called in a column of objects.

    Raises:
        DataError: it holds none.
    """
    fields = _fields(feature)
    boxes = [name for name in BOXES if name in fields]
    categories = [name for name in CATEGORIES if name in fields]
    if not boxes or not categories:
        raise DataError(
            f"Column {column!r} holds {', '.join(fields) or feature}, and not objects as COCO has them: expected bbox and "
            "category. Name another column with --label-column."
        )
    return boxes[0], categories[0]


def _listed(found: Any, key: str) -> list[Any]:
    """A field of all objects of a row."""
    if isinstance(found, list):
        return [item[key] for item in found]
    return list((found or {}).get(key) or [])


def _objects(
    found: Any, keys: tuple[str, str], *, size: tuple[int, int], alignment: LabelMap, where: str
) -> Objects | None:
    """Corners in fractions of the image, and label ids; None for a row with a label that the model lacks.

    Raises:
        DataError: a box is no box, or lies outside of its image.
    """
    if found is None:
        return None
    height, width = size
    corners, labels = [], [alignment(value) for value in _listed(found, keys[1])]
    for box in _listed(found, keys[0]):
        if len(box) != 4 or box[2] <= 0 or box[3] <= 0:
            raise DataError(
                f"{where} has the box {box}. Expected x, y, width and height in pixels, both sides above zero."
            )
        x, y, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
        if x < -1 or y < -1 or right > width + 1 or bottom > height + 1:
            raise DataError(
                f"{where} has the box {box}, which lies outside of its image of {width} × {height} pixels. Expected x, y, "
                "width and height in pixels, as COCO has them."
            )
        corners.append([x / width, y / height, right / width, bottom / height])
    if len(corners) != len(labels):
        raise DataError(f"{where} has {len(corners)} boxes and {len(labels)} labels.")
    if None in labels:
        return None
    return Objects(torch.tensor(corners).reshape(-1, 4), torch.tensor(labels, dtype=torch.long))


def _size(row: dict[str, Any], *, column: str) -> Encoding:
    """Height and width of an image, turned as its EXIF says; its pixels are not decoded for it."""
    from io import BytesIO

    from PIL import Image

    value = row[column]
    with Image.open(BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]) as image:
        width, height = image.size
        is_turned = image.getexif().get(_ORIENTATION, 1) >= 5
    return {"size": (width, height) if is_turned else (height, width)}


def _image(row: dict[str, Any], *, column: str) -> Encoding:
    return {"image": picture(row[column])}
