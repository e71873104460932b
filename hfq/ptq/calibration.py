"""Calibration: run the float model over a slice and keep what observers need, batch by batch.

Memory does not grow with the slice: two passes, one for the extremes, one for histograms between them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..common.memory import weights_left_in_file
from ..runtime.fusion.slicing import in_parts
from ..runtime.fusion.snapshot import drawing_alike, unchanged
from .inputs import Batch
from .layers import CONVOLUTIONS, layer_input
from .observers import BINS, InputStatistics

MOMENTUM = 0.9  # of the moving averages
# Name, layer, real inputs [n, in] and outputs [n, out]; a convolution's are left in the shape it has them.
Watch = Callable[[str, nn.Module, Tensor, Tensor], None]
Statistics = Mapping[str, InputStatistics]  # by layer name


def calibrate(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Batch],
    *,
    track: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> Statistics:
    """Observe the inputs of `layers` over `batches`. Where a batch has an `attention_mask`, padding is left out.

    `track` wraps the batches of each pass, for a progress bar.
    """
    ranges: dict[str, InputStatistics] = {}

    def see_range(name: str, layer: nn.Module, x: Tensor, _: Tensor) -> None:
        x = as_rows(layer, x)
        low, high = x.amin(0), x.amax(0)
        seen = ranges.get(name)
        if seen is None:
            ranges[name] = InputStatistics(low, high, low.min().item(), high.max().item(), torch.zeros(BINS))
            return
        seen.channel_min = torch.minimum(seen.channel_min, low)
        seen.channel_max = torch.maximum(seen.channel_max, high)
        seen.average_min = MOMENTUM * seen.average_min + (1 - MOMENTUM) * low.min().item()
        seen.average_max = MOMENTUM * seen.average_max + (1 - MOMENTUM) * high.max().item()

    def see_histogram(name: str, _: nn.Module, x: Tensor, __: Tensor) -> None:
        stats = ranges[name]
        if stats.high > stats.low:
            stats.histogram += torch.histc(x, bins=BINS, min=stats.low, max=stats.high)

    watch(model, layers, track(batches), see_range, outputs=False)
    watch(model, layers, track(batches), see_histogram, outputs=False)
    return ranges


def sensitivity(model: nn.Module, twins: Mapping[str, nn.Module], batches: Sequence[Batch]) -> dict[str, float]:
    """Each layer's own int8 output error, squared and relative to its output, from one pass of the float model."""
    error: dict[str, float] = dict.fromkeys(twins, 0.0)
    power: dict[str, float] = dict.fromkeys(twins, 0.0)

    def compare(name: str, _: nn.Module, x: Tensor, y: Tensor) -> None:
        error[name] += twins[name](x).sub_(y).square_().sum().item()
        power[name] += y.square().sum().item()

    watch(model, list(twins), _parts(model, batches), compare)
    return {name: error[name] / max(power[name], 1e-30) for name in twins}


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder hands to the head. `tokens`: float32 `[real tokens, hidden]`; `first`: `[examples, hidden]`."""

    tokens: Tensor
    first: Tensor

    def error(self, reference: "EncoderOutput") -> float:
        """Squared error relative to `reference`: of all tokens, and as heavily of the first, which most heads read."""
        return (_relative(self.tokens, reference.tokens) + _relative(self.first, reference.first)) / 2


def encoder_output(model: nn.Module, batches: Sequence[Batch]) -> EncoderOutput:
    """Run `batches` and keep the encoder's output; the answer itself, of a model that is or holds none of transformers'."""
    tokens: list[Tensor] = []
    first: list[Tensor] = []
    mask: Tensor | None = None

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: object) -> None:
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        y = next((leaf for leaf in leaves if leaf.dim() == 3), leaves[0])  # of two towers, not who is like whom
        tokens.append(real_tokens(y, mask))
        first.append((y[:, 0] if y.dim() == 3 else y.reshape(-1, y.shape[-1])).float())

    encoder = next((part.base_model for part in model.modules() if isinstance(part, PreTrainedModel)), model)
    for whole in (encoder, model):  # OPT's head calls what its base model is made of, and not that
        handle = whole.register_forward_hook(keep)
        try:
            with unchanged(model), weights_left_in_file(model), torch.inference_mode():
                for batch in _parts(model, batches):
                    mask = batch.get("attention_mask")
                    with drawing_alike():
                        model(**batch)
        finally:
            handle.remove()
        if tokens:
            break
    return EncoderOutput(torch.cat(tokens), torch.cat(first))


def _parts(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches in parts that need little memory, of a model of which it is known that rows do not see each other."""
    for batch in batches:
        if isinstance(model, PreTrainedModel):
            yield from in_parts(batch)
        else:
            yield batch


def watch(
    model: nn.Module, layers: Sequence[str], batches: Iterable[Batch], see: Watch, *, outputs: bool = True
) -> None:
    """Run `batches` and show each layer's real inputs and outputs to `see`; without `outputs`, those as they are."""
    hooks = _hooks(model, layers, see, outputs=outputs)
    with unchanged(model), weights_left_in_file(model), hooks as set_mask, torch.inference_mode():
        for batch in batches:
            set_mask(batch.get("attention_mask"))
            with drawing_alike():
                model(**batch)


@contextmanager
def _hooks(
    model: nn.Module, layers: Sequence[str], see: Watch, *, outputs: bool
) -> Iterator[Callable[[Tensor | None], None]]:
    current: list[Tensor | None] = [None]

    def hook(name: str) -> Callable[..., None]:
        def after_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = layer_input(args, kwargs)
            if isinstance(layer, CONVOLUTIONS):
                see(name, layer, x.float(), output.float())
            else:
                see(name, layer, real_tokens(x, current[0]), real_tokens(output, current[0]) if outputs else output)

        return after_forward

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in layers]
    try:
        yield lambda mask: current.__setitem__(0, mask)
    finally:
        for handle in handles:
            handle.remove()


def _relative(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).square().sum() / reference.square().sum().clamp(min=1e-30)).item()


def as_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input or output as `watch` shows it, to `[n, channels]`."""
    if isinstance(layer, CONVOLUTIONS):
        x = x.movedim(-1 - len(layer.kernel_size), -1)
    return x.reshape(-1, x.shape[-1])


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """`[batch, length, features]` or `[batch * length, features]` to `[real tokens, features]`.

    Anything of another shape (a pooled `[batch, features]`) holds no padding and is only flattened.
    """
    if mask is not None and x.shape[:2] == mask.shape and x.dim() == 3:
        return x[mask.bool()].float()
    if mask is not None and x.dim() == 2 and x.shape[0] == mask.numel() and mask.shape[1] > 1:
        return x[mask.reshape(-1).bool()].float()
    return x.reshape(-1, x.shape[-1]).float()
