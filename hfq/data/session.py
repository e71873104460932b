"""One checkpoint, its float model and its data, loaded and batched: what tuning and measuring read."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.errors import UsageError
from ..common.ui import Reporter
from ..recipe import Recipe
from ..runtime.fusion.snapshot import drawing_alike
from ..source.checkpoint import Checkpoint, pull
from ..source.model import load_model
from ..tasks.base import FIDELITY, Batch, Metric, Task
from ..tasks.registry import make_task
from .examples import Examples, TaskData, load_task_data


@dataclass(frozen=True)
class Session:
    """`metric`: the name of the one that decides. The rest are batches, shortest examples first.

    `answered_in_s`: seconds of the forwards on `evaluation` that said what is right, where no labels are read.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    task: Task
    metric: str
    data: TaskData
    model: nn.Module
    calibration: Sequence[Batch]
    evaluation: Sequence[Batch]
    holdout: Sequence[Batch]
    training: Sequence[Batch]
    answered_in_s: float = 0.0

    @property
    def judge(self) -> Metric:
        """The metric that decides."""
        return self.task.judge(self.metric)


def open_session(
    recipe: Recipe,
    *,
    recipes: Path,
    ui: Reporter,
    token: str | None,
    quantized: bool = False,
    baseline: str | None = None,
) -> Session:
    """Pull the checkpoint, load its data and its model. `quantized`: an int8 checkpoint is welcome.

    `baseline`: the float checkpoint whose answers are right where no labels are read; None for the checkpoint itself.

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
    ui.note(f"{task.name}, {checkpoint.size_mib:.1f} MiB, revision {checkpoint.info.revision[:19]}")

    ui.stage("Dataset")
    data = load_task_data(checkpoint, recipe, task=task, recipes=recipes, token=token)
    info = data.info
    ui.note(f"{info.id}{'/' + info.subset if info.subset else ''}: {info.examples} examples of {info.split!r}")
    columns = "; ".join(f"{role}: {', '.join(names)}" for role, names in info.columns.items())
    ui.note(f"{columns}; labels: {info.alignment}")
    for warning in data.warnings:
        ui.warn(warning)

    def batches(examples: Examples | None) -> Sequence[Batch]:
        return examples.batches(data.task, data.processor, recipe.batch_size) if examples else []

    session = Session(
        recipe,
        checkpoint,
        data.task,
        data.metric,
        data,
        load_model(checkpoint, task.auto_class, trust_remote_code=recipe.trust_remote_code),
        batches(data.calibration),
        batches(data.evaluation),
        batches(data.holdout),
        batches(data.training),
    )
    if session.judge.of_labels:
        if baseline:
            raise UsageError(
                f"--baseline is what --metric {FIDELITY} compares with; {data.metric} compares with labels."
            )
        return session if quantized or not session.task.undecided else _with_decisions(session)
    return _with_answers(session, _float_model(session, baseline, token=token))


def answers(model: nn.Module, batches: Sequence[Batch], *, task: Task) -> list[Tensor]:
    """The task's outputs of `model`, one tensor for each example."""
    found = []
    with torch.inference_mode():
        for batch in batches:
            with drawing_alike():
                found += task.outputs(model, batch)
    return found


def calibration_inputs(session: Session, batches: Sequence[Batch]) -> list[Batch]:
    """What the float model is called with, where it is to be calibrated on `batches` or to teach."""
    with torch.no_grad():
        return [session.task.calibration_inputs(session.model, batch) for batch in batches]


def _float_model(session: Session, baseline: str | None, *, token: str | None) -> nn.Module:
    """The model whose answers are right where no labels are read."""
    checkpoint = session.checkpoint
    if baseline is None and not checkpoint.is_quantized:
        return session.model
    if baseline is None:
        raise UsageError(
            f"Without labels {checkpoint.info.id} is compared with the float checkpoint that it was made from. "
            "Name that with --baseline, or a dataset with labels."
        )
    remote = session.recipe.trust_remote_code
    found = pull(baseline, token=token, trust_remote_code=remote)
    if found.is_quantized:
        raise UsageError(f"--baseline {baseline} is quantized. Expected the float checkpoint.")
    return load_model(found, session.task.auto_class, trust_remote_code=remote)


def _with_decisions(session: Session) -> Session:
    """The session of a task that decides by what the float model answers on the tuning split."""
    outputs = answers(session.model, session.evaluation, task=session.task)
    return replace(session, task=session.task.decided(outputs, session.data.evaluation.references))


def _with_answers(session: Session, model: nn.Module) -> Session:
    """The session where what `model` answers is right."""

    def answered(examples: Examples, batches: Sequence[Batch]) -> Examples:
        return replace(examples, references=answers(model, batches, task=session.task))

    data, start = session.data, time.perf_counter()
    evaluation, took_s = answered(data.evaluation, session.evaluation), time.perf_counter() - start
    holdout = data.holdout and answered(data.holdout, session.holdout)
    return replace(session, data=replace(data, evaluation=evaluation, holdout=holdout), answered_in_s=took_s)
