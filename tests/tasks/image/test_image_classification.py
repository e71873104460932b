"""Image classification, from a folder of strangers' images to a published model."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as Pillow
from support.command import ROOT, forkserver
from support.trained.pictures import COUNTS, NAMES, SIDE, pictures, write_pictures
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hfq.common.errors import DataError, UsageError
from hfq.config import PostTrainingQuantConfig
from hfq.data.examples import Examples
from hfq.quantization import fit
from hfq.recipe import Recipe, read_recipe
from hfq.runtime.int8.conv import Int8Conv
from hfq.source.checkpoint import pull
from hfq.tasks.image.image_classification import ImageClassification
from hfq.tasks.registry import make_task


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=SIDE, patch_size=8, **labels))
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    shown = list(pictures(480, seed=9))
    pixels = processor([picture for picture, _ in shown], return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in list(range(0, 480, 48)) * 6:
        rows = slice(start, start + 48)
        right = torch.tensor([label for _, label in shown[rows]])
        model(pixel_values=pixels[rows], labels=right).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("images") / "vit-colours"
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def encoded(checkpoint: Path, rows: Dataset) -> Any:
    found = pull(str(checkpoint))
    task = make_task(found.config)
    processor = task.processor(found, max_length=None, trust_remote_code=False)
    return task.encode(rows, task.columns(rows.features, {}), processor)


def as_rows(path: Path, *, feature: Any) -> Dataset:
    features = Features({"image": feature, "label": Value("int64")})
    return Dataset.from_dict({"image": [{"path": None, "bytes": path.read_bytes()}], "label": [0]}, features)


def test_a_folder_of_images_is_quantized_and_judged(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["pipeline_tag"], report["metric"]) == (*("image-classification",) * 2, "accuracy")
    assert report["baseline"]["accuracy"] > 0.9
    assert report["quantized"]["accuracy"] >= report["baseline"]["accuracy"] * 0.99
    assert report["held_out_stock"]["agreement"] >= 0.9
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert 'pipeline("image-classification"' in card
    confusion = report["comparisons"][-1]["confusion"]
    assert confusion["labels"] == NAMES
    assert [sum(row) for row in confusion["quantized"]] == [COUNTS["test"] // 3] * 3
    right = sum(row[i] for i, row in enumerate(confusion["quantized"]))
    assert right / COUNTS["test"] == pytest.approx(report["quantized"]["holdout_accuracy"])
    assert forkserver().hfq("report", "out", "--output", "page.html", cwd=tmp_path).code == 0
    assert "What is taken for what" in (tmp_path / "page.html").read_text()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    float_model = AutoModelForImageClassification.from_pretrained(checkpoint)
    rows = load_dataset(str(data), split="test")
    pixels = torch.stack([encoding["pixel_values"] for encoding in encoded(checkpoint, rows)])
    with torch.inference_mode():
        alike = model(pixels).logits.argmax(1) == float_model(pixels).logits.argmax(1)
    assert alike.double().mean() >= 0.9
    done = forkserver().hfq("bench", "out", "--baseline", checkpoint, cwd=tmp_path)
    assert done.code == 2
    assert "times models on random tokens, and one for image-classification reads something else" in done.err


def test_the_demo_of_images_is_as_good_as_it_says(tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "pipelines" / "demo-images.yaml")
    said = re.search(
        rf"\| {recipe.split}, 500 of .*\| ([\d.]+) \|", (Path(recipe.checkpoint) / "README.md").read_text()
    )
    assert said
    done = forkserver().hfq(
        "eval", recipe.checkpoint, "--dataset", recipe.dataset, "--split", recipe.split, "--json", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["accuracy"] == pytest.approx(float(said[1]), abs=0.005)


def test_a_grey_a_transparent_and_a_turned_image_are_read_as_pipelines_do(checkpoint: Path, tmp_path: Path) -> None:
    colour = next(pictures(1, seed=4))[0].resize((20, 12))
    exif = colour.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    kinds = {"grey": colour.convert("L"), "palette": colour.convert("P"), "transparent": colour.convert("RGBA")}
    paths = {name: tmp_path / f"{name}.png" for name in (*kinds, "turned")}
    for name, picture in kinds.items():
        picture.save(paths[name])
    colour.save(paths["turned"], exif=exif)
    processor = ViTImageProcessorPil.from_pretrained(checkpoint)
    for name, path in paths.items():
        expected = Pillow.open(path)
        expected = (expected.transpose(Pillow.Transpose.ROTATE_270) if name == "turned" else expected).convert("RGB")
        wanted = processor(expected, return_tensors="pt")["pixel_values"][0]
        for feature in (Image(), {"bytes": Value("binary"), "path": Value("string")}):
            (found,) = encoded(checkpoint, as_rows(path, feature=feature))
            assert torch.equal(found["pixel_values"], wanted), name


@pytest.mark.parametrize(("mode", "values"), [("I;16", [0, 65535]), ("F", [0.0, 1.0])])
def test_an_image_that_rgb_would_cut_off_is_named(
    mode: str, values: list[float], checkpoint: Path, tmp_path: Path
) -> None:
    kind = np.uint16 if mode == "I;16" else np.float32
    Pillow.fromarray(np.array([values] * 2, dtype=kind)).save(tmp_path / "deep.tiff")
    with pytest.raises(DataError, match=f"of mode '{mode}', which RGB would cut off at 255"):
        encoded(checkpoint, as_rows(tmp_path / "deep.tiff", feature=Image()))[0]


def test_images_are_decoded_when_their_batch_is_made(checkpoint: Path) -> None:
    """So that a set of any size fits into memory."""
    picture = next(pictures(1, seed=4))[0]
    rows = Dataset.from_dict(
        {"image": [picture] * 5, "label": [0] * 5}, Features({"image": Image(), "label": Value("int64")})
    )
    examples = Examples(encoded(checkpoint, rows), [0] * 5)
    task = make_task(pull(str(checkpoint)).config)
    batches = examples.batches(task, task.processor(pull(str(checkpoint)), max_length=None, trust_remote_code=False), 2)
    assert not isinstance(batches, list)
    assert [len(batch["pixel_values"]) for batch in batches] == [2, 2, 1]


def test_images_without_labels_are_judged_by_agreement(checkpoint: Path, tmp_path: Path) -> None:
    for i, (picture, _) in enumerate(pictures(60, seed=5)):
        picture.save(tmp_path / f"{i}.png")
    done = forkserver().hfq("eval", checkpoint, "--dataset", tmp_path, "--json", cwd=tmp_path.parent)
    assert done.code == 0, done.err
    assert json.loads(done.out)["metric"] == "fidelity"


def test_top_five_is_offered_where_there_are_more_than_five_labels() -> None:
    config = {"architectures": ["ViTForImageClassification"], "id2label": {str(i): f"n{i}" for i in range(8)}}
    task = make_task({**config, "model_type": "vit"})
    assert isinstance(task, ImageClassification)
    logits = torch.arange(8.0)
    assert task.score("top5_accuracy", [logits, logits], [3, 2]) == 0.5
    assert "top5_accuracy" not in make_task({**config, "id2label": {"0": "a", "1": "b"}}).metrics


@pytest.mark.parametrize("kept", [0, 60])
def test_a_broken_image_is_named(kept: int, checkpoint: Path, tmp_path: Path) -> None:
    """Another file, or one that ends too soon."""
    data = write_pictures(tmp_path / "data")
    broken = data / "validation" / "red" / "0.png"
    broken.write_bytes(broken.read_bytes()[:kept] + b"no image")
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", cwd=tmp_path)
    assert done.code == 1
    assert "cannot be read in column 'image'" in done.err
    assert "Mend or remove it" in done.err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_an_image_processor_is_refused(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoModelForImageClassification.from_pretrained(checkpoint).save_pretrained(bare)
    done = forkserver().hfq("eval", bare, "--dataset", data, cwd=tmp_path)
    assert done.code == 1
    assert "has no preprocessor_config.json" in done.err


def test_texts_and_lengths_are_nothing_that_it_reads(checkpoint: Path) -> None:
    task = make_task(pull(str(checkpoint)).config)
    features = Features({"text": Value("string"), "label": Value("int64")})
    for unread in (features, Features({"audio": {"bytes": Value("string")}})):  # the latter without labels, either
        with pytest.raises(DataError, match="with images: none"):
            task.columns(unread, {})
    with pytest.raises(UsageError, match="reads images"):
        task.processor(
            pull(str(checkpoint)), max_length=Recipe(checkpoint="x", max_length=8).max_length, trust_remote_code=False
        )


def test_convolutions_are_int8_where_they_are_the_model_and_stock_opens_them(tmp_path: Path) -> None:
    """`save` has stock transformers open the folder and compares it."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "bottleneck"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3)).eval()
    pixels = torch.randn(4, 3, SIDE, SIDE)
    with pytest.warns(UserWarning, match="without tuning"):
        int8 = fit(model, PostTrainingQuantConfig(approach="static"), calib_dataloader=[{"pixel_values": pixels}])
    int8.save(tmp_path / "out")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    kept = [module.activation for module in loaded.modules() if isinstance(module, Int8Conv)]
    assert kept == ["static"] * 9
    with torch.inference_mode():
        expected, found, kept_float = (part(pixels).logits for part in (int8, loaded, model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert (found - kept_float).norm() < 0.05 * kept_float.norm()
