"""Which layers of a model can run in int8, and why the others cannot."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Quantizable:
    """Names in execution order, and the float layers by name with the reason they stay float.

    `pooled`: Linear layers whose input is `[examples, features]`, without tokens.
    """

    linears: tuple[str, ...]
    embeddings: tuple[str, ...]
    float_layers: Mapping[str, str] = field(default_factory=dict)
    pooled: frozenset[str] = frozenset()


def twin(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are the model's own tensors: replace them in it, never write to them."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})


def linear(model: nn.Module, name: str) -> nn.Linear:
    """The Linear of that name."""
    return cast(nn.Linear, model.get_submodule(name))


def embedding(model: nn.Module, name: str) -> nn.Embedding:
    """The Embedding of that name."""
    return cast(nn.Embedding, model.get_submodule(name))


def find_quantizable(model: nn.Module, batch: Batch) -> Quantizable:
    """Run one batch and see which Linear and Embedding layers take part.

    The Linear that makes the logits stays float: it is tiny, and its rounding goes straight into the answer.

    Raises:
        UnsupportedError: no Linear layer can run in int8.
    """
    candidates = {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)}
    called: dict[str, int] = {}  # by name, dimensions of the input

    def note(name: str) -> Callable[..., None]:
        def before_forward(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            called.setdefault(name, args[0].dim())

        return before_forward

    handles = [module.register_forward_pre_hook(note(name)) for name, module in candidates.items()]
    try:
        with torch.inference_mode():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()

    reasons = {name: "not used by the forward pass" for name in candidates if name not in called}
    linears = [name for name in called if isinstance(candidates[name], nn.Linear)]
    if linears:
        reasons[linears.pop()] = "makes the logits"
    reasons |= {name: "shares its weight" for name in _sharing(model, [*called]) if name not in reasons}
    linears = [name for name in linears if name not in reasons]
    if not linears:
        raise UnsupportedError(
            f"{type(model).__name__} has no torch.nn.Linear layer that can run in int8. "
            "hfq quantizes encoders built from torch.nn.Linear and torch.nn.Embedding."
        )
    embeddings = [n for n in called if isinstance(candidates[n], nn.Embedding) and n not in reasons]
    pooled = frozenset(name for name in linears if called[name] == 2)
    return Quantizable(tuple(linears), tuple(embeddings), reasons, pooled)


def _sharing(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Layers whose weight is another module's too (tied embeddings): one int8 copy cannot serve both."""
    owners: dict[int, list[str]] = {}
    for name in names:
        owners.setdefault(id(model.get_submodule(name).weight), []).append(name)
    return [name for group in owners.values() if len(group) > 1 for name in group]
