"""What a search may try and how it goes about it: a recipe and a `PostTrainingQuantConfig` both become this."""

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from torch import nn

from ..common.errors import UsageError
from ..ptq.observers import OBSERVERS
from ..ptq.scheme import Approach

HOWS: tuple[str, ...] = ("float", "dynamic", "static", "weight-only", *OBSERVERS)
ALPHAS: tuple["Alpha", ...] = (0.3, 0.5, 0.7)
Alpha = float | Literal["auto"]
Objective = Literal["performance", "modelsize", "footprint", "accuracy"]


@dataclass(frozen=True)
class Limits:
    """When to give up: evaluations, and seconds since tuning began (0: none)."""

    max_trials: int = 600
    timeout: float = 0.0


@dataclass(frozen=True)
class Rule:
    """What a user fixes for the layers of one type, or with names that match `pattern`. None: the search decides.

    `precisions`: "int8", "fp32" or both, of the layer. `approaches`: how its activations may be quantized.
    """

    pattern: str | None = None
    type_name: str | None = None
    precisions: tuple[str, ...] = ("int8", "fp32")
    approaches: tuple[Approach, ...] = ("static", "dynamic", "weight-only")
    observer: str | None = None
    symmetric: bool = False
    per_tensor: bool = False

    def covers(self, name: str, layer: nn.Module) -> bool:
        """Whether it is about this layer."""
        if self.type_name is not None:
            return type(layer).__name__ == self.type_name
        return self.pattern is not None and re.fullmatch(self.pattern, name) is not None


def rules_of(layers: Mapping[str, Sequence[str]], model: nn.Module) -> list[Rule]:
    """What a recipe's `layers` fix: by one of `HOWS`, names of layers, in which * stands for anything.

    Raises:
        UsageError: there is no such way to run a layer, or no such layer.
    """
    known = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    rules = []
    for how, names in layers.items():
        if how not in HOWS:
            raise UsageError(f"layers: a layer cannot run as {how!r}. Expected one of: {', '.join(HOWS)}.")
        for name in names:
            if not fnmatch.filter(known, name):
                near = difflib.get_close_matches(name, known, n=3, cutoff=0)
                raise UsageError(f"layers: the model has no layer {name!r}. Nearest: {', '.join(near)}.")
            rules.append(_rule(how, fnmatch.translate(name)))
    return rules


def _rule(how: str, pattern: str) -> Rule:
    if how == "float":
        return Rule(pattern, precisions=("fp32",))
    if how in OBSERVERS:
        return Rule(pattern, precisions=("int8",), approaches=("static",), observer=how)
    return Rule(pattern, precisions=("int8",), approaches=(cast(Approach, how),))


@dataclass(frozen=True)
class Options:
    """`observers` and `alphas` (SmoothQuant; none: not tried) are alternatives, all tried; the rest holds throughout.
    `smooth_always`: static candidates without SmoothQuant are not considered where the graph has something to fold.

    `objective`: weight of each cost by which trials that meet the goal are compared. With any but "performance"
    alone, the search goes on after the first of them. `keep_float`: whether sensitive layers may stay float.
    """

    approach: str = "auto"
    order: str = "basic"
    observers: Sequence[str] = tuple(OBSERVERS)
    alphas: Sequence[Alpha] = ALPHAS
    smooth_always: bool = False
    rules: Sequence[Rule] = ()
    reduce_range: bool = False
    bias_correction: bool = False
    weight_correction: bool = False
    gptq: bool = False
    quantize_first: bool = True
    quantize_last: bool = False
    keep_float: bool = True
    explore: bool = False
    objective: Mapping[Objective, float] = field(default_factory=lambda: {"performance": 1.0})
    limits: Limits = Limits()
    seed: int = 42

    def rule(self, name: str, layer: nn.Module) -> Rule:
        """The last rule that covers the layer, as later lines of a configuration override earlier ones."""
        return next((rule for rule in reversed(self.rules) if rule.covers(name, layer)), Rule())

    def wants_int8(self, name: str, layer: nn.Module) -> bool:
        """Whether a rule allows the layer nothing but int8."""
        return self.rule(name, layer).precisions == ("int8",)

    @property
    def smooths(self) -> bool:
        """Whether SmoothQuant is tried: it is for static candidates."""
        return bool(self.alphas) and self.approach != "dynamic"

    @property
    def is_fastest(self) -> bool:
        """Whether speed alone decides between trials that meet the goal."""
        return set(self.objective) == {"performance"}

    @property
    def explores(self) -> bool:
        """Whether to look further once a trial met the goal."""
        return self.explore or not self.is_fastest
