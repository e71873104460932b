"""Reports and exported folders for tests: small, complete, and different in every figure."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hfq.data.examples import DatasetInfo
from hfq.measure.figures import Comparison, Measurement, StockComparison
from hfq.report.report import Layers, Report
from hfq.source.checkpoint import CheckpointInfo
from hfq.tasks.base import Trivial
from hfq.tuning.goal import Goal
from hfq.tuning.trial import Trial

USAGE = 'from transformers import pipeline\n\nmodel = pipeline("text-classification", model="{model}", device="cpu")'
HOSTILE = [
    "x](https://evil.example) ![i](https://evil.example/p.png)",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a\n---\nlicense: evil\n---\n# Evil heading",
    "{{ 7 * 7 }}{% for x in ().__class__.__mro__ %}{% endfor %}",
    "`</code>` | **bold** | _em_ | ~~gone~~ &lt; $$x$$ \\",
    "\r\n\r\n```\n## Evil heading\n\u2028\u202e- [ ] item",
    "# Evil heading",
    "1. item",
    "> quote",
    "https://evil.example www.evil.example me@evil.example",
]


def make_report(**changes: Any) -> Report:
    """A report of a run that met its goal, with a holdout. `changes` replace fields."""
    report = Report(
        hfq_version="0.1.0",
        task="text-classification",
        pipeline_tag="text-classification",
        usage=USAGE,
        checkpoint=CheckpointInfo(
            id="Intel/bert-base-uncased-mrpc", revision="a" * 40, license="apache-2.0", language=["en"]
        ),
        dataset=DatasetInfo(
            id="nyu-mll/glue",
            subset="mrpc",
            revision="b" * 40,
            split="validation",
            calibration_split="train",
            calibration_samples=100,
            columns={"text": ["sentence1", "sentence2"], "label": ["label"]},
            alignment="by name",
            examples=408,
            holdout_split="test",
            holdout_examples=1725,
            max_length=128,
        ),
        metric="accuracy",
        metric_label="Accuracy",
        goal=Goal(0.8211, 0.01),
        approach="auto",
        chosen="static-minmax",
        met=True,
        trials=[
            Trial("static-minmax", 0.8186, 0.91, True, output_error=0.0123, loss=0.003),
            Trial("static-percentile", None, None, False, output_error=0.456),
        ],
        baseline=Measurement(0.8211, 3.25, 86.7, 86.75, 214.5, 125.5, holdout_accuracy=0.8012),
        quantized=Measurement(0.8186, 0.91, 22.4, 22.45, 81.25, 448.4, holdout_accuracy=0.8006),
        comparisons=[
            Comparison("validation", 408, 0.977, -1 / 408, (-0.0171, 0.0122), True, 330, 5, 4, 1.0),
            Comparison("test", 1725, 0.982, -1 / 1725, (-0.0064, 0.0052), False, 1366, 16, 15, 0.878),
        ],
        layers=Layers(
            static=["encoder.0.q", "encoder.0.k"],
            dynamic=["pooler.dense"],
            embeddings=["embeddings.word"],
            float_layers={"classifier": "the head decides; it is small"},
        ),
        trivial=Trivial(0.6838, "answering the most common label"),
        output_difference=0.0456,
        timed_examples=384,
        batch_size=32,
        seed=42,
        command="hfq quantize Intel/bert-base-uncased-mrpc --dataset nyu-mll/glue --subset mrpc",
        created="2026-01-02T03:04:05+00:00",
        hardware={"cpu": "Xeon", "threads": 2},
        versions={"python": "3.11.2", "torch": "2.13.0"},
        stock_agreement=0.997,
        held_out_stock=StockComparison("test", 480, 0.9938, 0.0512, False),
        warnings=["100 samples were asked for, 96 are distinct."],
        sensitivity={"encoder.0.k": 0.0456, "pooler.dense": 0.0123, "encoder.0.q": 0.00078},
        baseline_pass_s=3.25,
    )
    return replace(report, **changes)


def report_saying(text: str) -> Report:
    """A report in which everything a stranger may choose is `text`."""
    report = make_report()
    return replace(
        report,
        checkpoint=CheckpointInfo(id=text, revision="a" * 40, license=text, language=[text]),
        dataset=DatasetInfo(
            id=text,
            subset=text,
            revision="b" * 40,
            split=text,
            calibration_split=text,
            calibration_samples=1,
            columns={text: [text, text]},
            alignment=text,
            examples=2,
            holdout_split=text + "2",
            holdout_examples=3,
        ),
        chosen=text,
        comparisons=[replace(report.comparisons[0], split=text)],
        layers=Layers([text], [text], [text], {text: text}),
        trials=[replace(report.trials[0], name=text)],
        sensitivity={text: 0.5},
        command=text,
        hardware={text: text},
        versions={text: text},
        warnings=[text],
    )


def make_fit_report() -> Report:
    """A report of a module that was quantized without an evaluation."""
    report = make_report()
    return Report(
        hfq_version=report.hfq_version,
        checkpoint=CheckpointInfo("MLP", "in memory"),
        metric="score",
        metric_label="Score",
        metric_in_points=False,
        approach="static",
        chosen="static, min-max",
        met=None,
        goal=Goal(None, 0.01),
        trials=[],
        baseline=Measurement(None, None, 4.0, 4.5),
        quantized=Measurement(None, None, 1.0, 1.5),
        layers=report.layers,
        calibration_batches=4,
        seed=42,
        created=report.created,
        hardware=report.hardware,
        versions=report.versions,
    )


def make_folder(path: Path, report: Report | None = None, *, weights: bytes = b"\x00\xff" * 4096) -> Path:
    """A folder shaped like an export. Its weights are any bytes: pushing does not look inside."""
    from hfq.report import plots
    from hfq.report.card import render_card

    report = report or make_report()
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_bytes(weights)
    (path / "config.json").write_text('{"model_type": "bert"}\n', encoding="utf-8")
    (path / "hfq.json").write_text(report.to_json(), encoding="utf-8")
    (path / "README.md").write_text(render_card(report, repo_id=None, plots=plots.find(path)), encoding="utf-8")
    return path
