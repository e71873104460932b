"""What a module returns for made-up numbers, int8 layers stood in for: how a fusion is proved equal."""

import inspect
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..int8.linear import Int8Linear
from .flow import standing_in


def output_of(module: nn.Module, *inputs: Tensor, outputs: Mapping[Int8Linear, Tensor] | None = None) -> Tensor | None:
    """What `module` returns where int8 layers return what `outputs` says, and else the mean of their input."""

    def stand_in(layer: Int8Linear, x: Tensor) -> Tensor:
        if layer in (outputs or {}):
            return outputs[layer].clone()  # type: ignore[index]
        return x.float().mean(-1, keepdim=True).repeat(*[1] * (x.dim() - 1), layer.out_features)

    try:
        with torch.inference_mode(), standing_in(module.modules(), stand_in):
            y = module(*(x.clone() for x in inputs), **_missing(module, len(inputs)))  # some write into what they get
    except Exception:  # a forward that wants other arguments: not a module this can be done to
        return None
    return y if isinstance(y, Tensor) else None


def _missing(module: nn.Module, given: int) -> dict[str, None]:
    """Nothing for what else a forward must be called with, such as a mask that may be None (layers of Whisper, of BART)."""
    parameters = list(inspect.signature(module.forward).parameters.values())[given:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return dict.fromkeys((p.name for p in needed), None)


@lru_cache(maxsize=16)
def noise(features: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dtype`, `[4, features]`."""
    return torch.randn(4, features, generator=torch.Generator().manual_seed(seed), dtype=dtype)
