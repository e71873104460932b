"""How latency and memory grow with layers, batch and length, of the float checkpoint and of hfq's.

Every point is a process of its own, because a peak of memory can only be read once.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import HfqError
from ..common.ui import Reporter
from ..measure.process import Process
from ..source.checkpoint import Checkpoint
from .engines import REFERENCE
from .run import opening_request

BATCHES = (1, 8, 32)  # at LENGTH tokens
LENGTHS = (32, 128, 256, 512)  # at BATCH rows
BATCH, LENGTH = 8, 128
REPEAT = 5


@dataclass(frozen=True)
class Point:
    """One engine at one size. `axis`: which of layers, batch and length is `value`; the others are the usual ones.

    `milliseconds`: median of a forward. `peak_mib`: MiB that loading and running took beyond importing.
    """

    engine: str
    axis: str
    value: int
    milliseconds: float
    peak_mib: float


def grow(quantized: Checkpoint, baseline: Checkpoint, *, threads: int, ui: Reporter) -> list[Point]:
    """Measure the float model and the int8 one along each axis, in turn. A size that fails has no point."""
    with tempfile.TemporaryDirectory(prefix="hfq-bench-") as folder:
        opening = opening_request(quantized, baseline, threads=threads, folder=Path(folder))
        sizes = list(_sizes(quantized.config))
        points = []
        for axis, value, size in ui.track(sizes, text="growth", total=len(sizes)):
            for name, checkpoint in ((REFERENCE, baseline), ("hfq", quantized)):
                try:
                    points.append(_measure(name, axis, value, {**opening, **size}, checkpoint))
                except HfqError as error:
                    ui.warn(f"{axis} {value}: {error}")
        return points


def _sizes(config: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    layers = next((config[key] for key in ("num_hidden_layers", "n_layers") if key in config), None)
    for count in sorted({max(1, layers * part // 4) for part in (1, 2, 3, 4)}) if layers else ():
        yield "layers", count, {"layers": count, "shape": [BATCH, LENGTH]}
    for batch in BATCHES:
        yield "batch", batch, {"shape": [batch, LENGTH]}
    for length in LENGTHS:
        if length <= config.get("max_position_embeddings", length):
            yield "length", length, {"shape": [BATCH, length]}


def _measure(name: str, axis: str, value: int, request: dict[str, Any], checkpoint: Checkpoint) -> Point:
    with Process("hfq.bench.engine_process", name) as process:
        process.ask({**request, "engine": name})
        process.ask({**request, "do": "load", "path": str(checkpoint.path)})
        found = process.ask({**request, "do": "time", "repeat": REPEAT})
    return Point(name, axis, value, 1e3 * statistics.median(found["seconds"]), found["peak_mib"])
