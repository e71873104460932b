"""Calibration: run the float model over a slice and keep what observers need, batch by batch.

Memory does not grow with the slice: two passes, one for the extremes, one for histograms between them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..runtime.modules import Int8Linear
from .layers import Batch
from .observers import BINS, InputStatistics

MOMENTUM = 0.9  # of the moving averages
Watch = Callable[[str, nn.Module, Tensor, Tensor], None]  # name, layer, real inputs [n, in] and outputs [n, out]
Statistics = Mapping[str, InputStatistics]  # by layer name


def calibrate(
    model: nn.Module,
    linears: Sequence[str],
    batches: Sequence[Batch],
    *,
    track: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> Statistics:
    """Observe the inputs of `linears` over `batches` (each a dict of tensors with an `attention_mask`).

    `track` wraps the batches of each pass, for a progress bar.
    """
    ranges: dict[str, InputStatistics] = {}

    def see_range(name: str, _: nn.Module, x: Tensor, __: Tensor) -> None:
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

    watch(model, linears, track(batches), see_range)
    watch(model, linears, track(batches), see_histogram)
    return ranges


def sensitivity(model: nn.Module, twins: Mapping[str, Int8Linear], batches: Sequence[Batch]) -> dict[str, float]:
    """Each layer's own int8 output error, squared and relative to its output, from one pass of the float model."""
    error: dict[str, float] = dict.fromkeys(twins, 0.0)
    power: dict[str, float] = dict.fromkeys(twins, 0.0)

    def compare(name: str, _: nn.Module, x: Tensor, y: Tensor) -> None:
        error[name] += (twins[name](x) - y).square().sum().item()
        power[name] += y.square().sum().item()

    watch(model, list(twins), batches, compare)
    return {name: error[name] / max(power[name], 1e-30) for name in twins}


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder hands to the head. `tokens`: float32 `[real tokens, hidden]`; `first`: `[examples, hidden]`."""

    tokens: Tensor
    first: Tensor

    def error(self, reference: "EncoderOutput") -> float:
        """Squared error relative to `reference`: of all tokens, and as heavily of the first, which most heads read."""
        return (_relative(self.tokens, reference.tokens) + _relative(self.first, reference.first)) / 2


def encoder_output(model: nn.Module, batches: Iterable[Batch]) -> EncoderOutput:
    """Run `batches` and keep the encoder's output; the logits, for a model without a `base_model`."""
    tokens: list[Tensor] = []
    first: list[Tensor] = []
    mask: Tensor | None = None

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Sequence[Tensor]) -> None:
        tokens.append(real_tokens(output[0], mask))
        first.append((output[0][:, 0] if output[0].dim() == 3 else output[0]).float())

    encoder = getattr(model, "base_model", model)
    handle = encoder.register_forward_hook(keep)
    try:
        with torch.inference_mode():
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
    finally:
        handle.remove()
    return EncoderOutput(torch.cat(tokens), torch.cat(first))


def watch(model: nn.Module, layers: Sequence[str], batches: Iterable[Batch], see: Watch) -> None:
    """Run `batches` and show each layer's real inputs and outputs to `see`."""
    with _hooks(model, layers, see) as set_mask, torch.inference_mode():
        for batch in batches:
            set_mask(batch.get("attention_mask"))
            model(**batch)


@contextmanager
def _hooks(model: nn.Module, layers: Sequence[str], see: Watch) -> Iterator[Callable[[Tensor | None], None]]:
    current: list[Tensor | None] = [None]

    def hook(name: str) -> Callable[..., None]:
        def after_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            see(name, module, real_tokens(args[0], current[0]), real_tokens(output, current[0]))

        return after_forward

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    try:
        yield lambda mask: current.__setitem__(0, mask)
    finally:
        for handle in handles:
            handle.remove()


def _relative(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).square().sum() / reference.square().sum().clamp(min=1e-30)).item()


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """`[batch, length, features]` or `[batch * length, features]` to `[real tokens, features]`.

    Anything of another shape (a pooled `[batch, features]`) holds no padding and is only flattened.
    """
    if mask is not None and x.shape[:2] == mask.shape and x.dim() == 3:
        return x[mask.bool()].float()
    if mask is not None and x.dim() == 2 and x.shape[0] == mask.numel() and mask.shape[1] > 1:
        return x[mask.reshape(-1).bool()].float()
    return x.reshape(-1, x.shape[-1]).float()
