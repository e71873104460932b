"""`hfq.compile`: torch.compile for the small batches where calls, and not matmuls, take the time.

A large batch spends its time in oneDNN either way and gains nothing, so it runs as it is. Lengths are rounded up to
buckets, so that a server that sees every length compiles a handful of times, not once a request.
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
from torch.nn import functional as F

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # tokens; an input is padded to the next
MOST_TOKENS = 1024  # batch x length; more is left to eager mode
MOST_SHAPES = 24  # compiled at once; an input of yet another shape is left to eager mode
_TOKENS = ("input_ids", "attention_mask", "token_type_ids")
Model = TypeVar("Model", bound=nn.Module)


def compile(model: Model) -> Model:
    """Compile `model`, in place, for encoder inputs of up to 1024 tokens; others run as before.

    Each shape, a batch size and a length bucket, is compiled when it first comes, which takes 10 to 30 seconds; the
    C++ that results is kept on disk, in `TORCHINDUCTOR_CACHE_DIR` or the cache folder of the Hub's client. Weights
    and scales become constants (freezing), so changing them afterwards has no effect. Without a C++ compiler the
    model is returned as it is, with a warning.

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
    if not isinstance(model.forward, _Buckets):
        model.forward = _Buckets(model)
    return model


class _Buckets:
    """A model's `forward` that compiles small inputs by bucket and gives everything else to the original."""

    def __init__(self, model: nn.Module) -> None:
        self.eager = model.forward
        self.compiled = torch.compile(types.MethodType(type(model).forward, model), dynamic=False)
        self.padding = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
        self.shapes: set[tuple[int, int]] = set()
        functools.update_wrapper(self, self.eager)  # transformers reads the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(_TOKENS, args, strict=False)) | kwargs
        shape = self._bucket(inputs) if len(args) <= 1 else None
        if shape is None:
            return self.eager(*args, **kwargs)
        length = inputs["input_ids"].shape[1]
        if "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        padded = {
            name: F.pad(value, (0, shape[1] - length), value=self.padding if name == "input_ids" else 0)
            for name, value in inputs.items()
        }
        # Frozen weights are ordinary tensors, and inference mode would hand the compiler something else.
        with torch.inference_mode(False), torch.no_grad(), _settings():
            outputs = self.compiled(**{name: value.clone() for name, value in padded.items()})
        for name, value in outputs.items():
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == shape[1] and length != shape[1]:
                outputs[name] = value[:, :length]
        return outputs

    def _bucket(self, inputs: dict[str, Any]) -> tuple[int, int] | None:
        """Batch and bucket of an input that is worth compiling; None for anything unusual."""
        if any(name not in _TOKENS or not isinstance(value, Tensor) for name, value in inputs.items()):
            return None
        ids = inputs.get("input_ids")
        if ids is None or any(value.dim() != 2 or value.shape != ids.shape for value in inputs.values()):
            return None
        batch, length = ids.shape
        bucket = next((size for size in LENGTHS if size >= length), None)
        if not batch or not length or bucket is None or batch * bucket > MOST_TOKENS or torch.is_grad_enabled():
            return None
        if (batch, bucket) not in self.shapes:
            if len(self.shapes) == MOST_SHAPES:
                return None
            self.shapes.add((batch, bucket))
        return batch, bucket


@contextmanager
def _settings() -> Iterator[None]:
    """Inductor's settings while it compiles: constants folded, and no giving up after eight shapes."""
    import torch._dynamo.config
    import torch._inductor.config

    with (
        torch._inductor.config.patch(freezing=True),
        torch._dynamo.config.patch(recompile_limit=2 * MOST_SHAPES),
    ):
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
