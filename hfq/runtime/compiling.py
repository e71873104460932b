"""`hfq.compile`: torch.compile between the matmuls, which oneDNN runs either way.

It is compiled for any batch and length at once, so a server that sees every shape compiles once for single inputs and
once for batches, not once a request.
"""

import functools
import os
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .fusion import finish_fusing
from .modules import pack_all
from .slicing import TOKENS, SlicedForward, is_token_batch

Model = TypeVar("Model", bound=nn.Module)


def compile(model: Model) -> Model:
    """Compile `model`, in place, for encoder inputs of any shape; what is unusual about other inputs runs as before.

    The first single input and the first batch are compiled when they come, which takes 10 to 40 seconds each; the C++
    that results is kept on disk, in `TORCHINDUCTOR_CACHE_DIR` or the cache folder of the Hub's client. Weights and
    scales become constants (freezing), so changing them afterwards has no effect. Without a C++ compiler the model is
    returned as it is, with a warning.

    Example:
        >>> model = hfq.compile(hfq.load("me/bert-mrpc-int8"))
    """
    _keep_on_disk()
    if not has_compiler():
        warnings.warn(
            "hfq.compile needs a C++ compiler (g++ or clang++, or its path in CXX) and found none: "
            "the model runs uncompiled, with the same answers.",
            stacklevel=2,
        )
        return model
    finish_fusing(model)
    pack_all(model)  # what is packed while it is traced would be packed again each time
    forward = model.forward
    if isinstance(forward, SlicedForward):
        if not isinstance(forward.forward, _Compiled):
            forward.forward = _Compiled(model, forward.forward)
    elif not isinstance(forward, _Compiled):
        model.forward = _Compiled(model, forward)
    return model


class _Compiled:
    """A model's `forward` that compiles token batches and gives everything else to the original."""

    def __init__(self, model: nn.Module, eager: Any) -> None:
        self.eager = eager
        self._own = types.MethodType(type(model).forward, model)
        # Guards on modules would be checked at each call, for a tenth of the time that a single input takes.
        guards: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self._compiled = torch.compile(self._unstacked, options=guards)
        functools.update_wrapper(self, self._own)  # transformers reads its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(TOKENS, args, strict=False)) | kwargs
        if len(args) > 1 or torch.is_grad_enabled() or not is_token_batch(inputs) or inputs["input_ids"].shape[1] < 2:
            return self.eager(*args, **kwargs)
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        names = tuple(sorted(inputs))
        # Frozen weights are ordinary tensors, and inference mode would hand the compiler something else.
        with torch.inference_mode(False), torch.no_grad(), _settings():
            stacked = torch.stack([inputs[name].long() for name in names])
            for dimension in (1, 2) if stacked.shape[1] > 1 else (2,):
                torch._dynamo.maybe_mark_dynamic(stacked, dimension)
            return self._compiled(names, stacked)

    def _unstacked(self, names: tuple[str, ...], inputs: Tensor) -> Any:
        """The model on `inputs`, int64 `[names, batch, length]`: one tensor, so that all have the same dynamic shape."""
        return self._own(**dict(zip(names, inputs.unbind(), strict=True)))


@contextmanager
def _settings() -> Iterator[None]:
    """Inductor's setting while it compiles: constants folded."""
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True):
        yield


def _keep_on_disk() -> None:
    """Have inductor keep what it compiles in the Hub client's cache, unless the user named a folder.

    Its own default, which it writes into the environment when it is imported, is a temporary folder.
    """
    from huggingface_hub import constants
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(constants.HF_HOME) / "hfq" / "compiled")


def has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        return False
    return True
