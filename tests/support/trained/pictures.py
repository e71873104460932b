"""Small pictures of noise in which one colour is a little stronger: models learn them in seconds."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image as Pillow
from PIL.Image import Image as Picture

SIDE = 16
NAMES = ["red", "green", "blue"]
COUNTS = {"train": 60, "validation": 90, "test": 60}


def pictures(count: int, *, seed: int) -> Iterator[tuple[Picture, int]]:
    """Noise in which one colour is a little stronger."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        pixels = torch.randint(0, 200, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
        pixels[..., i % 3] += 40
        yield Pillow.fromarray(pixels.numpy()), i % 3


def write_pictures(folder: Path) -> Path:
    for seed, (split, count) in enumerate(COUNTS.items(), 1):
        for i, (picture, label) in enumerate(pictures(count, seed=seed)):
            path = folder / split / NAMES[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return folder
