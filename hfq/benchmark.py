"""Duration and memory of freshly loaded checkpoints, each in a process of its own, timed in turn.

Machines drift: only passes that alternate within one run are compared.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import HfqError
from .quantization.inputs import model_inputs
from .source import Checkpoint

PASSES = 3
TIMED_EXAMPLES = 512  # a pass over more says nothing new, and FP32 takes its time


@dataclass(frozen=True)
class Timing:
    """`duration_s`: median of the passes over all batches. Memory in MiB; `peak` less what imports alone take."""

    duration_s: float
    load_s: float
    memory_mb: float
    peak_memory_mb: float
    examples_per_s: float


@dataclass(frozen=True)
class Subject:
    """A checkpoint to time. `stock`: load it as transformers does without hfq. `compiled`: with `hfq.compile`."""

    checkpoint: Checkpoint
    auto_class: str
    stock: bool = False
    compiled: bool = False
    trust_remote_code: bool = False


def timed_batches(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Model inputs of up to `TIMED_EXAMPLES` examples, evenly spaced over the length-sorted batches."""
    examples = sum(len(batch["labels"]) for batch in batches)
    step = max(1, -(-examples // TIMED_EXAMPLES))
    chosen = list(batches)[::-1][::step][::-1]  # counted from the end: the longest batch sets the memory peak
    return [model_inputs(batch) for batch in chosen]


def measure(subjects: Sequence[Subject], batches: Sequence[dict[str, Tensor]], *, threads: int | None) -> list[Timing]:
    """Time each subject on the same batches, one pass of each in turn, `PASSES` times.

    Raises:
        HfqError: a process cannot load or run its checkpoint.
    """
    examples = sum(len(batch["input_ids"]) for batch in batches)
    with tempfile.TemporaryDirectory(prefix="hfq-") as folder:
        file = _save(batches, Path(folder))
        workers: list[Worker] = []
        try:
            for subject in subjects:
                workers.append(Worker(subject, file, threads=threads))
            passes = [[worker.ask({"do": "pass"}) for worker in workers] for _ in range(PASSES)]
        finally:
            for worker in workers:
                worker.close()
    timings = []
    for worker, rows in zip(workers, zip(*passes, strict=True), strict=True):
        duration = statistics.median(row["seconds"] for row in rows)
        peak = rows[-1]["peak_mib"] - worker.loaded["imported_mib"]
        timings.append(
            Timing(duration, worker.loaded["load_s"], worker.loaded["memory_mib"], peak, examples / duration)
        )
    return timings


def logits_of(subject: Subject, batches: Sequence[Mapping[str, Tensor]], *, threads: int | None) -> Tensor:
    """Logits from a process of its own: float32 `[examples, labels]`."""
    with (
        tempfile.TemporaryDirectory(prefix="hfq-") as folder,
        Worker(subject, _save(batches, Path(folder)), threads=threads) as worker,
    ):
        path = Path(folder) / "logits.safetensors"
        worker.ask({"do": "logits", "path": str(path)})
        return load_file(path)["logits"]


class Process:
    """`python -m MODULE`, which answers each JSON line with another. `name`: of what it measures, for messages."""

    def __init__(self, module: str, name: str) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed with the process; a pipe would fill up
        self.process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise HfqError("The benchmark process has no pipes.")
        try:
            print(json.dumps(request), file=stdin, flush=True)
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            tail = self.log.read().strip().splitlines()[-1:]
            raise HfqError(f"The process that measures {self.name} ended early: {' '.join(tail) or 'no message'}.")
        answer = json.loads(line)
        if "error" in answer:
            raise HfqError(f"{self.name} cannot be loaded and run in a fresh process: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process and its pipes."""
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Worker(Process):
    """One `hfq.worker` process with a checkpoint loaded."""

    def __init__(self, subject: Subject, batches: Path, *, threads: int | None) -> None:
        super().__init__("hfq.worker", subject.checkpoint.info.id)
        quantized = subject.checkpoint.is_quantized
        try:
            self.loaded = self.ask(
                {
                    "do": "load",
                    "model": str(subject.checkpoint.path),
                    "auto_class": subject.auto_class,
                    "architecture": (subject.checkpoint.config.get("architectures") or [""])[0],
                    "imports": ["compressed_tensors", "hfq.runtime.quantizer"] if quantized else [],
                    "stock": subject.stock,
                    "compiled": subject.compiled,
                    "batches": str(batches),
                    "threads": threads,
                    "trust_remote_code": subject.trust_remote_code,
                }
            )
        except BaseException:
            self.close()
            raise


def _save(batches: Sequence[Mapping[str, Tensor]], folder: Path) -> Path:
    path = folder / "batches.safetensors"
    save_file({f"{i}.{name}": tensor for i, batch in enumerate(batches) for name, tensor in batch.items()}, path)
    return path
