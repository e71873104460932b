"""One checkpoint, its float model and its data, loaded and batched: what tuning and measuring read."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..common.errors import UsageError
from ..common.ui import Reporter
from ..recipe import Recipe
from ..source.checkpoint import Checkpoint, pull
from ..source.model import load_model
from ..tasks.base import Batch, Task
from ..tasks.registry import make_task
from .examples import Examples, TaskData, load_task_data


@dataclass(frozen=True)
class Session:
    """`metric`: the name of the one that decides. `calibration`, `evaluation`, `holdout`: batches, shortest examples first."""

    recipe: Recipe
    checkpoint: Checkpoint
    task: Task
    metric: str
    data: TaskData
    model: nn.Module
    calibration: list[Batch]
    evaluation: list[Batch]
    holdout: list[Batch]


def open_session(recipe: Recipe, *, recipes: Path, ui: Reporter, token: str | None, quantized: bool = False) -> Session:
    """Pull the checkpoint, load its data and its model. `quantized`: an int8 checkpoint is welcome.

    Raises:
        HfqError: something is missing or does not fit; nothing was written.
    """
    ui.stage(f"Checkpoint {recipe.checkpoint}")
    checkpoint = pull(
        recipe.checkpoint, revision=recipe.revision, token=token, trust_remote_code=recipe.trust_remote_code
    )
    if checkpoint.is_quantized and not quantized:
        raise UsageError(
            f"{recipe.checkpoint} is quantized already: config.json has a quantization_config. Expected the float checkpoint that it was made from."
        )
    for warning in checkpoint.warnings:
        ui.warn(warning)
    task = make_task(checkpoint.config, name=recipe.task, folder=checkpoint.path, settings=recipe.settings)
    metric = task.metric(recipe.metric)
    ui.note(f"{task.name}, {checkpoint.size_mib:.1f} MiB, revision {checkpoint.info.revision[:19]}")

    ui.stage("Dataset")
    data = load_task_data(checkpoint, recipe, task=task, recipes=recipes, token=token)
    info = data.info
    ui.note(f"{info.id}{'/' + info.subset if info.subset else ''}: {info.examples} examples of {info.split!r}")
    columns = "; ".join(f"{role}: {', '.join(names)}" for role, names in info.columns.items())
    ui.note(f"{columns}, {info.alignment}")
    for warning in data.warnings:
        ui.warn(warning)

    def batches(examples: Examples | None) -> list[Batch]:
        return examples.batches(data.task, data.processor, recipe.batch_size) if examples else []

    return Session(
        recipe,
        checkpoint,
        data.task,
        metric,
        data,
        load_model(checkpoint, task.auto_class, trust_remote_code=recipe.trust_remote_code),
        batches(data.calibration),
        batches(data.evaluation),
        batches(data.holdout),
    )
