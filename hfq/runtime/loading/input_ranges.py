"""Input scales and zero points in config.json, of a checkpoint that stock transformers widens to float.

As tensors they would have no place in the float model, and transformers would list each as unexpected.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ...common.errors import SourceError
from ...common.names import INPUT_RANGES
from ..int8.packed import PackedModule, frozen

TENSORS = ("input_scale", "input_zero_point")

Ranges = Mapping[str, Sequence[float]]


def input_ranges(model: nn.Module) -> dict[str, list[float]]:
    """Of the static layers of `model`. A float32 scale is written with all of its digits."""
    return {
        name: [getattr(module, tensor).item() for tensor in TENSORS]
        for name, module in model.named_modules()
        if isinstance(module, PackedModule) and getattr(module, "activation", "") == "static"
    }


def take_ranges(model: nn.Module, ranges: Ranges) -> None:
    """Make the int8 layers of `model` that have `ranges` static. A prefix may be added to names or missing, as of tensors.

    `save_pretrained` of `model` leaves them to config.json again.

    Raises:
        SourceError: they are no scales and zero points.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, module in model.named_modules():
        names = (name, name.removeprefix(prefix), prefix + name)
        found = next((ranges[known] for known in names if known in ranges), None)
        if found is None or not isinstance(module, PackedModule):
            continue
        try:
            scale, zero_point = found
            module.input_scale = frozen(torch.tensor([scale], dtype=torch.float32))
            module.input_zero_point = frozen(torch.tensor([zero_point], dtype=torch.int8))
        except (TypeError, ValueError, RuntimeError) as error:
            raise SourceError(
                f"{INPUT_RANGES} of config.json has no scale and zero point of {name}: {error}."
            ) from error
        module.activation = "static"  # type: ignore[assignment]
        if isinstance(model, PreTrainedModel):
            model._keys_to_ignore_on_save.update(f"{name}.{tensor}" for tensor in TENSORS)  # type: ignore[union-attr]
