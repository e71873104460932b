"""What models are given that is no text: images and sounds, by the name of their main input, as float32."""

from typing import Any

import torch
from torch import Tensor, nn

NUMBERS = ("pixel_values", "input_features", "input_values")
IMAGE = 224  # pixels, where a config does not say
FRAMES = 8  # that a model of sound waves is to make of an example


def takes_numbers(model: nn.Module) -> bool:
    """Whether its main input is an image or a sound."""
    return getattr(model, "main_input_name", "") in NUMBERS


def example_of(model: Any, batch: int = 1) -> dict[str, Tensor]:
    """Zeros that suit a model that `takes_numbers`, as its config has them: `[batch, *size]`."""
    return {model.main_input_name: torch.zeros(batch, *_size(model.main_input_name, model.config))}


def _size(name: str, config: Any) -> tuple[int, ...]:
    if name == "pixel_values":
        size = getattr(config, "image_size", IMAGE)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return getattr(config, "num_channels", 3), height, width
    bins = getattr(config, "num_mel_bins", None)
    if bins is not None and hasattr(config, "max_source_positions"):  # Whisper, whose frames are halved
        return bins, 2 * config.max_source_positions
    if bins is not None and hasattr(config, "max_length"):  # AST
        return config.max_length, bins
    length = FRAMES  # of what a stack of convolutions makes of a wave, back to that
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        length = (length - 1) * stride + kernel
    return (length,)
