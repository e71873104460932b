"""How latency and memory grow with layers, batch, length, processes and time, of every engine that a bench compares.

Every point has processes of its own, because a peak of memory can only be read once.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..common.errors import HfqError
from ..common.ui import Reporter
from ..measure.process import Process
from ..source.checkpoint import Checkpoint
from .run import open_engine, opening_request, prepare

BATCHES = (1, 8, 32)  # at LENGTH tokens
LENGTHS = (32, 128, 256, 512)  # at BATCH rows
PROCESSES = (1, 2, 4)  # that share the threads
SOAKS = (10, 40)  # seconds of ragged requests: whether a process takes more memory the longer it serves
MOST_TOKENS = 512  # of a row of them
BATCH, LENGTH = 8, 128
REPEAT = 5
ENOUGH_S = 480  # no point begins after that
AS_STEEP = 1.05  # a slope that is larger by no more than noise


class Size(NamedTuple):
    """What is measured at once. `layers`: None for all. `soak_s`: for so long ragged requests, instead of ones of `shape`."""

    layers: int | None = None
    shape: tuple[int, int] = (BATCH, LENGTH)
    processes: int = 1
    soak_s: int = 0


@dataclass(frozen=True)
class Point:
    """One engine at one size. `axis`: which of layers, batch, length, processes and soak is `value`; the others are the usual.

    `milliseconds`: median of a forward, in all processes at once; of a soak, for a thousand tokens. `peak_mib`: MiB that loading and running took beyond
    importing; of several processes, what they took together.
    """

    engine: str
    axis: str
    value: int
    milliseconds: float
    peak_mib: float


def grow(
    quantized: Checkpoint, baseline: Checkpoint, *, names: Mapping[str, str | None], threads: int, ui: Reporter
) -> list[Point]:
    """Measure the engines called `names` along each axis, in turn. `names`: with interpreters, as in `bench`.

    A size that fails has no point, and so has what is left to do after eight minutes.
    """
    until = time.monotonic() + ENOUGH_S
    with tempfile.TemporaryDirectory(prefix="hfq-bench-") as folder:
        opening = opening_request(quantized, baseline, threads=threads, folder=Path(folder))
        opening["pythons"] = {name: python for name, python in names.items() if python}
        opening["longest"] = min(MOST_TOKENS, quantized.config.get("max_position_embeddings", MOST_TOKENS))
        runner = _Runner(opening, Path(folder))
        sizes = list(_sizes(quantized.config))
        points = []
        for axis, value, size in ui.track(sizes, text="growth", total=len(sizes)):
            if time.monotonic() > until:
                ui.warn(f"{axis} {value} is left out: {ENOUGH_S // 60} minutes have passed.")
                continue
            for name in names:
                try:
                    points.append(Point(name, axis, value, *runner.measured(name, size)))
                except (HfqError, OSError) as error:
                    ui.warn(f"{name}, {axis} {value}: {error}")
        return points


def steeper(points: Sequence[Point]) -> list[str]:
    """A sentence for each slope of hfq's that is worse than another engine's."""
    found = []
    for axis in dict.fromkeys(point.axis for point in points):
        for unit, kind in (("ms", "milliseconds"), ("MiB", "peak_mib")):
            slopes = {name: _slope(points, name, axis, kind) for name in dict.fromkeys(p.engine for p in points)}
            own = slopes.get("hfq")
            for name, slope in slopes.items():
                if name != "hfq" and own is not None and slope is not None and own > AS_STEEP * max(slope, 0):
                    found.append(f"With {axis}, hfq grows by {own:.3g} {unit} each, and {name} by {slope:.3g}.")
    return found


def _slope(points: Sequence[Point], engine: str, axis: str, kind: str) -> float | None:
    """By least squares; None of fewer than two points."""
    own = [point for point in points if point.engine == engine and point.axis == axis]
    if len(own) < 2:
        return None
    return statistics.linear_regression([p.value for p in own], [getattr(p, kind) for p in own]).slope


def _sizes(config: dict[str, Any]) -> Iterator[tuple[str, int, Size]]:
    for batch in BATCHES:
        yield "batch", batch, Size(shape=(batch, LENGTH))
    for length in LENGTHS:
        if length <= config.get("max_position_embeddings", length):
            yield "length", length, Size(shape=(BATCH, length))
    for count in PROCESSES:
        yield "processes", count, Size(processes=count)
    for seconds in SOAKS:
        yield "soak", seconds, Size(soak_s=seconds)
    layers = next((config[key] for key in ("num_hidden_layers", "n_layers") if key in config), None)
    for count in sorted({max(1, layers * part // 4) for part in (1, 2, 3, 4)}) if layers else ():
        yield "layers", count, Size(layers=None if count == layers else count)


class _Runner:
    """Measures sizes, each once, and prepares what an engine loads, for each number of layers once."""

    def __init__(self, opening: dict[str, Any], folder: Path) -> None:
        self._opening, self._folder = opening, folder
        self._loading: dict[tuple[str, int | None], dict[str, Any]] = {}
        self._found: dict[tuple[str, Size], tuple[float, float]] = {}

    def measured(self, name: str, size: Size) -> tuple[float, float]:
        """Milliseconds and MiB.

        Raises:
            HfqError: it does not run.
        """
        if (name, size) not in self._found:
            self._found[name, size] = self._measure(name, size)
        return self._found[name, size]

    def _measure(self, name: str, size: Size) -> tuple[float, float]:
        layers, shape, count, soak_s = size
        opening = {**self._opening, "layers": layers, "shape": shape}
        if (name, layers) not in self._loading:
            self._loading[name, layers] = prepare(name, opening, self._folder / f"{name}-{layers or 'all'}")
        loading = {**self._loading[name, layers], "shape": shape}
        opening["threads"] = max(1, opening["threads"] // count)
        with ExitStack() as stack:
            running = [stack.enter_context(open_engine(name, opening)) for _ in range(count)]
            for process in running:
                process.hear()
            for process in running:
                process.ask(loading)
            if soak_s:
                found = running[0].ask({**opening, "do": "soak", "seconds": soak_s})
                return found["milliseconds"], found["peak_mib"]
            for process in running:
                process.tell({**opening, "do": "time", "repeat": REPEAT})
            answers = [process.hear() for process in running]
            seconds = [second for one in answers for second in one["seconds"]]
            taken = answers[0]["peak_mib"] if count == 1 else _together(running)
        return 1e3 * statistics.median(seconds), taken


def _together(running: Sequence[Process]) -> float:
    """MiB that processes of one model have resident: what is each one's own, and once what they share."""
    found = [process.ask({"do": "memory"}) for process in running]
    return float(sum(one["private"] for one in found) + max(one["shared"] for one in found))
