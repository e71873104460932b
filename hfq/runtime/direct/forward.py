"""The `forward` of a model of int8 convolutions, as steps that are found out for each size of image that comes."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ...common.memory import return_freed_memory
from ..compiling.difference import differs
from ..int8.conv import Int8Conv
from ..int8.known_forward import FUSED, FusedForward, runs_known_code
from ..int8.packed import PACKING, PackedModule
from .plan import Plan, planned
from .program import OtherStepsError, Program, Value, program_of

PATCHES = 2  # convolutions, or fewer, that make patches for a transformer: it is worth more to compile that
SIZES = 8  # of images that steps are kept for
NUMBERS = 1 << 20  # of images that run together: their activations stay in caches
_log = logging.getLogger(__name__)


def run_directly(model: nn.Module) -> None:
    """Let `model`, and transformers' models in it, run their int8 convolutions so, if it has any."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, FusedForward) and forward.compiled is None and _suits(module):
            forward.compiled = DirectForward(forward)


def _suits(model: nn.Module) -> bool:
    """Whether it has more int8 convolutions than make patches, and does nothing else but compute an output."""
    convolutions = [module for module in model.modules() if isinstance(module, Int8Conv)]
    found = sum(layer.activation == "static" and len(layer.kernel_size) == 2 for layer in convolutions)
    return found > PATCHES and all(map(runs_known_code, model.modules()))


class DirectForward:
    """What runs on images in the place of a model's own forward. `entry`: that of the model.

    Anything else is given back to it: further arguments, other types than float32, and what has no such steps.
    """

    def __init__(self, entry: FusedForward) -> None:
        self._entry = entry
        self._found: dict[tuple[int, ...], _Steps | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return DirectForward, (self._entry,)

    def prepare(self) -> bool:
        """Whether it can run: always, as it asks no compiler."""
        return True

    def say_why(self, reason: str) -> None:
        """Nothing: a call that is given back runs as the model does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or len(kwargs) != 1 or _search.under_way or self._entry.model.training:
            return self._entry.forward(*args, **kwargs)
        ((name, images),) = kwargs.items()
        if not _is_plain(images):
            return self._entry.forward(**kwargs)
        with torch.no_grad(), self._entry.known.running(FUSED):
            steps = self._steps(name, images)
            return self._entry.forward(**kwargs) if steps is None else steps(images)

    def _steps(self, name: str, images: Tensor) -> "_Steps | None":
        size = tuple(images.shape[1:])
        steps = self._found.get(size)
        if size not in self._found or (steps is not None and not steps.hold()):
            with PACKING:
                if len(self._found) >= SIZES:
                    del self._found[next(iter(self._found))]
                steps = self._found[size] = self._find(name, size)
        return steps

    def _find(self, name: str, size: tuple[int, ...]) -> "_Steps | None":
        """The steps for images of a size; None if there are none that have the model's outputs."""

        def own(images: Tensor) -> Any:
            return self._entry.forward(**{name: images})

        try:
            with _searching(), _disable_current_modes():
                steps = _Steps(self._entry.model, program_of(self._entry.model, own, size))
                if differs(steps, own, torch.rand(3, *size)) is not None:
                    raise OtherStepsError
                steps.look()
                return_freed_memory()
                return steps
        except OtherStepsError:
            _log.info("%s runs module by module: its steps depend on its input", type(self._entry.model).__name__)
        except Exception as error:  # the model's own code: what is wrong with the input, it says when it is called
            _log.info("%s runs module by module: %s", type(self._entry.model).__name__, error)
        return None


class _Steps:
    """A plan, with the form of what the model returns, and the tensors that it was made of."""

    def __init__(self, model: nn.Module, program: Program) -> None:
        self._model = model
        self._program = program
        self._plan: Plan = planned(program)
        self._tensors: list[tuple[dict[str, Any], str, Any, int]] = []

    def look(self) -> None:
        """Take the model's tensors as they are now for those that it was made of."""
        for module in self._model.modules():
            is_packed = isinstance(module, PackedModule)
            places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            found = [(place, name) for place in places for name in place if not (is_packed and name == "weight")]
            self._tensors += [(tensors, name, tensors[name], _version(tensors[name])) for tensors, name in found]
            if is_packed:
                self._tensors.append((module.__dict__, "_packed", module._packed, 0))

    def hold(self) -> bool:
        """Whether they are still the same."""
        return all(
            tensors.get(name) is tensor and _version(tensor) == version
            for tensors, name, tensor, version in self._tensors
        )

    def __call__(self, images: Tensor) -> Any:
        """The model's outputs. Images run in parts, if each output is of one image."""
        images = images.detach()
        at_once = (
            max(1, NUMBERS // max(1, images[0].numel())) if self._program.by_image and len(images) else len(images)
        )
        parts = [self._plan.run(part) for part in (images.split(at_once) if len(images) > at_once else [images])]
        leaves = [self._joined(leaf, parts, images) for leaf in self._program.leaves]
        return pytree.tree_unflatten(leaves, self._program.form)

    @staticmethod
    def _joined(leaf: Any, parts: list[list[Tensor | None]], images: Tensor) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        found = [values[leaf.number] for values in parts]
        return found[0] if len(found) == 1 else torch.cat(found)  # type: ignore[arg-type]


def _is_plain(images: Any) -> bool:
    return (
        isinstance(images, Tensor)
        and images.dim() == 4
        and images.dtype == torch.float32
        and images.device.type == "cpu"
        and len(images) > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _version(tensor: Any) -> int:
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else 0


class _Search(threading.local):
    """`under_way`: this thread asks a model for its steps, so none of its parts is to run as steps."""

    under_way = False


_search = _Search()


@contextmanager
def _searching() -> Iterator[None]:
    _search.under_way = True
    try:
        yield
    finally:
        _search.under_way = False
