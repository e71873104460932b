"""How far an int8 folder's outputs are from the float model's: through hfq, and through stock transformers."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hfq.runtime.loading.stock import stock_transformers

Inputs = tuple[str, dict[str, Tensor]]
SHAPES = ((64, 2), (16, 17), (1, 40), (4, 128), (2, 600))


def token_inputs(words: int, *, left: bool = False, shapes: Sequence[tuple[int, int]] = SHAPES) -> Iterator[Inputs]:
    """By name, random tokens below `words` of each shape: without padding, and with some in every row but the first.

    `left`: padding comes first, as who reads the last token wants it.
    """
    for batch, length in shapes:
        ids = torch.randint(5, words, (batch, length), generator=torch.Generator().manual_seed(length))
        yield f"{batch}x{length}", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if batch > 1:
            lengths = torch.linspace(length, length // 3 or 1, batch).round()[:, None]
            mask = (torch.arange(length) < lengths).long()
            mask = mask.flip(1) if left else mask
            yield f"{batch}x{length}, padded", {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}


def compared(model: Any, floats: Any, folder: Path, inputs: Iterable[Inputs]) -> list[float]:
    """The error of `model`, of `floats` in int8, over that of `folder` where hfq is not installed; for each input."""
    with stock_transformers():
        stock = type(floats).from_pretrained(folder).eval()
    found = []
    for _, given in inputs:
        expected = _outputs(floats, given)
        theirs = (_outputs(stock, given) - expected).norm()
        found.append(float((_outputs(model, given) - expected).norm() / theirs))
    return found


@torch.inference_mode()
def _outputs(model: Any, given: dict[str, Tensor]) -> Tensor:
    """float32 `[tokens, features]` of what is no padding, or of examples."""
    takes = inspect.signature(model.forward).parameters
    outputs = model(**{name: value for name, value in given.items() if name in takes})
    first = next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)).float()
    mask = given.get("attention_mask")
    return first[mask.bool()] if mask is not None and first.shape[:2] == mask.shape else first.flatten(0, -2)
