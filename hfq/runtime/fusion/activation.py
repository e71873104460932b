"""An activation function as part of the matmul before it: a post-op, in oneDNN's words.

Which function a module computes, and that its parent gives it what a layer returns and nothing else, is found by asking
them: no list of classes. Only siblings are looked at.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ..int8.known_forward import KnownForward, is_as_made
from ..int8.linear import Int8Linear
from ..kernels.kernel import PostOp, apply_post_op
from .probe import noise, output_of

_EXAMPLES = (*(i / 8 for i in range(-48, 49)), -1e4, -100, -12, -8, 8, 12, 100, 1e4)  # some functions clip


class FusedActivation(nn.Module):
    """An activation function that the layer before it has computed already, in forwards in which they are fused."""

    def __init__(self, activation: nn.Module, known: KnownForward) -> None:
        super().__init__()
        self.activation, self.known = activation, known
        self.training = activation.training

    def forward(self, x: Tensor) -> Tensor:
        """The same, or what the function makes of it."""
        if self.known.fuses:
            return x
        y: Tensor = self.activation(x)
        return y


def fuse_activations(model: nn.Module, known: KnownForward) -> None:
    """Replace activation functions by post-ops of the Linear before each, a sibling. Parents that are alike are tried once."""
    tried: list[tuple[list[Any], list[tuple[str, str, PostOp]]]] = []
    for parent in list(model.modules()):
        linears = [name for name, child in parent.named_children() if isinstance(child, Int8Linear)]
        functions = [name for name, child in parent.named_children() if _may_be_activation(child)]
        if not linears or not functions or not is_as_made(parent):
            continue
        form = _form(parent)
        found = next((found for other, found in tried if _are_alike(form, other)), None)
        if found is None:
            found = _find_activations(parent, linears, functions)
            tried.append((form, found))
        for linear, function, post_op in found:
            getattr(parent, linear).post_op = post_op
            setattr(parent, function, FusedActivation(getattr(parent, function), known))


def _find_activations(
    parent: nn.Module, linears: Sequence[str], functions: Sequence[str]
) -> list[tuple[str, str, PostOp]]:
    """Which of `functions` can be post-ops, of which of `linears`: names of children of `parent`."""
    free = [name for name in linears if getattr(parent, name).is_plain]
    found: list[tuple[str, str, PostOp]] = []
    for function in functions:
        post_op = _post_op(getattr(parent, function))
        linear = next((name for name in free if post_op and _is_behind(parent, getattr(parent, name), function)), None)
        if post_op and linear:
            free.remove(linear)
            found.append((linear, function, post_op))
    return found


def _form(parent: nn.Module) -> list[Any]:
    """What the forward of `parent` depends on beside weights, as it is now."""
    children = parent.named_children()
    own = {name: value for name, value in vars(parent).items() if name != "_modules"}
    return [type(parent), own, *((name, type(child), _without_weights(child)) for name, child in children)]


def _without_weights(child: nn.Module) -> dict[str, Any]:
    weights = ("_parameters", "_in_file_at") if isinstance(child, Int8Linear) else ()
    return {name: value for name, value in vars(child).items() if name not in weights}


def _are_alike(form: list[Any], other: list[Any]) -> bool:
    try:
        return form == other
    except (RuntimeError, ValueError):  # tensors and arrays do not say in one word whether they are equal
        return False


def _may_be_activation(module: nn.Module) -> bool:
    return not (module._parameters or module._modules or isinstance(module, nn.Dropout | nn.Identity | FusedActivation))


def _is_behind(parent: nn.Module, linear: Int8Linear, name: str) -> bool:
    """Whether the function `name` is applied to what `linear` returns and to nothing else."""
    activation = getattr(parent, name)
    # Without oneDNN if that will do, as below; and of tokens in rows where a parent attends.
    for dtype, rows in product((torch.float64, torch.float32), (slice(None), None)):
        x, y = noise(linear.in_features, dtype=dtype)[rows], noise(linear.out_features, dtype=dtype)[rows]
        before = output_of(parent, x, outputs={linear: y})
        if before is None:
            continue
        setattr(parent, name, nn.Identity())
        after = output_of(parent, x, outputs={linear: activation(y.clone())})
        setattr(parent, name, activation)
        return after is not None and torch.equal(before, after)
    return False


def _post_op(module: nn.Module) -> PostOp | None:
    """Which function a parameterless module computes, found by asking it.

    In float64, which is torch's own loop: oneDNN's of float32 takes milliseconds to get ready.
    """
    x = torch.tensor(_EXAMPLES, dtype=torch.float64)
    y = output_of(module, x)
    if y is None or y.shape != x.shape or not y.is_floating_point():
        return None
    outputs = y.tolist()  # and plain numbers: a first `allclose` takes as long again
    for name in get_args(PostOp):
        pairs = zip(apply_post_op(x.clone(), name).tolist(), outputs, strict=True)
        if all(math.isclose(expected, output, rel_tol=1e-5, abs_tol=1e-6) for expected, output in pairs):
            return cast(PostOp, name)
    return None
