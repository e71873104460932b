"""How far the outputs of what was compiled are from the model's own. Compilers have faults, and those of a graph show in its first outputs."""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

BOUND = 0.15  # of an output's size. Codes that round another way, and bfloat16, mostly make less than 0.05 of it
OTHERS = 8  # inputs made of the first one, of which the mean difference counts if that of the first is too large
TIMES = 2  # as far as the model's own outputs move where bfloat16 is rounded to
MOST = 0.75  # of their size, however far that is

Forward = Callable[[Tensor], Any]


class Reference(Protocol):
    """The model itself, uncompiled."""

    def __call__(self, inputs: Tensor, /) -> Any: ...

    def rounded(self, inputs: Tensor, /) -> Any:
        """Its outputs where all that its int8 layers read is rounded to bfloat16 first."""


def differs(compiled: Forward, model: Forward, inputs: Tensor, *, rounded: Forward | None = None) -> float | None:
    """By how much of their size the outputs to `inputs` differ, at the tensor with the most, if that is too much.

    A single output may be close to zero, or have a code at an edge, by chance. So other inputs decide then. And some
    models multiply what is rounded: of all-MiniLM-L6-v2, two roundings are as far from each other as from its floats.
    `rounded`: as a `Reference` has it.
    """
    pairs = [(_outputs(compiled, inputs), _outputs(model, inputs))]
    if _difference(pairs) <= BOUND:
        return None
    all_inputs = [inputs.roll(by, -1).contiguous() for by in range(OTHERS)]
    pairs += [(_outputs(compiled, x), _outputs(model, x)) for x in all_inputs[1:]]
    found = _difference(pairs)
    bound = BOUND
    if found > bound and rounded is not None:
        moved = _difference([(_outputs(rounded, x), y) for x, (_, y) in zip(all_inputs, pairs, strict=True)])
        bound = min(TIMES * moved, MOST)
    return None if found <= bound else found


def _outputs(forward: Forward, inputs: Tensor) -> list[Tensor]:
    """To a copy of `inputs`, as a model may write into them."""
    return [leaf.detach().clone() for leaf in tree_leaves(forward(inputs.clone())) if isinstance(leaf, Tensor)]


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
