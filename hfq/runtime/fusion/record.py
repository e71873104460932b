"""What was fused in a model, by the names of its modules: done again from these, it takes no forward on an example.

The forwards that look for fusions take a fifth of a second of BERT-base, as long as its float twin takes to load.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel

from ..int8.known_forward import KnownForward
from ..int8.linear import Int8Linear
from ..int8.shared_matmul import SharedMatmul
from . import attention
from .encoder_layer import BiasedEncoderLayer, EncoderLayer
from .residual import NormalizedSum
from .slicing import SlicedForward

Sum = tuple[str, str]  # a layer and the norm behind it


@dataclass(frozen=True)
class Steps:
    """An `EncoderLayer`, or a `BiasedEncoderLayer`."""

    layer: str
    attention: str
    projection: Sequence[str]
    heads: int
    scale: float | None
    attended: Sum
    inner: str
    outer: Sum
    biased: bool
    narrows: bool


@dataclass(frozen=True)
class Record:
    """All that was fused, in names of modules.

    `sums`: blocks that are a `NormalizedSum`, each with its layer and norm and the names of its arguments. `codes`:
    producer and consumer. `shared`: layers of a `SharedMatmul`. `cut`: models that ignore padding. `attends`: the model
    uses hfq's attention, for which those of `narrowed` return bfloat16.
    """

    sums: Sequence[tuple[str, Sum, Sequence[str]]] = ()
    codes: Sequence[tuple[str, str]] = ()
    shared: Sequence[Sequence[str]] = ()
    first_token: Sequence[str] = ()
    in_place: Sequence[str] = ()
    cut: Sequence[str] = ()
    steps: Sequence[Steps] = ()
    narrowed: Sequence[str] = ()
    attends: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> "Record":
        """What is fused in `model` now."""
        names = {id(module): name for name, module in model.named_modules()}

        def name_of(module: nn.Module) -> str:
            return names[id(module)]

        def named(modules: Iterable[nn.Module]) -> list[str]:
            return list(map(name_of, modules))

        def pair(found: NormalizedSum) -> Sum:
            return name_of(found.linear), name_of(found.norm)

        def steps_of(found: EncoderLayer) -> Steps:
            return Steps(
                name_of(found.layer), name_of(found.attention), named(found.projection.modules), found.heads, found.scale,
                pair(found.attended), name_of(found.inner), pair(found.outer),
                isinstance(found, BiasedEncoderLayer), getattr(found, "narrows", False),
            )  # fmt: skip

        forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
        layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
        groups = {id(layer.shared_matmul): layer.shared_matmul for layer in layers if layer.shared_matmul}
        return cls(
            sums=[
                (name, pair(forward), list(forward.signature.parameters))
                for name, forward in forwards.items()
                if isinstance(forward, NormalizedSum)
            ],
            codes=[(name_of(layer), name_of(layer._reader[0])) for layer in layers if layer._reader],
            shared=[named(group.modules) for group in groups.values()],
            first_token=named(layer for layer in layers if layer.first_token),
            in_place=named(layer for layer in layers if layer.in_place),
            cut=[
                name
                for name, forward in forwards.items()
                if isinstance(forward, SlicedForward) and forward.cuts_padding
            ],
            steps=[steps_of(forward) for forward in forwards.values() if isinstance(forward, EncoderLayer)],
            narrowed=named(layer for layer in layers if layer.narrowing),
            attends=hasattr(model, "hfq_attention"),
        )

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> "Record":
        """What `as_json` returned.

        Raises:
            TypeError, KeyError: it is something else.
        """
        return cls(**{**found, "steps": [Steps(**step) for step in found["steps"]]})

    def as_json(self) -> dict[str, Any]:
        """In JSON's types."""
        return asdict(self)

    def repeat(self, model: nn.Module, known: KnownForward) -> None:
        """Fuse so in `model`, which is what the one was of which this is.

        Raises:
            KeyError: it is not, and nothing was done.
        """
        modules: dict[str, Any] = dict(model.named_modules())
        for name in self._names():
            modules[name]

        def sum_of(pair: Sum, names: Sequence[str] = (), *, block: nn.Module | None = None) -> NormalizedSum:
            linear, norm = pair
            return NormalizedSum(modules[linear], modules[norm], *names, block=block)

        for block, pair, names in self.sums:
            modules[block].forward = sum_of(pair, names, block=modules[block])
        for producer, consumer in self.codes:
            modules[producer].emit_codes_for(modules[consumer])
        for name in self.first_token:
            modules[name].first_token = known
        for name in self.in_place:
            modules[name].in_place = known
        for name in self.cut:
            modules[name].forward.cuts_padding = True
        if self.attends and isinstance(model, PreTrainedModel):
            narrowing = attention.use(model)
            for name in self.narrowed:
                modules[name].narrow(narrowing)
        groups = {layers[0]: SharedMatmul([modules[name] for name in layers]) for layers in self.shared}
        for step in self.steps:
            kind = BiasedEncoderLayer if step.biased else EncoderLayer
            layer = modules[step.layer]
            layer.forward = kind(
                layer, known, attention=modules[step.attention], projection=groups[step.projection[0]],
                heads=step.heads, scale=step.scale, attended=sum_of(step.attended), inner=modules[step.inner],
                outer=sum_of(step.outer),
            )  # fmt: skip
            if step.biased:
                layer.forward.narrows = step.narrows

    def _names(self) -> Iterator[str]:
        """Of all modules that there have to be."""
        for block, pair, _ in self.sums:
            yield from (block, *pair)
        for names in (*self.codes, *self.shared, self.first_token, self.in_place, self.cut, self.narrowed):
            yield from names
        for step in self.steps:
            yield from (step.layer, step.attention, *step.projection, *step.attended, step.inner, *step.outer)


class Records(Protocol):
    """Where such records are kept from process to process."""

    def find(self, model: nn.Module, fusions: Sequence[str]) -> Record | None:
        """That of `model`, in which nothing is fused yet but activation functions, where `fusions` are wanted."""

    def keep(self, record: Record) -> None:
        """Keep that of the model that was last asked for, if it can be."""
