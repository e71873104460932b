"""Evaluating a model on a split: its outputs, and the metric of its task."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.errors import HfqError
from ..runtime.fusion.snapshot import drawing_alike
from ..tasks.base import Batch, Outputs, References, Task


@dataclass(frozen=True)
class Engine:
    """Lightning's `Trainer` arguments of the same names. The default is this process, which needs no Lightning."""

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
    """Run padded `batches` by `engine`, and score what comes out against `references`.

    Raises:
        UsageError: Lightning refuses the engine.
        HfqError: the model's outputs are not finite numbers.
    """
    if engine == Engine():
        outputs, duration_s = _outputs_here(model, batches, task=task)
    else:
        from .validation import validate  # Lightning, which takes more than a second to import

        outputs, duration_s = validate(model, batches, task=task, engine=engine)
    return judged(outputs, references, task=task, metric=metric, duration_s=duration_s)


def timed_outputs(model: nn.Module, batch: Batch, *, task: Task) -> tuple[list[Tensor], float]:
    """The task's outputs of `model` for a batch, one tensor for each example, and the seconds they took."""
    start = time.perf_counter()
    with drawing_alike():
        outputs = task.outputs(model, batch)
    seconds = time.perf_counter() - start
    return [output.cpu().clone() for output in outputs], seconds  # a part of a tensor would keep it whole


def _outputs_here(model: nn.Module, batches: Sequence[Batch], *, task: Task) -> tuple[list[Tensor], float]:
    """The same of many batches, in the order of their examples."""
    outputs: list[Tensor] = []
    total = 0.0
    with torch.inference_mode():
        for batch in batches:
            found, seconds = timed_outputs(model, batch, task=task)
            outputs += found
            total += seconds
    return outputs, total


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
