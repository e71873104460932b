"""How far the outputs of what was compiled are from the model's own. Compilers have faults, and those of a graph show in its first outputs."""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

BOUND = 0.15  # of an output's size. Codes that round another way, and bfloat16, mostly make less than 0.05 of it
OTHERS = 8  # inputs made of the first one, of which the mean difference counts if that of the first is too large

Forward = Callable[[Tensor], Any]


def differs(compiled: Forward, eager: Forward, inputs: Tensor) -> float | None:
    """By how much of their size the outputs to `inputs` differ, at the tensor with the most, if that is too much.

    A single output may be close to zero, or have a code at an edge, by chance. So other inputs decide then.
    """
    first = _outputs(compiled, eager, inputs)
    if _difference([first]) <= BOUND:
        return None
    others = (inputs.roll(by, -1).contiguous() for by in range(1, OTHERS))
    found = _difference([first, *(_outputs(compiled, eager, other) for other in others)])
    return None if found <= BOUND else found


def _outputs(compiled: Forward, eager: Forward, inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    # Copies of the inputs, as a model may write into them.
    return _tensors(compiled(inputs.clone())), _tensors(eager(inputs.clone()))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _difference(outputs: Sequence[tuple[list[Tensor], list[Tensor]]]) -> float:
    """Of the tensor that differs most; infinite where they are not of the same number and shape."""
    if any([x.shape for x in found] != [x.shape for x in expected] for found, expected in outputs):
        return math.inf
    pairs = (zip(found, expected, strict=True) for found, expected in outputs)
    return max(chain((0.0,), map(_of_one_tensor, zip(*pairs, strict=True))))


def _of_one_tensor(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """`pairs`: of what was compiled and of the model, for each input."""
    found, expected = (torch.cat([x.flatten() for x in side]) for side in zip(*pairs, strict=True))
    if not found.is_floating_point():
        return float(found.ne(expected).float().mean()) if len(found) else 0.0
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return math.inf
    found, expected = found[finite].double(), expected[finite].double()
    return float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))
