"""Training a fake-quantized model to answer as the float model does. No labels are read.

The loss is what candidates are ranked by, the squared error of the encoder's output relative to the teacher's, and that of
the answers: for logits that is as good a distillation as any (Kim et al. 2021, arXiv:2105.08919).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from ..common.silence import silent
from ..measure.validation import LIGHTNING
from ..ptq.calibration import real_tokens
from ..ptq.inputs import Batch
from .fake_quantization import trained

WARM_UP = 0.1  # of the steps
Look = Callable[[int, float], bool]


class Progress(NamedTuple):
    """Steps that were done, and the mean loss of the last of them."""

    done: int = 0
    loss: float = math.nan


@dataclass(frozen=True)
class Schedule:
    """`steps` in all, a look at the model after each `look_after` of them; learning rates at their highest."""

    steps: int = 400
    look_after: int = 50
    weights_rate: float = 1e-4
    scales_rate: float = 3e-3
    seed: int = 42


class Distillation(LightningModule):
    """Student and teacher on the same inputs, from step `first` on."""

    def __init__(self, student: nn.Module, teacher: nn.Module, schedule: Schedule, *, first: int) -> None:
        super().__init__()
        self.student = student
        self.schedule = schedule
        self.first = first
        self._teacher = (teacher,)  # in a tuple: it is not trained, nor moved

    def training_step(self, batch: Batch, _: int) -> Tensor:
        with torch.no_grad():
            expected = _answers(self._teacher[0], batch)
        found = _answers(self.student, batch)
        return sum((_relative(a, b) for a, b in zip(found, expected, strict=True)), torch.zeros(()))

    def configure_optimizers(self) -> Any:
        weights, scales = trained(self.student)
        schedule = self.schedule
        groups = [{"params": weights, "lr": schedule.weights_rate}, {"params": scales, "lr": schedule.scales_rate}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        warm = max(1, round(WARM_UP * schedule.steps))

        def rate(step: int) -> float:
            done = step + self.first
            return min((done + 1) / warm, max(0.0, (schedule.steps - done) / max(1, schedule.steps - warm)))

        by_step = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": by_step, "interval": "step"}}


class Looks(Callback):
    """Interrupts training after so many steps: keeps its state in a file, and asks whether to go on."""

    def __init__(self, look: Look, state: Path, *, after: int) -> None:
        self.look = look
        self.state = state
        self.after = after
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        if module.first:
            _restore_moments(trainer.optimizers[0], self.state)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        done = module.first + trainer.global_step
        if done % self.after and trainer.global_step < trainer.max_steps:
            return
        loss = sum(self.losses) / len(self.losses)
        _keep(module.student, trainer.optimizers[0], self.state, progress=Progress(done, loss))
        trainer.should_stop = self.look(done, loss)
        self.losses.clear()


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    *,
    schedule: Schedule,
    look: Look,
    state: Path,
) -> None:
    """Train `student`, without dropout, on `batches` in a random order, again and again.

    `look` is given the number of steps done and the mean loss since it looked last, and says whether that is enough.
    `state`: a file to go on from, if it is there and of a training of the same layers; written before each look.
    """
    first, loss = _restore(student, state)
    if first and (look(first, loss) or first >= schedule.steps):
        return
    with silent(*LIGHTNING):
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=schedule.steps - first,
            logger=False,
            callbacks=[Looks(look, state, after=schedule.look_after)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        order = _Order(batches, seed=schedule.seed, numbers=range(first, schedule.steps))
        module = Distillation(student, teacher, schedule, first=first).eval()
        trainer.fit(module, DataLoader(order, batch_size=None, shuffle=False))


class _Order(Dataset):
    """Batches of a training run by number: each once in a random order, then again in another."""

    def __init__(self, batches: Sequence[Batch], *, seed: int, numbers: range) -> None:
        self.batches = batches
        self.seed = seed
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self.numbers):
            raise IndexError(index)
        epoch, place = divmod(self.numbers[index], len(self.batches))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return dict(self.batches[int(torch.randperm(len(self.batches), generator=generator)[place])])


def _answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The encoder's output at real tokens, and the floats that the model answers with for each example."""
    kept: list[Tensor] = []
    mask = batch.get("attention_mask")

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        kept.append(real_tokens(first, mask))

    encoder = next((part.base_model for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    handle = encoder.register_forward_hook(keep) if encoder is not None and encoder is not model else None
    try:
        answer = model(**batch)
    finally:
        if handle is not None:
            handle.remove()
    floats = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [*kept, *(real_tokens(leaf, mask) for leaf in floats if leaf.dim())]


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).square().sum() / expected.square().sum().clamp(min=1e-12)


def _keep(student: nn.Module, optimizer: torch.optim.Optimizer, path: Path, *, progress: Progress) -> None:
    """Write what training goes on from: numbers alone, so that nothing is run when it is read."""
    tensors = {"progress": torch.tensor(progress, dtype=torch.float64)}
    for number, parameter in enumerate(_parameters(optimizer)):
        tensors[f"{number}"] = parameter.detach()
        tensors |= {f"{number}.{key}": value for key, value in optimizer.state[parameter].items()}
    written = path.with_suffix(".new")
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, written, metadata=_what_is_trained(student))
    written.replace(path)


def _restore(student: nn.Module, path: Path) -> Progress:
    """Give `student` what was kept of a training of the same layers, if it was."""
    if not path.is_file():
        return Progress()
    with safe_open(path, framework="pt") as file:
        if file.metadata() != _what_is_trained(student):
            return Progress()
    tensors = load_file(path)
    for number, parameter in enumerate(itertools.chain(*trained(student))):
        parameter.data.copy_(tensors[f"{number}"])
    done, loss = tensors["progress"].tolist()
    return Progress(int(done), loss)


def _what_is_trained(student: nn.Module) -> dict[str, str]:
    """The names of its parameters, and how large they are."""
    return {name: str([*each.shape]) for name, each in student.named_parameters() if each.requires_grad}


def _restore_moments(optimizer: torch.optim.Optimizer, path: Path) -> None:
    tensors = load_file(path)
    for number, parameter in enumerate(_parameters(optimizer)):
        prefix = f"{number}."
        optimizer.state[parameter] = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
