"""Boxes and their labels, from strangers' files to a published model."""

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
from hfq.tasks.image.object_detection import ObjectDetection, Objects
from hfq.tasks.registry import make_task

HEIGHT, WIDTH = 40, 48
NAMES = ["red", "green"]


def scene(draw: np.random.Generator) -> tuple[Image.Image, dict[str, list[Any]]]:
    """A coloured box in a corner of noise, and where it is."""
    pixels = draw.integers(0, 90, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    label, y, x = int(draw.integers(2)), 20 * int(draw.integers(2)), 24 * int(draw.integers(2))
    pixels[y : y + 20, x : x + 24, label] = 220
    return Image.fromarray(pixels), {"bbox": [[x, y, 24, 20]], "category": [NAMES[label]]}


def write_scenes(folder: Path, **counts: int) -> Path:
    for seed, (split, count) in enumerate(counts.items(), 1):
        (folder / split).mkdir(parents=True)
        draw, rows = np.random.default_rng(seed), []
        for i in range(count):
            image, objects = scene(draw)
            image.save(folder / split / f"{i}.png")
            rows.append({"file_name": f"{i}.png", "objects": objects})
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    config = transformers.YolosConfig(
        **sizes, **labels, image_size=[32, 32], patch_size=8, num_detection_tokens=4, use_mid_position_embeddings=False
    )
    model = transformers.YolosForObjectDetection(config)
    processor = transformers.YolosImageProcessorPil(size={"height": 32, "width": 32}, do_pad=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = np.random.default_rng(0)
    for _ in range(60):
        scenes = [scene(draw) for _ in range(12)]
        pixels = processor([image for image, _ in scenes], return_tensors="pt")["pixel_values"]
        right = [_target(objects) for _, objects in scenes]
        model(pixel_values=pixels, labels=right).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("yolos") / "yolos-boxes"
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _target(objects: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    centres = [[(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT] for x, y, w, h in objects["bbox"]]
    labels = [NAMES.index(name) for name in objects["category"]]
    return {"class_labels": torch.tensor(labels), "boxes": torch.tensor(centres)}


def test_boxes_are_compared_by_average_precision(checkpoint: Path, tmp_path: Path) -> None:
    """The model has seen too little to find much: what counts is that INT8 finds the same."""
    data = write_scenes(tmp_path / "data", train=20, validation=24, test=20)
    goal = ("--criterion", "absolute", "--tolerable-loss", "0.05")
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", *goal, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["pipeline_tag"], report["metric"]) == (*("object-detection",) * 2, "map")
    assert "by name (0=red, 1=green)" in report["dataset"]["alignment"]
    assert report["held_out_stock"]["agreement"] > 0.8
    model = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert model(pixel_values=torch.zeros(1, 3, 32, 32)).pred_boxes.shape == (1, 4, 4)


def test_precision_is_averaged_over_labels_and_thresholds() -> None:
    task = ObjectDetection({"num_labels": 2})
    right = [_objects([0.1, 0.1, 0.5, 0.5], 0), _objects([0.2, 0.2, 0.6, 0.6], 1)]
    exact = [_detected(0.9, 0, [0.1, 0.1, 0.5, 0.5]), _detected(0.8, 1, [0.2, 0.2, 0.6, 0.6])]
    assert task.score("map", exact, right) == pytest.approx(1)
    near = [exact[0], _detected(0.8, 1, [0.2, 0.2, 0.6, 0.5])]  # an IoU of 0.75
    assert task.score("map_50", near, right) == pytest.approx(1)
    assert task.score("map", near, right) == pytest.approx((1 + 0.6) / 2, abs=0.06)
    assert task.score("map", [exact[1], exact[0]], right) == 0
    judge = task.metrics["map"]
    assert judge.of_some(near, right)([0, 0]) == pytest.approx(1)
    assert judge.of_some(near, right)([0, 2]) < 1  # nothing is found there, the opposite of the first
    assert task.fidelity(exact, near) == 1
    assert task.fidelity(exact, exact[::-1]) == 0


def _objects(box: list[float], label: int) -> Objects:
    return Objects(torch.tensor([box]), torch.tensor([label]))


def _detected(score: float, label: int, box: list[float]) -> torch.Tensor:
    return torch.tensor([[score, label, *box], [0.0] * 6])


BAD = {
    "outside": ([[30, 30, 24, 20]], "lies outside of its image of 48 × 40 pixels"),
    "no area": ([[0, 0, 0, 20]], "Expected x, y, width and height in pixels, both sides above zero"),
    "three numbers": ([[0, 0, 5]], "Expected x, y, width and height"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_box_is_named(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    boxes, says = BAD[kind]
    scene(np.random.default_rng(0))[0].save(tmp_path / "0.png")
    row = {"file_name": "0.png", "objects": {"bbox": boxes, "category": ["red"]}}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    rows = load_dataset(str(tmp_path), split="train")
    task = make_task(pull(str(checkpoint)).config, folder=checkpoint)
    columns = task.columns(rows.features, {})
    with pytest.raises(DataError, match=f"Row 0.*{says}"):
        task.references(rows, columns, task.align([rows], columns))
