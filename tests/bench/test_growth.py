"""How time and memory grow is measured where it can be, and shown as a table and a plot."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.command import CHECKPOINT

from hfq.bench import growth
from hfq.bench.growth import Point, grow
from hfq.bench.run import BenchResult, EngineResult, Latency
from hfq.bench.table import markdown, write
from hfq.common.ui import Reporter
from hfq.source.checkpoint import pull

pytestmark = pytest.mark.usefixtures("forked_workers")
RESULT = BenchResult("me/out", "me/model", [], {"cpu": "CPU", "threads": 2, "kernel": "onednn"}, [])


def test_every_size_is_measured_for_the_float_model_and_for_hfq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "BATCHES", (3,))  # each point is a process, and takes seconds
    monkeypatch.setattr(growth, "LENGTHS", ())
    monkeypatch.setattr(growth, "PROCESSES", (2,))
    monkeypatch.setattr(growth, "SOAKS", (1,))
    checkpoint = pull(str(CHECKPOINT))
    layers = checkpoint.config["num_hidden_layers"]
    small = replace(checkpoint, config={**checkpoint.config, "num_hidden_layers": 1})
    points = grow(small, checkpoint, names={"fp32": None, "hfq": None}, threads=1, ui=Reporter())
    assert layers > 1  # of which one is loaded
    assert [(point.engine, point.axis, point.value) for point in points] == [
        (engine, axis, value)
        for axis, value in (("batch", 3), ("processes", 2), ("soak", 1), ("layers", 1))
        for engine in ("fp32", "hfq")
    ]
    assert all(point.milliseconds > 0 and point.peak_mib > 0 for point in points)


def test_it_is_written_as_a_table_and_a_plot(tmp_path: Path) -> None:
    points = [Point(engine, "batch", size, 10.0 * size, 100.0 + size) for size in (1, 8) for engine in ("fp32", "hfq")]
    assert "| batch | 8 | hfq | 80.0 | 108 |" in markdown(RESULT, points)
    assert "hfq grows" not in markdown(RESULT, points)
    steep = [replace(point, milliseconds=5.0 * point.value) if point.engine == "fp32" else point for point in points]
    assert "**With batch, hfq grows by 10 ms each, and fp32 by 5.**" in markdown(RESULT, steep)
    paths = write(RESULT, points, tmp_path)
    assert [path.name for path in paths] == ["bench.md", "bench.json", "bench.png", "growth.png"]
    assert paths[-1].read_bytes().startswith(b"\x89PNG")


def test_what_an_engine_did_before_it_failed_is_kept(tmp_path: Path) -> None:
    latency = Latency(1.0, 2.0, 3.0, 16.0, 30)
    engines = [
        EngineResult("fp32", by_shape={"1x16": latency, "8x$a": latency}),  # a $ would begin a formula in a plot
        EngineResult("hfq", by_shape={"1x16": latency}, failure="at 8x$a: no memory"),
        EngineResult("torch", failure="no such operation"),
    ]
    result = replace(RESULT, checkpoint="a$^$b", shapes=["1x16", "8x$a"], engines=engines)
    table = markdown(result, [])
    assert "| 1x16 | hfq | 1.00 | 2.00 | 3.00 | 30 | 16.0 | 1.00 |" in table and "| 8x$a | hfq |" not in table
    assert "**hfq did not run to the end:** at 8x$a: no memory" in table
    assert "**torch did not run to the end:** no such operation" in table and "| torch |" not in table
    assert "answers otherwise" not in table and "100.0%" not in table  # nothing was compared
    assert write(result, [], tmp_path)[2].read_bytes().startswith(b"\x89PNG")
