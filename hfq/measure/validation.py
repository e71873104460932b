"""Running a model on a split through Lightning, so that its devices and strategies apply.

Durations here are only a trial's own forward passes; published timings come from `hfq.measure.timing`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..common.errors import UsageError
from ..common.silence import silent
from ..tasks.base import Batch, Task
from .evaluate import Engine, timed_outputs

LIGHTNING = (
    "lightning.pytorch",
    "lightning.fabric",
    "lightning",
)  # on every call they announce devices and advise workers


def validate(model: nn.Module, batches: Sequence[Batch], *, task: Task, engine: Engine) -> tuple[list[Tensor], float]:
    """The task's outputs of `model`, one tensor for each example in the order of `batches`, and seconds of the forwards.

    Raises:
        UsageError: Lightning refuses the engine.
    """
    with tempfile.TemporaryDirectory(prefix="hfq-") as folder, silent(*LIGHTNING):
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
        loader = DataLoader(_Indexed(batches), batch_size=None)
        trainer.validate(_Validation(model, task, Path(folder)), loader, verbose=False)
        left = [load_file(path) for path in sorted(Path(folder).iterdir())]
    seconds = sum(tensors.pop("seconds").item() for tensors in left)
    outputs = {_place(key): output for tensors in left for key, output in tensors.items()}
    return [outputs[place] for place in sorted(outputs)], seconds


class _Indexed(Dataset):
    """Batches with their position, so that outputs of many processes can be put in order."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[int, Batch]:
        return index, self.batches[index]


class _Validation(LightningModule):
    """The thinnest module around a model: batches in, outputs in a file for each process.

    A file, because outputs may be of any shape, and a spawned process's own state does not come back.
    """

    def __init__(self, model: nn.Module, task: Task, folder: Path) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.folder = folder
        self.outputs: dict[str, Tensor] = {}
        self.seconds = 0.0

    def validation_step(self, indexed_batch: tuple[int, Batch], _: int) -> None:
        position, batch = indexed_batch
        outputs, seconds = timed_outputs(self.model, batch, task=self.task)
        self.seconds += seconds
        for row, output in enumerate(outputs):
            self.outputs[f"{position}.{row}"] = output

    def on_validation_epoch_end(self) -> None:
        path = self.folder / f"{self.global_rank}.safetensors"
        save_file({**self.outputs, "seconds": torch.tensor(self.seconds)}, path)


def _place(key: str) -> tuple[int, int]:
    """Batch and row of an output."""
    batch, row = key.split(".")
    return int(batch), int(row)
