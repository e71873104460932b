"""Duration and memory of freshly loaded checkpoints, each in a process of its own, timed in turn.

Machines drift: only passes that alternate within one run are compared.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import HfqError
from .quantization.inputs import model_inputs
from .source import Checkpoint

PASSES = 3
TIMED_EXAMPLES = 512  # a pass over more says nothing new, and FP32 takes its time
# For glibc: stock transformers widens weights one by one, and what that leaves would add a quarter to their memory.
_FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
P = TypeVar("P", bound="Process")


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
    with tempfile.TemporaryDirectory(prefix="hfq-") as folder, ExitStack() as stack:
        file = _save(batches, Path(folder))
        # All are started before any is waited for: importing takes longer than most of what follows.
        workers = [stack.enter_context(Worker(subject, threads=threads)) for subject in subjects]
        loaded = [worker.load(file) for worker in workers]
        passes = [[worker.ask({"do": "pass"}) for worker in workers] for _ in range(PASSES)]
    timings = []
    for found, rows in zip(loaded, zip(*passes, strict=True), strict=True):
        duration = statistics.median(row["seconds"] for row in rows)
        peak = rows[-1]["peak_mib"] - found["imported_mib"]
        timings.append(Timing(duration, found["load_s"], found["memory_mib"], peak, examples / duration))
    return timings


def logits_of(subject: Subject, batches: Sequence[Mapping[str, Tensor]], *, threads: int | None) -> Tensor:
    """Logits from a process of its own: float32 `[examples, labels]`."""
    with tempfile.TemporaryDirectory(prefix="hfq-") as folder, Worker(subject, threads=threads) as worker:
        worker.load(_save(batches, Path(folder)))
        path = Path(folder) / "logits.safetensors"
        worker.ask({"do": "logits", "path": str(path)})
        return load_file(path)["logits"]


class Process:
    """`python -m MODULE`, which answers each JSON line with another. `name`: of what it measures, for messages."""

    def __init__(self, module: str, name: str, *, variables: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed with the process; a pipe would fill up
        self.process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **(variables or {})},
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        self.tell(request)
        return self.hear()

    def tell(self, request: dict[str, Any]) -> None:
        """Send one request."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def hear(self) -> dict[str, Any]:
        """Wait for the answer to one request."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            tail = self.log.read().strip().splitlines()[-1:]
            raise HfqError(f"The process that measures {self.name} ended early: {' '.join(tail) or 'no message'}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise HfqError(f"{self.name} cannot be loaded and run in a fresh process: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process and its pipes."""
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def __enter__(self: P) -> P:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Worker(Process):
    """One `hfq.worker` process for a checkpoint. It imports what it needs while nobody waits."""

    def __init__(self, subject: Subject, *, threads: int | None) -> None:
        super().__init__("hfq.worker", subject.checkpoint.info.id, variables=_FREED_AT_ONCE if subject.stock else None)
        self._subject = subject
        quantized = subject.checkpoint.is_quantized
        self.tell(
            {
                "do": "open",
                "auto_class": subject.auto_class,
                "architecture": (subject.checkpoint.config.get("architectures") or [""])[0],
                "imports": ["compressed_tensors", "hfq.runtime.quantizer"] if quantized else [],
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


def _save(batches: Sequence[Mapping[str, Tensor]], folder: Path) -> Path:
    path = folder / "batches.safetensors"
    save_file({f"{i}.{name}": tensor for i, batch in enumerate(batches) for name, tensor in batch.items()}, path)
    return path
