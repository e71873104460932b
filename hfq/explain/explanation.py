"""What an explanation holds, as plain dataclasses. Needs no torch: reports are read where there is none."""

from dataclasses import dataclass, field
from typing import Any

OUTLIER = 6.0  # times the middle one is an outlier


@dataclass(frozen=True)
class Activations:
    """A layer's input over the slice, padding left out.

    `low`, `high`: the range. `outlier_channels`: those whose largest value is `OUTLIER` times that of the middle
    channel or more, the largest first. `outlier_factor`: of the largest to the middle channel's. `outlier_tokens`: share of
    tokens whose largest value is as many times that of the middle token. `clipped`: share of values beyond the codes.
    """

    low: float
    high: float
    outlier_channels: list[int]
    outlier_factor: float
    outlier_tokens: float
    clipped: float


@dataclass(frozen=True)
class Remedy:
    """`how`: as `--layer HOW=NAME` takes it, or a name that the search gives to what it tries. `error`: as `LayerCause.error`."""

    how: str
    error: float


@dataclass(frozen=True)
class LayerCause:
    """One layer in int8.

    `error`: squared, of its output when it is fed what the float model feeds it, relative to that output. `weights`: the
    part of it that is left with float inputs. `effect`: squared relative error of the encoder's output when
    this layer alone is int8. `remedies`: errors of other ways, the least first. `advice`: the remedy to take, if any.
    """

    layer: str
    runs: str
    error: float
    weights: float
    effect: float
    activations: Activations | None = None
    remedies: list[Remedy] = field(default_factory=list)
    advice: str | None = None


@dataclass(frozen=True)
class Flip:
    """An example that int8 answers otherwise.

    `row`: its number in the split, from 0. `margin`: by how much the float model's answer is ahead there; None where
    answers are no choice, and `moved` says all. `moved`: how much of that int8 takes away; without a margin, the relative
    squared difference of the outputs. `layer`: the one that takes most of it alone, and `alone` whether that is enough.
    `mended`: whether the answer is the float model's again when all but this layer are int8. `text`: what is asked.
    """

    row: int
    margin: float | None
    moved: float
    layer: str
    alone: bool
    mended: bool
    was_right: bool | None = None
    text: str = ""


@dataclass(frozen=True)
class Advice:
    """What to do: `layers` as a recipe's key of that name has it. `error`, `score`: of the whole model then.

    `command`: does it.
    """

    layers: dict[str, list[str]]
    error: float
    score: float
    met: bool
    command: str


@dataclass(frozen=True)
class Explanation:
    """Why the int8 model `candidate` of a checkpoint differs from the float one.

    `error`: of the whole model, as `LayerCause.effect`. `layers`: the largest effect first. `flips`: the largest margin
    first, of all `flipped`; None where answers are no choice. `slice_examples`: what layers were compared on.
    """

    checkpoint: str
    candidate: str
    metric: str
    metric_label: str
    split: str
    examples: int
    baseline: float
    score: float
    threshold: float
    higher_is_better: bool
    met: bool
    error: float
    slice_examples: int
    layers: list[LayerCause]
    flips: list[Flip]
    flipped: int | None
    advice: Advice | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Explanation":
        """What `dataclasses.asdict` made of one. Raises `TypeError`, `KeyError` where it is something else."""

        def cause(row: dict[str, Any]) -> LayerCause:
            seen = row["activations"]
            remedies = [Remedy(**remedy) for remedy in row["remedies"]]
            return LayerCause(**{**row, "activations": seen and Activations(**seen), "remedies": remedies})

        advice = data["advice"]
        return cls(
            **{
                **data,
                "layers": [cause(row) for row in data["layers"]],
                "flips": [Flip(**row) for row in data["flips"]],
                "advice": advice and Advice(**advice),
            }
        )
