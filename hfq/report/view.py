"""What a report says, in words and figures: what the model card and the HTML report share.

Much of a report was written by strangers. `public` makes its strings fit to be shown; escaping is left to each format.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..common.redact import redact, redact_command
from ..data.examples import DatasetInfo
from ..measure.figures import Comparison, StockComparison
from ..source.checkpoint import CheckpointInfo
from .report import Layers, Report

_SIGNIFICANCE = 0.05
_PATH = re.compile(r"""'/[^']*'|"/[^"]*"|(?<![\w:/.~)-])(?:file://)?/[^\s'"`,;]+""")

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """Both accuracies on one split, with the paired comparison where one was made."""

    split: str
    examples: int
    baseline: float
    quantized: float
    seen_in_tuning: bool
    comparison: Comparison | None


@dataclass(frozen=True)
class Row:
    """A line of the table of results. `ratio`: INT8 to FP32, where that says something."""

    label: str
    baseline: float
    quantized: float
    ratio: float | None = None


def results(report: Report) -> list[Row]:
    """The table of results, as card, page, terminal and job summary have it: what was measured, scores first."""
    before, after = report.baseline, report.quantized
    label = metric_label(report)
    if report.of_object:
        scores = [(label, before.accuracy, after.accuracy)]
    else:
        first, *held_out = measured_scores(report)
        scores = [
            (f"{label} ({first.split})", first.baseline, first.quantized),
            *((f"{label} ({score.split}, held out)", score.baseline, score.quantized) for score in held_out),
        ]
    costs = [
        ("Duration (s)", before.duration_s, after.duration_s),
        ("Memory (MiB)", before.memory_mib, after.memory_mib),
        ("Size on disk (MiB)", before.size_mib, after.size_mib),
        ("Peak memory (MiB)", before.peak_memory_mib, after.peak_memory_mib),
        ("Throughput (examples/s)", before.examples_per_s, after.examples_per_s),
    ]
    return [
        *(Row(name, a, b) for name, a, b in scores if a is not None and b is not None),
        *(Row(name, a, b, b / a if a else None) for name, a, b in costs if a is not None and b is not None),
    ]


def measured_scores(report: Report) -> list[Score]:
    """The evaluation split, then the holdout where one was measured. The last one is published.

    Tuning chose the candidate that does well on the evaluation split, so that figure flatters; the holdout's
    does not.
    """
    data, baseline, quantized = report.data, report.baseline, report.quantized
    compared = {row.split: row for row in report.comparisons}
    row = compared.get(data.split)
    seen = row.seen_in_tuning if row else True
    assert baseline.accuracy is not None and quantized.accuracy is not None  # of a checkpoint
    scores = [Score(data.split, data.examples, baseline.accuracy, quantized.accuracy, seen, row)]
    before, after = baseline.holdout_accuracy, quantized.holdout_accuracy
    if data.holdout_split and before is not None and after is not None:
        row = compared.get(data.holdout_split)
        seen = row.seen_in_tuning if row else False
        scores.append(Score(data.holdout_split, data.holdout_examples, before, after, seen, row))
    return scores


def stock_comparison(report: Report) -> StockComparison | None:
    """Int8 kernels beside stock transformers: on the holdout, else, which flatters, on the split that tuning chose by."""
    agreement, difference = report.stock_agreement, report.output_difference
    if report.held_out_stock is not None or agreement is None or difference is None:
        return report.held_out_stock
    examples = report.compared_examples or report.timed_examples
    return StockComparison(report.data.split, examples, agreement, difference, seen_in_tuning=True)


def is_source_halved(report: Report) -> bool:
    """Whether the source's file holds its weights in 16 bits, so that its size is not that of FP32."""
    return report.float32_mib is not None and report.baseline.size_mib < 0.75 * report.float32_mib


def model_name(report: Report) -> str:
    """What to call the quantized model when nobody says: the base model's own name and `-int8`."""
    name = re.sub(r"[^A-Za-z0-9._]+|\.{2,}", "-", PurePosixPath(report.checkpoint.id).name)
    return (name[:90].strip("-.") or "model") + "-int8"


def is_hub_model(checkpoint: CheckpointInfo) -> bool:
    """Whether it came from the Hub, so that its name may be a link."""
    return not checkpoint.revision.startswith("sha256:") and is_repo_id(checkpoint.id)


def is_hub_dataset(dataset: DatasetInfo) -> bool:
    """Whether it came from the Hub, so that its name may be a link."""
    return dataset.revision is not None and is_repo_id(dataset.id)


def is_repo_id(text: str) -> bool:
    """Whether a repository could be called that."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def by_reason(float_layers: dict[str, str]) -> dict[str, list[str]]:
    """Layers that stay float, under the reason that they share."""
    reasons: dict[str, list[str]] = {}
    for layer, reason in float_layers.items():
        reasons.setdefault(reason, []).append(layer)
    return reasons


def metric_label(report: Report) -> str:
    """What the metric is called in tables and on axes."""
    return report.metric_label


def bound(report: Report) -> str:
    """Which way the goal bounds the metric."""
    return "at least" if report.goal.higher_is_better else "at most"


def difference(value: float, report: Report) -> str:
    """A difference of scores with its sign: in percentage points, where the metric is a fraction."""
    return f"{points(value)} points" if report.metric_in_points else f"{value:+.3g}"


def verdict(comparison: Comparison) -> str:
    """Whether a difference this large is what chance alone would do, by the interval and by the test."""
    low, high = comparison.interval
    chance = [low <= 0 <= high]
    if comparison.p_value is not None:
        chance.append(comparison.p_value >= _SIGNIFICANCE)
    if all(chance):
        return "within noise"
    if any(chance):
        return "at the edge of noise (the interval and the test disagree)"
    return "outside noise: a real difference"


def public(report: Report) -> Report:
    """The report with every string on one line and free of absolute paths and tokens."""
    named = (report.checkpoint.id, report.dataset.id if report.dataset else "")
    folders = [text for text in named if text.startswith("/")]

    def without_folders(text: str) -> str:
        for folder in folders:  # named first: only we know where a path with spaces ends
            text = text.replace(folder, PurePosixPath(folder).name)
        return clean(_PATH.sub(_file_name, redact(text)))

    shown = map_strings(report, without_folders)
    return replace(shown, command=redact_command(shown.command), usage=report.usage)


def clean(text: str) -> str:
    """`text` on one line, without tokens."""
    return "".join(char if char.isprintable() else " " for char in redact(text)).strip()


def _file_name(match: re.Match[str]) -> str:
    path = match[0]
    quote = path[0] if path[0] in "'\"" else ""
    return quote + PurePosixPath(path.strip("'\"")).name + quote


def map_strings(value: T, change: Callable[[str], str]) -> T:
    """`value` with `change` applied to every string in it: a dataclass, dict or list, however deep."""
    result: Any = value
    if isinstance(value, str):
        result = change(value)
    elif isinstance(value, dict):
        result = {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    elif isinstance(value, list):
        result = [map_strings(item, change) for item in value]
    elif is_dataclass(value) and not isinstance(value, type):
        result = replace(
            value, **{field.name: map_strings(getattr(value, field.name), change) for field in fields(value)}
        )
    return result


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits, and never an exponent for large numbers."""
    if value is None:
        return "not measured"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def count(value: int, noun: str) -> str:
    """A number of things, with the plural where there is not one."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def int8_layers(layers: Layers) -> str:
    """How many there are of each kind: `36 static, 1 dynamic, 3 embeddings`."""
    found = {"static": layers.static, "dynamic": layers.dynamic, "weight-only": layers.weight_only}
    kinds = [f"{len(names):,} {kind}" for kind, names in found.items() if names]
    return ", ".join([*kinds, *([count(len(layers.embeddings), "embedding")] if layers.embeddings else [])])


def points(value: float) -> str:
    """A difference of fractions, in percentage points and with its sign."""
    return f"{100 * value:+.2f}"


def sure(probability: float) -> str:
    """How sure, in words that never say that it is certain."""
    if probability > 0.999:
        return "more than 99.9 %"
    return "less than 0.1 %" if probability < 0.001 else percent(probability)


def percent(value: float, digits: int = 4) -> str:
    """A fraction as percent, to so many significant digits, and never with an exponent for large ones."""
    return f"{100 * value:.{digits}g} %" if abs(100 * value) < 10**digits - 0.5 else f"{100 * value:,.0f} %"


FORMATS = {"number": number, "count": count, "points": points, "percent": percent, "sure": sure}  # for templates
