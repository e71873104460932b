"""Have what a model will be called with compiled before anybody waits for it: in an image's build, a CI job, a first deploy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common.errors import UnsupportedError, UsageError
from ..inputs import example_of, takes_numbers
from .compile import compile, kept_for
from .graphs import LIBRARY

_SEED = 0


def warm(model: nn.Module, shape: tuple[int, int], *, names: Sequence[str]) -> list[Path]:
    """Compile `model` for inputs of `names`, `[batch, length]` of `shape`, and for any others that the same graph takes.

    Images have the model's own size, so that of `shape` only the batch counts.

    Returns: the folders in which what is compiled for the model is kept.

    Raises:
        UsageError: the model cannot be called with such inputs.
        UnsupportedError: nothing is kept that the model would run for them.
    """
    compile(model)
    try:
        with torch.inference_mode():
            model(**_example(model, shape, names))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{type(model).__name__} cannot be called with {_said(shape)} of {', '.join(names)}: {error}"
        ) from error
    folders = kept_for(model)
    if not any(path for folder in folders for path in folder.glob(f"*/{LIBRARY}")):
        raise UnsupportedError(
            f"{type(model).__name__} cannot be compiled ahead for {_said(shape)}: nothing was kept. Warnings above say why."
        )
    return folders


def _said(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


def _example(model: Any, shape: tuple[int, int], names: Sequence[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    config = model.config
    if takes_numbers(model):
        found = example_of(model, shape[0])
        return {name: torch.randn(x.shape, generator=generator) for name, x in found.items()}
    found = {name: torch.zeros(shape, dtype=torch.long) for name in names}
    found["attention_mask"] = torch.ones(shape, dtype=torch.long)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    padding = getattr(config, "pad_token_id", None)
    found["input_ids"] = ids if padding is None else ids.where(ids.ne(padding), (padding + 1) % config.vocab_size)
    if type(model).__name__.endswith("ForMultipleChoice"):
        return {name: tokens[:, None] for name, tokens in found.items()}  # one choice each
    return found
