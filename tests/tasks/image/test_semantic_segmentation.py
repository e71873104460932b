"""A label for each pixel, from strangers' files to a published model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import load_dataset
from PIL import Image
from support.command import forkserver

from hfq.common.errors import DataError
from hfq.source.checkpoint import pull
from hfq.tasks.image.semantic_segmentation import Ids, Mask, SemanticSegmentation
from hfq.tasks.registry import make_task

HEIGHT, WIDTH = 40, 48
SIZES: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [32, 64],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 32,
    "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
}


def scene(draw: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A green and a blue box in noise, and which pixel is of which."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels = draw.integers(0, 90, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    for label in (1, 2):
        y, x = draw.integers(0, HEIGHT - 12), draw.integers(0, WIDTH - 14)
        mask[y : y + 12, x : x + 14] = label
        pixels[y : y + 12, x : x + 14, label] = 200
    return Image.fromarray(pixels), Image.fromarray(mask)


def write_scenes(folder: Path, **counts: int) -> Path:
    for seed, (split, count) in enumerate(counts.items(), 1):
        (folder / split / "masks").mkdir(parents=True)
        draw = np.random.default_rng(seed)
        for i in range(count):
            image, mask = scene(draw)
            image.save(folder / split / f"{i}.png")
            mask.save(folder / split / "masks" / f"{i}.png")
        rows = [{"file_name": f"{i}.png", "mask_file_name": f"masks/{i}.png"} for i in range(count)]
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**SIZES, num_labels=3))
    processor = transformers.SegformerImageProcessorPil(size={"height": 32, "width": 32}, do_reduce_labels=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = np.random.default_rng(0)
    for _ in range(30):
        images, masks = zip(*(scene(draw) for _ in range(16)), strict=True)
        model(**processor(list(images), segmentation_maps=list(masks), return_tensors="pt")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("segformer") / "segformer-boxes"
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_masks_are_compared_by_mean_iou(checkpoint: Path, tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", train=20, validation=24, test=20)
    arguments = ("quantize", checkpoint, "--dataset", data, "--output", "out", "--tolerable-loss", "0.02", "--json")
    done = forkserver().hfq(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["pipeline_tag"]) == ("semantic-segmentation", "image-segmentation")
    assert report["metric"] == "mean_iou"
    assert report["baseline"]["accuracy"] > 0.5
    assert report["quantized"]["accuracy"] >= report["baseline"]["accuracy"] * 0.98
    assert report["held_out_stock"]["agreement"] > 0.95
    assert report["dataset"]["columns"] == {"image": ["image"], "label": ["mask"]}


def test_scores_are_those_of_the_field(checkpoint: Path, tmp_path: Path) -> None:
    from torchmetrics.functional import jaccard_index

    rows = load_dataset(str(write_scenes(tmp_path / "data", test=6)), split="test")
    found = pull(str(checkpoint))
    task = make_task(found.config, folder=found.path)
    columns = task.columns(rows.features, {})
    processor = task.processor(found, max_length=None, trust_remote_code=False)
    batch = task.collate(list(task.encode(rows, columns, processor)), processor)
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(checkpoint)
    with torch.inference_mode():
        outputs = task.outputs(model, batch)
        sizes = [(HEIGHT, WIDTH)] * 6
        expected = processor.tool.post_process_semantic_segmentation(model(batch["pixel_values"]), target_sizes=sizes)
    assert all(torch.equal(a.long(), b) for a, b in zip(outputs, expected, strict=True))
    masks = task.references(rows, columns, task.align([rows], columns))
    right = torch.stack([mask.pixels() for mask in masks])
    iou = jaccard_index(torch.stack(expected), right, task="multiclass", num_classes=3, average="macro")
    assert task.score("mean_iou", outputs, masks) == pytest.approx(iou.item(), abs=1e-6)
    share = (torch.stack(expected) == right).double().mean().item()
    assert task.score("pixel_accuracy", outputs, masks) == pytest.approx(share)


BAD: dict[str, tuple[Any, str]] = {
    "colours": (np.zeros((4, 6, 3), np.uint8), "mask of 3 channels"),
    "a label too many": (np.full((4, 6), 7, np.uint8), "has the label 7 in its mask, and the model has 3"),
    "another size": (np.zeros((6, 4), np.uint8), r"a mask of \[6, 4\] pixels for an image of \[4, 6\]"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_mask_is_named(kind: str, tmp_path: Path) -> None:
    pixels, says = BAD[kind]
    mask = _mask(tmp_path, pixels)
    task = SemanticSegmentation({"num_labels": 3})
    with pytest.raises(DataError, match=f"Row 0.*{says}"):
        task.score("mean_iou", [torch.zeros(4, 6, dtype=torch.int16)], [mask])


def test_where_labels_are_reduced_zero_is_none(tmp_path: Path) -> None:
    mask = _mask(tmp_path, np.array([[0, 1], [2, 255]], np.uint8), reduced=True)
    assert mask.pixels().tolist() == [[255, 0], [1, 255]]


def _mask(folder: Path, pixels: Any, *, reduced: bool = False) -> Mask:
    Image.fromarray(pixels).save(folder / "mask.png")
    rows = load_dataset("imagefolder", data_files=str(folder / "mask.png"), split="train")
    return Mask(rows, "image", 0, Ids(reduced=reduced, labels=3))
