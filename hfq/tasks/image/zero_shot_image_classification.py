"""Images and texts in one space (CLIP, Radford et al. 2021; SigLIP): which of several texts tells of an image.

An example is an image with the text that tells of it, and is right if that is the nearest of all texts of the split. A
label becomes a text as in transformers' pipeline for zero-shot image classification; a caption is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...common.errors import DataError
from ..base import Batch, Columns, Encoding, Metric, Outputs, Processor, References, Trivial
from ..labels import UNLABELLED, find_label_column
from ..metrics import MeanOf, stacked
from ..stream import Stream
from .image_embedding import AT_ONCE
from .pixels import ImageTask, as_images, picture

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from ...source.checkpoint import Checkpoint

CAPTIONS = ("text", "caption", "captions", "sentence", "sentences", "description")
TEMPLATE = "This is a photo of {}."
SIGLIP_LENGTH = 64  # tokens, to which the texts of that family are padded, as it was trained
SAME = 0.9999  # cosine of the vectors of one text, whatever it was batched with


@dataclass(frozen=True)
class Texts:
    """What tells of an image."""

    how: str


@dataclass(frozen=True)
class Tools:
    """The checkpoint's image processor and its tokenizer. `length`: in tokens, the most that its texts have."""

    images: Any
    tokenizer: Any
    length: int
    padding: bool | str


class ZeroShotImageClassification(ImageTask):
    """Outputs are the vectors of the image and of its text: float32 `[2, features]`, of length one."""

    name = "zero-shot-image-classification"
    auto_class = "AutoModelForZeroShotImageClassification"
    pipeline_tag = "zero-shot-image-classification"
    roles: ClassVar[Mapping[str, str]] = {"image": "an image", "label": "its label, or a text that tells of it"}
    label_columns = (*ImageTask.label_columns, *CAPTIONS)

    def processor(self, checkpoint: "Checkpoint", *, max_length: int | None, trust_remote_code: bool) -> Processor:
        from ...source.model import load_tokenizer  # imports torch

        images = super().processor(checkpoint, max_length=max_length, trust_remote_code=trust_remote_code).tool
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        text = self.config.get("text_config") or {}
        is_siglip = "siglip" in str(self.config.get("model_type"))
        longest = SIGLIP_LENGTH if is_siglip else int(text.get("max_position_embeddings", 77))
        length = min(longest, tokenizer.model_max_length)
        return Processor(Tools(images, tokenizer, length, "max_length" if is_siglip else True))

    def inputs(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        """The text is read by the model too."""
        texts = find_label_column(features, requested.get("label", ()), names=self.label_columns, task=self.name)
        return {**super().inputs(features, requested), "label": texts}

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        return self.inputs(features, requested)

    def lacks_labels(self, features: Mapping[str, Any], requested: Columns) -> bool:
        """Its text is what an image belongs to."""
        return False

    def align(self, splits: "Sequence[Dataset]", columns: Columns) -> Texts:
        (column,) = columns["label"]
        texts = {text for rows in splits for text in _texts(rows, column)}
        if len(texts) < 2:
            raise DataError(f"Column {column!r} holds one text for all images. Expected labels, or captions.")
        how = "as they are" if column in CAPTIONS else f"as {TEMPLATE.format('…')!r}"
        return Texts(f"texts {how}, each among all of its split")

    def references(self, rows: "Dataset", columns: Columns, alignment: Texts) -> list[Any]:
        return list(_texts(rows, columns["label"][0]))

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> Sequence[Encoding]:
        (image,), (text,) = columns["image"], columns["label"]
        texts = _texts(rows, text)
        if None in texts:
            raise DataError(
                f"Row {texts.index(None)} (from 0) of split {str(rows.split or 'given')!r} has no text in column {text!r}. "
                "Mend or remove it."
            )
        rows = as_images(rows, image).select_columns([image]).add_column("_text", texts)
        return Stream(rows, partial(_pair, column=image, tools=processor.tool), what=image)

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        tools: Tools = processor.tool
        tokens = tools.tokenizer(
            [encoding["text"] for encoding in encodings],
            return_tensors="pt",
            truncation=True,
            padding=tools.padding,
            max_length=tools.length,
        )
        return {**super().collate(encodings, processor), **tokens}

    def outputs(self, model: "nn.Module", batch: Batch) -> list[Tensor]:
        found = model(**self.model_inputs(batch))
        both = torch.stack([found.image_embeds, found.text_embeds], 1).float()
        return list(normalize(both, dim=-1).unbind())

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        return {
            "accuracy": MeanOf("Accuracy", partial(_among_first, count=1)),
            "top5_accuracy": MeanOf("Top-5 accuracy", partial(_among_first, count=5)),
        }

    def per_example(self, outputs: Outputs, references: References) -> Tensor:
        """bool `[examples]`: whether the nearest text is its own."""
        return _among_first(outputs, references, count=1)

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Share of images whose nearest text is the same."""
        texts = stacked(outputs)[:, 1]
        first, second = (_nearest(stacked(rows)) for rows in (outputs, others))
        return ((texts[first] * texts[second]).sum(1) > SAME).double().mean().item()

    def trivial(self, metric: str, references: References) -> Trivial | None:
        """Always the most common text."""
        if metric != "accuracy":
            return None
        common = max(map(list(references).count, set(references)))
        return Trivial(common / len(references), "answering the most common text")

    def usage(self, tag: str) -> str:
        return f'{super().usage(tag)}\nmodel("image.png", candidate_labels=["a cat", "a dog"])'


def _texts(rows: "Dataset", column: str) -> list[str | None]:
    """What tells of each image; None where nothing does."""
    names = getattr(rows.features[column], "names", None)

    def text(value: Any) -> str | None:
        value = value[0] if isinstance(value, list) and value else value  # several captions: the first
        if value is None or value == UNLABELLED or value == []:
            return None
        name = names[value] if names else str(value)
        return name if column in CAPTIONS else TEMPLATE.format(name.replace("_", " "))

    return [text(value) for value in rows[column]]


def _pair(row: dict[str, Any], *, column: str, tools: Tools) -> Encoding:
    pixels = tools.images(picture(row[column]), return_tensors="pt")["pixel_values"][0]
    return {"pixel_values": pixels, "text": row["_text"]}


def _nearest(pairs: Tensor) -> Tensor:
    """int64 `[examples]`: whose text is nearest to each image, of `[examples, 2, features]`."""
    images, texts = pairs.unbind(1)
    parts = images.split(AT_ONCE)
    return torch.cat([(part @ texts.T).argmax(1) for part in parts])


def _among_first(outputs: Outputs, references: References, *, count: int) -> Tensor:
    """bool `[examples]`: whether an image's own text is one of the so many nearest, of all that differ."""
    places: dict[str, int] = {}
    for row, text in enumerate(references):
        places.setdefault(text, row)
    order = {text: place for place, text in enumerate(places)}
    pairs = stacked(outputs)
    candidates = pairs[list(places.values()), 1]
    own = torch.tensor([order[text] for text in references])
    count = min(count, len(candidates))
    found = torch.cat([(part @ candidates.T).topk(count).indices for part in pairs[:, 0].split(AT_ONCE)])
    return (found == own[:, None]).any(1)
