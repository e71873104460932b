"""Evaluating a model on a split: its outputs, and the metric of its task."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..common.errors import HfqError
from ..tasks.base import Batch, Outputs, References, Task


@dataclass(frozen=True)
class Engine:
    """Lightning's `Trainer` arguments of the same names."""

    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"


@dataclass(frozen=True)
class Evaluation:
    """`score`: the metric. `outputs`: one tensor for each example, in the data's order. `duration_s`: of the forwards."""

    score: float
    outputs: Outputs
    duration_s: float


def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    references: References,
    *,
    task: Task,
    metric: str,
    engine: Engine,
) -> Evaluation:
    """Run padded `batches` through `Trainer.validate`, and score what comes out against `references`.

    Raises:
        UsageError: Lightning refuses the engine.
        HfqError: the model's outputs are not finite numbers.
    """
    from .validation import (
        validate,  # imports Lightning, which takes seconds: not before there is something to evaluate
    )

    outputs, duration_s = validate(model, batches, task=task, engine=engine)
    return judged(outputs, references, task=task, metric=metric, duration_s=duration_s)


def judged(outputs: Outputs, references: References, *, task: Task, metric: str, duration_s: float = 0.0) -> Evaluation:
    """What outputs are worth, however they were computed.

    Raises:
        HfqError: they are not finite numbers.
    """
    if not all(output.isfinite().all() for output in outputs):
        raise HfqError(
            "The model answers with NaN or infinity on this data: its weights or the quantization are broken."
        )
    return Evaluation(task.score(metric, outputs, references), outputs, duration_s)
