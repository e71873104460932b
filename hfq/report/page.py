"""The HTML report: what the card says, for people who look rather than read. One file that asks for nothing else.

The page is `model_cards/report.html.jinja`; here are the places of what it draws. Every value is escaped, no script
may run, and nothing is loaded, by the page's own Content-Security-Policy.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from ..common.errors import SourceError
from ..common.resources import resource
from ..source.metadata import texts
from .explained import sections, style
from .plots import bars, dots, limits, ticks
from .report import Report
from .view import (
    FORMATS,
    Score,
    bound,
    by_reason,
    difference,
    is_hub_dataset,
    is_hub_model,
    measured_scores,
    metric_label,
    model_name,
    number,
    public,
    results,
    stock_comparison,
    verdict,
)

TEMPLATE = "model_cards/report.html.jinja"
_NARROWEST = 0.005  # an interval's axis ends no nearer to zero: half a point is not made to look like much


@dataclass(frozen=True)
class Mark:
    """Where to draw something, in percent of the width from the left and of the height from the top."""

    x: float
    y: float
    value: Any


def render_page(report: Report) -> str:
    """The report as HTML, whole: style and drawings are in it.

    Raises:
        SourceError: it holds something else where figures and names are expected.
    """
    try:
        return _render(public(report))
    except (TypeError, ValueError, ArithmeticError, AttributeError, TemplateError) as error:
        raise SourceError(
            f"The report holds what hfq does not write ({error}). Quantize again, or take hfq.json from where it was made."
        ) from error


def _render(report: Report) -> str:
    environment = SandboxedEnvironment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(FORMATS)
    environment.globals.update(verdict=verdict)
    environment.filters["difference"] = partial(difference, report=report)
    scores = measured_scores(report)
    found = bars(report)
    return environment.from_string(resource(TEMPLATE).read_text(encoding="utf-8")).render(
        report=report,
        style=style(),
        explanation=sections(report.explanation, texts=False) if report.explanation else "",
        licences=texts(report.checkpoint.license),
        name=model_name(report),
        metric_label=metric_label(report),
        threshold=report.goal.threshold,
        bound=bound(report),
        scores=scores,
        published=scores[-1],
        stock=stock_comparison(report),
        rows=results(report),
        intervals=[_interval(report, score) for score in scores if score.comparison],
        scatter=_scatter(report) if dots(report) else None,
        evaluated=[trial for trial in report.trials if trial.accuracy is not None],
        bars=[Mark(100 * bar.error / max(found[0].error, 1e-30), 0, bar) for bar in found],
        runs=_runs(report),
        float_layers=by_reason(report.layers.float_layers),
        base_on_hub=is_hub_model(report.checkpoint),
        data_on_hub=is_hub_dataset(report.data),
    )


def _interval(report: Report, score: Score) -> dict[str, Any]:
    """The paired interval of one split on an axis with zero in the middle, in the metric's own unit."""
    comparison = score.comparison
    assert comparison is not None  # asked for where there is one
    low, high = comparison.interval
    found = comparison.difference
    is_goal = score.split == report.data.split
    allowed = report.goal.threshold - score.baseline if is_goal else 0.0
    narrowest = _NARROWEST if report.metric_in_points else _NARROWEST * abs(score.baseline)
    end = 1.2 * max(abs(low), abs(high), abs(found), abs(allowed), narrowest, 1e-12)

    def place(value: float) -> float:
        return 50 + 50 * value / end

    return {
        "score": score,
        "low": place(low),
        "high": place(high),
        "difference": Mark(place(found), 0, found),
        "allowed": Mark(place(allowed), 0, allowed) if is_goal else None,
        "ticks": [Mark(place(tick), 0, tick) for tick in ticks(-end, end)],
    }


def _scatter(report: Report) -> dict[str, Any]:
    low, high, fastest = limits(report)

    def across(speed: float) -> float:
        return 100 * speed / fastest

    def down(score: float) -> float:
        return 100 * (high - score) / (high - low)

    return {
        "dots": [Mark(across(dot.speed), down(dot.score), dot) for dot in dots(report)],
        "goal": down(report.goal.threshold),
        "baseline": down(report.goal.baseline or 0.0),
        "speeds": [Mark(across(tick), 0, tick) for tick in ticks(0, fastest)],
        "scores": [Mark(0, down(tick), text) for tick, text in _labelled(ticks(low, high))],
    }


def _labelled(values: list[float]) -> list[tuple[float, str]]:
    """With as many decimals as the one that needs most."""
    decimals = max((len(number(value, 6).partition(".")[2]) for value in values), default=0)
    return [(value, f"{value:.{decimals}f}") for value in values]


def _runs(report: Report) -> list[tuple[str, str, list[str]]]:
    """Layers by how they run: a class name for their colour, words, names."""
    layers = report.layers
    groups = [
        ("static", "static: one scale for all inputs, from calibration", layers.static),
        ("dynamic", "dynamic: a scale for each token", layers.dynamic),
        ("weight-only", "weight-only: INT8 weights, float inputs", layers.weight_only),
        ("embedding", "embeddings: INT8 rows", layers.embeddings),
        ("float", "float", list(layers.float_layers)),
    ]
    return [group for group in groups if group[2]]
