"""Evaluating a model on a split, through Lightning, so that its devices and strategies apply.

Importing Lightning and torchmetrics takes seconds: this module is imported when there is something to evaluate.
Durations here are only a trial's own forward passes; published timings come from `hfq.benchmark`.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .errors import HfqError, UsageError
from .evaluation import Engine, Evaluation
from .quantization.inputs import model_inputs

Batch = dict[str, Tensor]


def evaluate(model: nn.Module, batches: Iterable[Batch], *, metric: str, num_labels: int, engine: Engine) -> Evaluation:
    """Run `batches` (padded tensors with `labels`) through `Trainer.validate`.

    Raises:
        UsageError: Lightning refuses the engine.
        HfqError: the model's answers are not finite numbers.
    """
    indexed = _Indexed(list(batches))
    with tempfile.TemporaryDirectory(prefix="hfq-") as folder, _quiet():
        results = Path(folder) / "logits.safetensors"
        module = _Validation(model, make_metric(metric, num_labels), results)
        try:
            trainer = Trainer(
                accelerator=engine.accelerator,
                devices=engine.devices,
                strategy=engine.strategy,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
        except (ValueError, RuntimeError, ImportError) as error:
            raise UsageError(f"Lightning cannot evaluate with {engine}: {error}") from error
        (scores,) = trainer.validate(module, DataLoader(indexed, batch_size=None), verbose=False)
        found = load_file(results)
    if not found["logits"].isfinite().all():
        raise HfqError(
            "The model answers with NaN or infinity on this data: its weights or the quantization are broken."
        )
    labels = torch.cat([batch["labels"] for batch in indexed.batches])
    return Evaluation(scores["metric"], found["logits"], labels, found["duration_s"].item())


def make_metric(name: str, num_labels: int) -> torchmetrics.Metric:
    """A torchmetrics metric by hfq's name. For two labels, precision, recall and F1 are of label 1; else macro."""
    if name == "matthews_correlation":
        return torchmetrics.MatthewsCorrCoef(task="multiclass", num_classes=num_labels)
    kinds: dict[str, Any] = {
        "accuracy": torchmetrics.Accuracy,
        "f1": torchmetrics.F1Score,
        "precision": torchmetrics.Precision,
        "recall": torchmetrics.Recall,
    }
    if name not in kinds:
        raise UsageError(
            f"Metric {name!r} is not known. Expected one of: {', '.join([*kinds, 'matthews_correlation'])}."
        )
    if name == "accuracy":
        return torchmetrics.Accuracy(task="multiclass", num_classes=num_labels, average="micro")
    if num_labels == 2:
        return kinds[name](task="binary")
    return kinds[name](task="multiclass", num_classes=num_labels, average="macro")


class _Indexed(Dataset):
    """Batches with their position, so that answers gathered from many processes can be put in order."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        return index, self.batches[index]


class _Validation(LightningModule):
    """The thinnest module around a model: logits in, metric and answers out.

    Answers leave through a file, because with spawned processes this object's own state does not come back.
    """

    def __init__(self, model: nn.Module, metric: torchmetrics.Metric, results: Path) -> None:
        super().__init__()
        self.model = model
        self.metric = metric
        self.answers = torchmetrics.CatMetric(nan_strategy="disable")
        self.duration = torchmetrics.SumMetric(nan_strategy="disable")
        self.results = results

    def validation_step(self, indexed_batch: tuple[int, Batch], _: int) -> None:
        position, batch = indexed_batch
        labels = batch["labels"]
        inputs = model_inputs(batch)
        start = time.perf_counter()
        logits = self.model(**inputs).logits.float()
        self.duration.update(time.perf_counter() - start)
        self.metric.update(logits.argmax(1), labels)
        self.answers.update(torch.column_stack([torch.full((len(labels),), float(position)), logits.cpu()]))

    def on_validation_epoch_end(self) -> None:
        self.log("metric", self.metric.compute())
        rows = self.answers.compute()
        duration = self.duration.compute()
        if self.trainer.is_global_zero:
            ordered = rows[rows[:, 0].argsort(stable=True)]
            save_file({"logits": ordered[:, 1:].contiguous(), "duration_s": duration.reshape(1)}, self.results)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning announces devices and advises loader workers on every call; evaluations are many."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
