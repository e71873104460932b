"""Duration and memory of freshly loaded checkpoints, each in a process of its own, timed in turn.

Machines drift: only passes that alternate within one run are compared.
"""

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.examples import Batches
from ..ptq.inputs import count
from ..source.checkpoint import Checkpoint
from ..tasks.base import Batch, Task
from .process import Process

PASSES = 3
TIMED_EXAMPLES = 64  # a pass over more says nothing new, and FP32 takes its time


@dataclass(frozen=True)
class Timing:
    """`duration_s`: median of the passes over all batches. Memory in MiB; `peak` less what imports alone take."""

    duration_s: float
    load_s: float
    memory_mib: float
    peak_memory_mib: float
    examples_per_s: float


@dataclass(frozen=True)
class Subject:
    """A checkpoint to time. `stock`: load it as transformers does without hfq. `compiled`: with `hfq.compile`."""

    checkpoint: Checkpoint
    task: Task
    stock: bool = False
    compiled: bool = False
    trust_remote_code: bool = False


def timed_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Some of the full batches: a rest of two texts tells neither speed nor peak, though it holds the longest."""
    some = some_batches(batches, TIMED_EXAMPLES)
    if len(some) < len(batches) > 1 and count(some[-1]) < count(full := batches[len(batches) - 2]):
        some[-1] = full
    return some


def some_batches(batches: Sequence[Batch], examples: int) -> list[Batch]:
    """Batches of up to so many examples, evenly spaced over all of them, which are sorted by length."""
    return [batches[place] for place in some_places(batches, examples)]


def some_places(batches: Sequence[Batch], examples: int) -> range:
    """The numbers of those batches."""
    step = max(1, -(-examples_in(batches) // examples))
    return range(len(batches))[::-1][::step][::-1]  # counted from the end: the longest batch sets the memory peak


def examples_in(batches: Sequence[Batch]) -> int:
    """How many examples the batches hold."""
    return batches.examples if isinstance(batches, Batches) else sum(count(batch) for batch in batches)


def measure(subjects: Sequence[Subject], batches: Sequence[Batch], *, threads: int | None) -> list[Timing]:
    """Time each subject on the same batches, one pass of each in turn, `PASSES` times.

    Raises:
        HfqError: a process cannot load or run its checkpoint.
    """
    with tempfile.TemporaryDirectory(prefix="hfq-") as folder, ExitStack() as stack:
        file = _save(batches, Path(folder))
        workers = [stack.enter_context(Worker(subject, threads=threads)) for subject in subjects]
        loaded = [worker.load(file) for worker in workers]
        passes = [[worker.ask({"do": "pass"}) for worker in workers] for _ in range(PASSES)]
    timings = []
    for found, rows in zip(loaded, zip(*passes, strict=True), strict=True):
        duration = statistics.median(row["seconds"] for row in rows)
        peak = rows[-1]["peak_mib"] - found["imported_mib"]
        timings.append(Timing(duration, found["load_s"], found["memory_mib"], peak, examples_in(batches) / duration))
    return timings


def outputs_of(subject: Subject, batches: Sequence[Batch], *, threads: int | None) -> list[Tensor]:
    """The task's outputs from a process of its own, one tensor for each example."""
    with tempfile.TemporaryDirectory(prefix="hfq-") as folder, Worker(subject, threads=threads) as worker:
        worker.load(_save(batches, Path(folder)))
        path = Path(folder) / "outputs.safetensors"
        worker.ask({"do": "outputs", "path": str(path)})
        outputs = load_file(path)
        return [outputs[str(row)] for row in range(len(outputs))]


class Worker(Process):
    """One `hfq.measure.model_process` process for a checkpoint."""

    def __init__(self, subject: Subject, *, threads: int | None) -> None:
        name = subject.checkpoint.info.id
        super().__init__("hfq.measure.model_process", name, forked=True)
        self._subject = subject
        self.tell(
            {
                "do": "open",
                "task": subject.task.name,
                "config": dict(subject.task.config),
                "folder": str(subject.checkpoint.path),
                "settings": dict(subject.task.given),
                "stock": subject.stock,
                "threads": threads,
            }
        )

    def load(self, batches: Path) -> dict[str, float]:
        """Load the checkpoint and run it once: seconds, and MiB."""
        self.hear()
        return self.ask(
            {
                "do": "load",
                "model": str(self._subject.checkpoint.path),
                "compiled": self._subject.compiled,
                "batches": str(batches),
                "trust_remote_code": self._subject.trust_remote_code,
            }
        )


def _save(batches: Sequence[Batch], folder: Path) -> Path:
    path = folder / "batches.safetensors"
    save_file(
        {f"{i}.{name}": tensor.contiguous() for i, batch in enumerate(batches) for name, tensor in batch.items()}, path
    )
    return path
