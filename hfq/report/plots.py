"""The plots of a run: accuracy against speed over its trials, and the output error of each layer alone.

As PNG they go beside the card, and with it to the Hub; `hfq.report.page` draws the same points for itself. matplotlib is
imported when a plot is drawn.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..common.files import write_bytes
from ..common.names import PLOTS
from .report import Report
from .view import bound, count, metric_label, number, percent, public

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LAYERS = 20  # more bars than that nobody reads
LONGEST_NAME = 56
Kind = Literal["float", "chosen", "met", "missed"]

_DOTS: dict[str, tuple[str, str]] = {  # by kind: marker and colour, the same in `model_cards/report.html.jinja`
    "float": ("s", "#57606a"),
    "chosen": ("o", "#0a6ebd"),
    "met": ("o", "#7fb2dc"),
    "missed": ("X", "#b35900"),
}
_RUNS = {"static": "#0a6ebd", "dynamic": "#6f42c1", "weight-only": "#1a7f5a", "float": "#8c959f"}
_GOAL = "#b3261e"


@dataclass(frozen=True)
class Dot:
    """One model on the evaluation split: its score, and examples a second in one pass over it."""

    name: str
    speed: float
    score: float
    kind: Kind


@dataclass(frozen=True)
class Bar:
    """A layer, its output error, and how it runs in the chosen model; "float" is the error that was avoided."""

    layer: str
    error: float
    runs: str


def write(report: Report, folder: Path, *, under: str = PLOTS) -> dict[str, str]:
    """Draw what the report has figures for. Returns paths relative to `folder`, by the plot's name.

    Raises:
        OSError: the folder cannot be written.
    """
    drawn = {name: draw(report) for name, draw in _PLOTS.items() if _has(name, report)}
    for name, content in drawn.items():
        (folder / under).mkdir(exist_ok=True)
        write_bytes(folder / _path(name, under), content)
    return {name: _path(name, under) for name in drawn}


def find(folder: Path, *, under: str = PLOTS) -> dict[str, str]:
    """The plots that are in `folder`, as `write` returned them."""
    return {name: _path(name, under) for name in _PLOTS if (folder / _path(name, under)).is_file()}


def alt_text(name: str, report: Report) -> str:
    """What a plot shows, for those who do not see it."""
    if name == "accuracy_speed":
        said = [f"{_called(dot)} {number(dot.score)} at {number(dot.speed)} examples/s" for dot in dots(report)]
        goal = f"the goal is {bound(report)} {number(report.goal.threshold)}"
        return f"{metric_label(report)} on {report.data.split} against speed: {'; '.join([*said, goal])}."
    found = bars(report)
    said = [f"{bar.layer} {percent(bar.error, 2)}" for bar in found[:3]]
    rest = f"; the least of the {len(found)} shown {percent(found[-1].error, 2)}" if len(found) > 3 else ""
    return f"Output error of each INT8 layer alone, the largest first: {'; '.join(said)}{rest}."


def dots(report: Report) -> list[Dot]:
    """The float model, where it was timed as the trials were, and every trial that was evaluated; the chosen one last."""
    examples = report.data.examples
    found = []
    if report.baseline_pass_s:
        found.append(Dot("FP32", examples / report.baseline_pass_s, report.goal.baseline or 0.0, "float"))
    for trial in report.trials:
        if trial.accuracy is not None and trial.duration_s:
            kind: Kind = "chosen" if trial.name == report.chosen else "met" if trial.accepted else "missed"
            found.append(Dot(trial.name, examples / trial.duration_s, trial.accuracy, kind))
    return sorted(found, key=lambda dot: dot.kind == "chosen")


def bars(report: Report) -> list[Bar]:
    """The layers of the largest output error, at most `MOST_LAYERS`."""
    layers = report.layers
    named = {"static": layers.static, "dynamic": layers.dynamic, "weight-only": layers.weight_only}
    runs = {layer: how for how, names in named.items() for layer in names}
    ordered = sorted(report.sensitivity.items(), key=lambda item: item[1], reverse=True)[:MOST_LAYERS]
    return [Bar(layer, error, runs.get(layer, "float")) for layer, error in ordered]


def limits(report: Report) -> tuple[float, float, float]:
    """Of the axes, lowest and highest score and highest speed (the lowest is 0). A few examples fill no axis."""
    found = dots(report)
    scores = [report.goal.baseline or 0.0, report.goal.threshold, *(dot.score for dot in found)]
    low, high = min(scores), max(scores)
    margin = max(0.15 * (high - low), 3 / max(1, report.data.examples))
    return low - margin, high + margin, 1.15 * max(dot.speed for dot in found)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two limits."""
    quiet_matplotlib()
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in found if low <= tick <= high]


def _draw_accuracy_speed(report: Report) -> bytes:
    report = public(report)
    figure, axes = new_figure(height=4.0)
    low, high, fastest = limits(report)
    for dot in dots(report):
        marker, colour = _DOTS[dot.kind]
        size = 110 if dot.kind == "chosen" else 65
        look = {"marker": marker, "edgecolors": "white", "zorder": 3, "label": _legend(dot)}
        axes.scatter([dot.speed], [dot.score], size, colour, **look)
        if dot.kind in ("float", "chosen"):  # one below and one above: they may be equally good and fast
            above = dot.kind == "chosen"
            at = {"xytext": (0, 9 if above else -9), "textcoords": "offset points", "va": "bottom" if above else "top"}
            text = f"{'chosen' if above else 'FP32'} {number(dot.score)}"
            axes.annotate(text, (dot.speed, dot.score), color=colour, fontsize=10, ha="center", **at)
    goal = report.goal.threshold
    axes.axhline(report.goal.baseline or 0.0, color=_DOTS["float"][1], linewidth=1, linestyle=":", zorder=1)
    axes.axhline(
        goal, color=_GOAL, linewidth=1.4, linestyle="--", label=f"goal: {bound(report)} {number(goal)}", zorder=2
    )
    axes.set_xlim(0, fastest)
    axes.set_ylim(low, high)
    data = report.data
    axes.set_xlabel(
        f"examples per second, one pass over {short(data.split)} ({count(data.examples, 'example')}) each, in tuning",
        parse_math=False,
    )
    axes.set_ylabel(f"{metric_label(report)} on {short(data.split)}", parse_math=False)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    legend = figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    return png(figure)


def _draw_layer_sensitivity(report: Report) -> bytes:
    report = public(report)
    found = bars(report)
    figure, axes = new_figure(height=1.0 + 0.23 * len(found))
    places = range(len(found))
    errors = [100 * bar.error for bar in found]
    axes.barh(places, errors, color=[_RUNS[bar.runs] for bar in found], height=0.72, zorder=2)
    for place, bar in zip(places, found, strict=True):
        at = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(percent(bar.error, 2), (100 * bar.error, place), fontsize=8, **at)
    axes.set_yticks(places, [short(bar.layer) for bar in found], fontsize=8, family="monospace", parse_math=False)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, 1.22 * max([*errors, 1e-9]))
    axes.set_xlabel("squared output error, % of the float output")
    for runs in dict.fromkeys(bar.runs for bar in found):
        axes.bar(0, 0, color=_RUNS[runs], label="kept in float (error avoided)" if runs == "float" else runs)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    axes.grid(axis="y", visible=False)
    return png(figure)


_PLOTS: dict[str, Callable[[Report], bytes]] = {
    "accuracy_speed": _draw_accuracy_speed,
    "layer_sensitivity": _draw_layer_sensitivity,
}


def _has(name: str, report: Report) -> bool:
    return bool(dots(report) if name == "accuracy_speed" else report.sensitivity)


def _path(name: str, under: str) -> str:
    return f"{under}/{name}.png"


def _called(dot: Dot) -> str:
    return {"chosen": f"{dot.name} (chosen)", "missed": f"{dot.name} (misses the goal)"}.get(dot.kind, dot.name)


def _legend(dot: Dot) -> str:
    said = {
        "float": "FP32",
        "chosen": f"chosen: {short(dot.name)}",
        "met": "meets the goal",
        "missed": "misses the goal",
    }
    return said[dot.kind]


def short(name: str) -> str:
    """`name` with its middle left out where it is too long for an axis: the ends tell layers apart."""
    half = LONGEST_NAME // 2 - 1
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def new_figure(*, height: float) -> "tuple[Figure, Any]":
    """An empty one, and its axes."""
    quiet_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, zorder=0)
    axes.set_axisbelow(True)
    return figure, axes


def quiet_matplotlib() -> None:
    """It announces that it builds a font cache; standard error is for what a run says."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def png(figure: "Figure") -> bytes:
    """The same bytes for the same figures: no date, no version."""
    from PIL import Image

    drawn, content = BytesIO(), BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font has not: it draws a box
        figure.savefig(drawn, format="png", dpi=144, metadata={"Software": None})
    few = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)  # a third of the size, looks the same
    few.save(content, format="png", optimize=True)
    return content.getvalue()
