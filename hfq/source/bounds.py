"""A model may be no larger than its weights: what a config asks for is counted while the model is built without memory.

transformers builds on the meta device first. A config that wants far more parameters than the headers of the weights
hold is stopped there, before anything is allocated, or after as few layers as are enough to know.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import module as hooks

from ..common.errors import SourceError
from .checkpoint import Checkpoint

# A module may be built in float and again in int8, and has buffers that are in no file.
_TIMES = 4
_MORE_ELEMENTS = 1 << 25
_MORE_TENSORS = 4096


@contextmanager
def bounded(checkpoint: Checkpoint) -> Iterator[None]:
    """For the length of the block, modules on the meta device that outgrow `checkpoint` are refused.

    Raises:
        SourceError: saying by how much.
    """
    held = sum(tensor.elements for tensor in checkpoint.tensors.values())
    most_elements = _TIMES * held + _MORE_ELEMENTS
    most_tensors = _TIMES * len(checkpoint.tensors) + _MORE_TENSORS
    elements = tensors = 0

    def count(_: Any, name: str, tensor: Any) -> None:
        nonlocal elements, tensors
        if tensor is None or not tensor.is_meta:
            return
        elements += tensor.numel()
        tensors += 1
        if elements > most_elements or tensors > most_tensors:
            raise SourceError(
                f"config.json of {checkpoint.info.id} asks for a model that its weights do not hold: {tensors} tensors "
                f"and {elements:.3g} numbers so far (at {name!r}), where the files have {len(checkpoint.tensors)} and "
                f"{held:.3g}. Take both from the same checkpoint."
            )

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_model(checkpoint: Checkpoint, auto_class: str) -> None:
    """Build a checkpoint's model without memory, for where another process will load it.

    Raises:
        SourceError: it is larger than the weights, or transformers cannot build it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.path)
        with torch.device("meta"), bounded(checkpoint):
            getattr(transformers, auto_class).from_config(config)
    except SourceError:
        raise
    except Exception as error:  # transformers raises many types for one cause: these files are not that model
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SourceError(f"transformers cannot build {checkpoint.info.id} as {auto_class}: {message}") from error
