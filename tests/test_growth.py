"""How time and memory grow is measured where it can be, and shown as a table and a plot."""

from dataclasses import replace
from pathlib import Path

import pytest
from command import CHECKPOINT

from hfq.bench import growth
from hfq.bench.growth import Point, grow
from hfq.bench.run import BenchResult
from hfq.bench.table import markdown, write
from hfq.source import pull
from hfq.ui import Reporter

RESULT = BenchResult("me/out", "me/model", [], {"cpu": "CPU", "threads": 2, "kernel": "onednn"}, [])


def test_every_size_is_measured_for_the_float_model_and_for_hfq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "BATCHES", (3,))  # each point is a process, and takes seconds
    monkeypatch.setattr(growth, "LENGTHS", ())
    checkpoint = pull(str(CHECKPOINT))
    layers = checkpoint.config["num_hidden_layers"]
    small = replace(checkpoint, config={**checkpoint.config, "num_hidden_layers": 1})
    points = grow(small, checkpoint, threads=1, ui=Reporter())
    assert layers > 1  # of which one is loaded
    assert [(point.engine, point.axis, point.value) for point in points] == [
        (engine, axis, value) for axis, value in (("layers", 1), ("batch", 3)) for engine in ("fp32", "hfq")
    ]
    assert all(point.milliseconds > 0 and point.peak_mb > 0 for point in points)


def test_it_is_written_as_a_table_and_a_plot(tmp_path: Path) -> None:
    points = [Point(engine, "batch", size, 10.0 * size, 100.0 + size) for size in (1, 8) for engine in ("fp32", "hfq")]
    assert "| batch | 8 | hfq | 80.0 | 108 |" in markdown(RESULT, points)
    paths = write(RESULT, points, tmp_path)
    assert [path.name for path in paths] == ["bench.md", "bench.json", "bench.png", "growth.png"]
    assert paths[-1].read_bytes().startswith(b"\x89PNG")
