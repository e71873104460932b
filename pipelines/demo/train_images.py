"""Train the demo image model: a small ViT that tells Fashion-MNIST's ten kinds of clothes.

It is here so that the demo recipe of images has a real model without a network. It is not part of `hfq`. Repeat it
(three minutes on one CPU core, no network; `apt-get install dataset-fashion-mnist`); it writes the slices, too:

    python pipelines/demo/train_images.py
"""

import argparse
import gzip
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import fromarray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, set_seed

HERE = Path(__file__).parent
KINDS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SIDE = 28
HELD_OUT = 5000  # the last of the training images, which choose nothing and train nothing
KEPT = {"train": 300, "validation": 500, "test": 500}  # in the files


def read(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Pixels uint8 `[images, 28, 28]` and labels int64 `[images]`, of files in IDX format."""
    pixels = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
    return (
        torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, SIDE, SIDE),
        torch.frombuffer(bytearray(labels), dtype=torch.uint8).long(),
    )


def write_slice(path: Path, pixels: Tensor, labels: Tensor) -> None:
    """Parquet, as `datasets` has images."""
    rows = {"image": [fromarray(image.numpy()) for image in pixels], "label": labels.tolist()}
    Dataset.from_dict(rows, Features({"image": Image(), "label": ClassLabel(names=KINDS)})).to_parquet(path)


def prepared(pixels: Tensor) -> Tensor:
    """float32 `[images, 3, 28, 28]`, as the image processor makes them."""
    return (pixels[:, None].float() / 255 - 0.5).div_(0.5).expand(-1, 3, -1, -1)


@torch.no_grad()
def accuracy(model: ViTForImageClassification, pixels: Tensor, labels: Tensor) -> float:
    model.eval()
    answers = torch.cat([model(pixel_values=prepared(part)).logits.argmax(1) for part in pixels.split(500)])
    return (answers == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo image model.")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=Path, default=HERE / "vit-tiny-fashion-mnist")
    parser.add_argument("--images", type=Path, default=HERE / "images")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # one thread: the sums are added in one order
    set_seed(args.seed)
    known, labels = read(args.source, "train")
    splits = {
        "train": (known[:-HELD_OUT], labels[:-HELD_OUT]),
        "validation": (known[-HELD_OUT:], labels[-HELD_OUT:]),
        "test": read(args.source, "t10k"),
    }
    args.images.mkdir(exist_ok=True)
    for split, (pixels, right) in splits.items():
        write_slice(args.images / f"{split}.parquet", pixels[: KEPT[split]], right[: KEPT[split]])

    config = ViTConfig(
        image_size=SIDE,
        patch_size=7,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        id2label=dict(enumerate(KINDS)),
        label2id={kind: number for number, kind in enumerate(KINDS)},
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    pixels, right = splits["train"]
    steps = args.epochs * -(-len(pixels) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(args.epochs):
        model.train()
        for rows in torch.randperm(len(pixels)).split(128):
            images = prepared(pixels[rows])
            mirrored = torch.rand(len(rows)) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
            cross_entropy(model(pixel_values=images).logits, right[rows], label_smoothing=0.05).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: validation accuracy {accuracy(model, *splits['validation']):.4f}", flush=True)
    model.half().save_pretrained(args.output)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(args.output)
    model = ViTForImageClassification.from_pretrained(args.output, dtype=torch.float32)
    for split in ("validation", "test"):
        whole, (pixels, right) = accuracy(model, *splits[split]), splits[split]
        kept = accuracy(model, pixels[: KEPT[split]], right[: KEPT[split]])
        print(f"{split}: accuracy {whole:.4f}, of the {KEPT[split]} in the file {kept:.4f}", flush=True)
    print(f"{model.num_parameters()} parameters")


if __name__ == "__main__":
    main()
