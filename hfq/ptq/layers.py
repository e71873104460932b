"""Which layers of a model can run in int8, and why the others cannot."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..common.copies import deep_copy
from ..common.errors import UnsupportedError
from ..common.memory import weights_left_in_file
from ..runtime.fusion.snapshot import unchanged
from ..runtime.int8.embedding import factor_of
from .inputs import Batch

WORTH_WIDENING = 0.05  # of a model's numbers, in convolutions, or in what makes the logits
LARGE = 1 << 16  # numbers of a weight whose bytes matter
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
MATMULS = (nn.Linear, Conv1D)  # transformers' Conv1D is a Linear whose weight is stored transposed


@dataclass(frozen=True)
class Quantizable:
    """Names in execution order, and the layers that stay float, by name, with the reason.

    `layers`: Linear, Conv1D and convolutions. `pooled`: those of a transformers model whose input is
    `[examples, features]`, without tokens. `other`: modules with parameters of a type that has no int8 twin, by name
    their type. `tied`: of embeddings, and of Linear layers among them, the names of all that share the weight.
    """

    layers: tuple[str, ...]
    embeddings: tuple[str, ...]
    float_layers: Mapping[str, str] = field(default_factory=dict)
    pooled: frozenset[str] = frozenset()
    other: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def twin(model: nn.Module) -> nn.Module:
    """A copy whose parameters are the model's own tensors: replace them in it, never write to them.

    Buffers are copied: there are forwards that write to them.
    """
    return deep_copy(model, shared={id(parameter): parameter for parameter in model.parameters()})


def linear(model: nn.Module, name: str) -> nn.Linear:
    """The layer of that name, which has a weight and perhaps a bias."""
    return cast(nn.Linear, model.get_submodule(name))


def why_not(layer: nn.Module) -> str | None:
    """Why a convolution has no int8 twin, in words that follow its name; None if it has one."""
    if type(layer) not in CONVOLUTIONS:
        return f"is a {type(layer).__name__}, not a plain Conv1d or Conv2d"  # a subclass may compute something else
    if layer.padding_mode != "zeros":
        return f"pads with {layer.padding_mode!r}, not with zeros"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "computes its weight at every call (weight_norm and its like)"
    if not weight.is_floating_point():
        return f"has {weight.dtype} weights, not real ones"
    return None


def reads_sound(layer: nn.Module) -> bool:
    """Whether a layer convolves a waveform: with 8 bits for its loudest sample, what is quiet is lost in rounding.

    Of a wav2vec2 that was trained on speech this was 0.8 of the static error. In float it takes a third of the time.
    """
    return isinstance(layer, nn.Conv1d) and layer.in_channels == 1


def weight_rows(layer: nn.Module) -> Tensor:
    """The weight with output channels first: `[out, in]`, of a convolution `[out, in / groups, *kernel]`."""
    weight = cast(Tensor, layer.weight).detach().float()
    return weight.t().contiguous() if isinstance(layer, Conv1D) else weight


def find_quantizable(
    model: nn.Module,
    batch: Batch | None,
    *,
    first: bool = True,
    last: bool = False,
    asked_for: Callable[[str, nn.Module], bool] | None = None,
) -> Quantizable:
    """Run one batch and see which layers with an int8 twin take part; without a batch, all are taken to.

    `first`, `last`: whether the first and the last layer with a matmul may be int8. The last makes the logits, unless
    the model ends without a head: mostly it is tiny, and its rounding goes straight into the answer; it is only left in
    where it is not tiny, where nothing else could be int8, where it is `asked_for`, or where its weight is an embedding's.

    Raises:
        UnsupportedError: no layer can run in int8.
    """
    kinds = (*MATMULS, *CONVOLUTIONS)
    candidates = {name: module for name, module in model.named_modules() if type(module) in kinds or _is_table(module)}
    stock = any(isinstance(module, PreTrainedModel) for module in model.modules())
    bypassed = Bypassed(model)
    called = dict.fromkeys(candidates, Call(0, False)) if batch is None else _called(model, candidates, batch, bypassed)
    reasons = {name: "not used by the forward pass" for name in candidates if name not in called}
    reasons |= {
        name: f"is a {type(module).__name__}, not a plain Embedding"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name not in candidates
    }
    other = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name not in candidates and name not in reasons and next(module.parameters(recurse=False), None) is not None
    }
    tied, untied = _sharing(model, called, bypassed)
    reasons = {name: reason for name, reason in (reasons | untied).items() if name not in tied}
    # With one in int8 stock transformers opens the model only if it is widened, and drops all other layers' input scales.
    kept = _why_convolutions_stay(model) if stock else None
    for name in called:
        if isinstance(candidates[name], CONVOLUTIONS):
            reason = kept or why_not(candidates[name])
            reasons |= {} if reason is None else {name: reason}
    embeddings = [n for n in called if isinstance(candidates[n], nn.Embedding) and n not in reasons and n not in tied]
    ordered = [name for name in called if not isinstance(candidates[name], nn.Embedding)]
    layers = [name for name in ordered if name not in reasons and name not in tied]
    wanted = {name for name in layers if asked_for is not None and asked_for(name, candidates[name])}
    if not first and layers[:1] == ordered[:1] and layers[0] not in wanted:
        reasons[layers[0]] = "first layer"
    if not last and len(layers) > 1 and layers[-1] == ordered[-1] and layers[-1] not in wanted:
        if _in_encoder(model, layers[-1]):
            answers = called[layers[-1]].answers
        else:
            answers = not _is_large(linear(model, layers[-1]).weight, model)
        if answers:
            reasons[layers[-1]] = "makes the answer"
    layers = [name for name in layers if name not in reasons]
    if not layers:
        raise UnsupportedError(
            f"{type(model).__name__} has no layer that can run in int8. hfq quantizes torch.nn.Linear, Embedding, "
            "Conv1d and Conv2d, and transformers' Conv1D."
        )
    pooled = frozenset(name for name in layers if stock and called[name].dimensions == 2)
    return Quantizable(tuple(layers), (*embeddings, *tied), reasons, pooled, other, tied)


class Call(NamedTuple):
    """Dimensions of a layer's input, and whether its output is what the model answers."""

    dimensions: int
    answers: bool


def _called(
    model: nn.Module, candidates: Mapping[str, nn.Module], batch: Batch, bypassed: "Bypassed"
) -> dict[str, Call]:
    """By name, in the order they were called first."""
    called: dict[str, int] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.setdefault(name, layer_input(args, kwargs).dim())
            bypassed.inside += 1

        return before_forward

    def keep(name: str) -> Callable[..., None]:
        def after_forward(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs.clear()
            outputs[name] = output
            bypassed.inside -= 1

        return after_forward

    handles = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in candidates.items()]
    handles += [module.register_forward_hook(keep(name)) for name, module in candidates.items()]
    try:
        with unchanged(model), weights_left_in_file(model), torch.inference_mode(), bypassed:
            answer = tree_leaves(model(**batch))
            if bypassed.asked:
                answered = dict(outputs)
                bypassed.look_for_casts(model, batch)
                outputs = answered
    finally:
        for handle in handles:
            handle.remove()
    last = {name for name, output in outputs.items() if any(leaf is output for leaf in answer)}
    return {name: Call(dimensions, name in last) for name, dimensions in called.items()}


class Bypassed(TorchFunctionMode):
    """Notes which weights a forward reads while it is in no layer, as MobileBERT's head does: there, codes would be wrong.

    `weight in`: whether it was one of them. `inside`: in how many layers the forward is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside = 0
        self._weights = {id(parameter) for parameter in model.parameters()}
        self._read: set[int] = set()
        self.asked: set[int] = set()  # weights whose dtype is looked at
        self._last_asked: int | None = None
        self._as_int8 = False

    def __contains__(self, weight: Tensor | None) -> bool:
        return id(weight) in self._read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and getattr(func, "__self__", None) is Tensor.dtype and id(args[0]) in self._weights:
            self.asked.add(id(args[0]))
            self._last_asked = id(args[0])
            if self._as_int8 and args[0].dim() > 1:
                return torch.int8
        if self._as_int8 and func is Tensor.to and torch.int8 in tree_leaves((args[1:], kwargs)):
            self._read.add(self._last_asked or 0)
            return args[0]
        output = func(*args, **(kwargs or {}))
        if not self.inside and any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):  # not its dtype or shape
            given = tree_leaves((args, kwargs))
            self._read |= {id(leaf) for leaf in given if isinstance(leaf, nn.Parameter)} & self._weights
        return output

    def look_for_casts(self, model: nn.Module, batch: Batch) -> None:
        """Note weights to whose dtype activations are cast, as before Mamba's head: cast to int8 they would be lost.

        In a forward that is told that weights are int8. T5's casts to any dtype but that.
        """
        self._as_int8 = True
        try:
            model(**batch)
        except Exception:  # the model's own code, which has no use for that dtype
            self._read |= self.asked
        finally:
            self._as_int8 = False
            self.inside = 0


def _why_convolutions_stay(model: nn.Module) -> str | None:
    """Why none is int8 in a model that stock transformers is to open; None if they may be."""
    convolutions = [module for module in model.modules() if isinstance(module, CONVOLUTIONS)]
    if _are_few(convolutions, model):
        return "a small part of the model"
    # What widens takes all of such names for parameters: DETR's norms, Mask2Former's weights of classes.
    if any(name.endswith("weight") for name, _ in model.named_buffers()):
        return "beside buffers that are called weights, where stock transformers cannot widen it"
    return None


def _are_few(convolutions: Sequence[nn.Module], model: nn.Module) -> bool:
    """Whether they are no more than what makes patches or frames for a transformer, or hold little of `model`."""
    convolved = sum(parameter.numel() for layer in convolutions for parameter in layer.parameters())
    share = convolved / max(1, sum(parameter.numel() for parameter in model.parameters()))
    return len(convolutions) <= 2 or share < WORTH_WIDENING


def _is_large(weight: Tensor, model: nn.Module) -> bool:
    """Whether a layer is much of the model: with ImageNet's labels the one that makes the logits is 8 % of ResNet-50."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return weight.numel() >= max(LARGE, WORTH_WIDENING * numbers)


def _is_table(module: nn.Module | None) -> bool:
    """Whether it looks up rows of its weight, and at most multiplies them."""
    return isinstance(module, nn.Embedding) and factor_of(module) is not None


def _in_encoder(model: nn.Module, name: str) -> bool:
    """Whether a layer is in a transformers model itself, and not in a head on it."""
    layer = model.get_submodule(name)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return any(module is layer for part in parts for module in part.base_model.modules())


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a Linear, Embedding or convolution was called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _sharing(
    model: nn.Module, called: Iterable[str], bypassed: Bypassed
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Of layers whose weight others have or read too: by name, all that have it as one; and why the rest stays float.

    One int8 weight serves lookups, and a Linear that multiplies by the same rows, whether or not they are called.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name if key == "weight" else f"{name}.{key}")
    modules = dict(model.named_modules())
    tied: dict[str, tuple[str, ...]] = {}
    reasons: dict[str, str] = {}
    for name in called:
        weight = modules[name]._parameters.get("weight")
        names = [] if weight is None else owners[id(weight)]
        if weight in bypassed:
            reasons[name] = "has a weight that is read elsewhere, too"
        if len(names) < 2 or name in reasons:
            continue
        owned = [modules.get(owner) for owner in names]
        kinds = {nn.Embedding if _is_table(module) else type(module) for module in owned}
        if kinds == {nn.Embedding} or kinds == {nn.Embedding, nn.Linear}:
            tied |= dict.fromkeys(names, tuple(names))
        else:
            others = ", ".join(other for other in names if other != name)
            reasons[name] = f"shares its weight with {others}"
    return tied, reasons
