"""Vectors of images, and of images with texts, from strangers' files to a published model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image, Value
from support.command import forkserver
from support.trained.pictures import NAMES, SIDE, pictures, write_pictures
from torch.nn.functional import one_hot

from hfq.common.errors import DataError
from hfq.source.checkpoint import pull
from hfq.tasks.image.image_embedding import ImageEmbedding, nearest
from hfq.tasks.image.zero_shot_image_classification import ZeroShotImageClassification
from hfq.tasks.registry import make_task

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SEEN = {"image_size": SIDE, "patch_size": 8}
WORDS = ["<pad>", "<unk>", *["this", "is", "a", "photo", "of", "."], *NAMES, "<end>"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP that knows three colours by their names."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", len(WORDS) - 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", model_max_length=16
    )
    text = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": len(WORDS) - 1}
    config = transformers.CLIPConfig(text_config=text, vision_config={**SIZES, **SEEN}, projection_dim=16)
    model = transformers.CLIPModel(config)
    processor = transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    shown = list(pictures(240, seed=9))
    pixels = processor([picture for picture, _ in shown], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([label for _, label in shown])
    texts = tokenizer([f"This is a photo of {name}." for name in NAMES], padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for start in list(range(0, 240, 48)) * 12:
        logits = model(
            input_ids=texts["input_ids"],
            attention_mask=texts["attention_mask"],
            pixel_values=pixels[start : start + 48],
        )
        torch.nn.functional.cross_entropy(logits.logits_per_image, labels[start : start + 48]).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = save(model.eval(), tmp_path_factory.mktemp("clip") / "clip-colours")
    tokenizer.save_pretrained(folder)
    return folder


def test_images_are_told_by_their_neighbours(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = save(transformers.ViTModel(transformers.ViTConfig(**SIZES, **SEEN)), tmp_path / "vit-random")
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["pipeline_tag"]) == ("image-embedding", "image-feature-extraction")
    assert report["metric"] == "nearest_neighbour_accuracy"
    assert report["baseline"]["accuracy"] > 0.5
    assert report["quantized"]["accuracy"] >= report["baseline"]["accuracy"] * 0.99
    assert report["held_out_stock"]["agreement"] > 0.99
    assert "the nearest other one is the same" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_that_masks_at_random_is_compared_on_the_same_masks(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(**SIZES, **SEEN, mask_ratio=0.5)
    checkpoint = save(transformers.ViTMAEModel(config), tmp_path / "mae-random")
    flags = ["--metric", "fidelity", "--approach", "dynamic", "--allow-loss", "--output", "out", "--json"]
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, *flags, cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert min(report["quantized"]["accuracy"], report["held_out_stock"]["agreement"]) > 0.99
    assert report["trials"][0]["output_error"] < 1e-3


def test_texts_are_told_by_images(clip: Path, data: Path, tmp_path: Path) -> None:
    done = forkserver().hfq("quantize", clip, "--dataset", data, "--output", "out", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["pipeline_tag"]) == ("zero-shot-image-classification",) * 2
    assert report["baseline"]["accuracy"] > 0.8
    assert report["held_out_stock"]["agreement"] > 0.9
    towers = {name.split("_")[0] for name in [*report["layers"]["static"], *report["layers"]["dynamic"]]}
    assert {"text", "vision"} <= towers
    model = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    pixels = torch.randn(2, 3, SIDE, SIDE)
    expected = transformers.CLIPModel.from_pretrained(clip).get_image_features(pixel_values=pixels).pooler_output
    found = model.get_image_features(pixel_values=pixels).pooler_output  # by itself, not by way of `forward`
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99


def test_the_nearest_other_image_decides() -> None:
    vectors = [torch.tensor(row) for row in ([1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 2.0])]
    assert nearest(torch.stack(vectors)).tolist() == [1, 0, 3, 2]
    task = ImageEmbedding({})
    assert task.score("nearest_neighbour_accuracy", vectors, ["a", "a", "b", "c"]) == 0.5
    assert task.per_example(vectors, ["a", "a", "b", "c"]).tolist() == [True, True, False, False]
    assert task.fidelity(vectors, vectors) == pytest.approx(1)


def test_each_image_is_among_all_texts_that_differ() -> None:
    task = ZeroShotImageClassification({})
    places = one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    texts = one_hot(torch.tensor([0, 2, 1, 0]), 3).float()
    outputs = list(torch.stack([places, texts], 1))
    assert task.score("accuracy", outputs, ["a", "b", "c", "a"]) == 0.5
    assert task.score("top5_accuracy", outputs, ["a", "b", "c", "a"]) == 1
    assert task.fidelity(outputs, outputs) == 1


def test_labels_become_texts_and_captions_are_some(clip: Path) -> None:
    task = make_task(pull(str(clip)).config)
    picture = next(pictures(1, seed=4))[0]
    image = {"image": [picture] * 2}
    classes = Features({"image": Image(), "label": ClassLabel(names=["a_cat", "dog"])})
    captions = Features({"image": Image(), "caption": [Value("string")]})
    by_label = Dataset.from_dict({**image, "label": [0, 1]}, classes)
    by_text = Dataset.from_dict({**image, "caption": [["a red cat", "a cat"], ["a dog"]]}, captions)
    columns = [task.columns(rows.features, {}) for rows in (by_label, by_text)]
    assert task.references(by_label, columns[0], None) == ["This is a photo of a cat.", "This is a photo of dog."]
    assert task.references(by_text, columns[1], None) == ["a red cat", "a dog"]
    with pytest.raises(DataError, match="one text for all"):
        task.align([by_label.select([0])], columns[0])


def test_an_architecture_that_stock_transformers_cannot_open_is_refused_at_once(data: Path, tmp_path: Path) -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**{**SIZES, "mlp_ratio": 2}, **SEEN))
    checkpoint = save(model, tmp_path / "dinov2")
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", cwd=tmp_path)
    assert done.code == 2
    assert "opens no compressed-tensors checkpoint of Dinov2Model" in done.err
    assert not (tmp_path / "out").exists()
