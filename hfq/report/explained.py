"""An explanation as a person reads it: in the terminal, as one HTML page, as a plot, and as sections of the report."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..common.errors import UsageError
from ..common.files import write_bytes, write_text
from ..common.redact import printable, redact
from ..common.resources import resource
from ..common.version import __version__
from ..explain.explanation import OUTLIER, Explanation, LayerCause
from .plots import MOST_LAYERS, new_figure, png, short
from .view import FORMATS, clean, count, map_strings, number, percent

_SHOWN = 12  # layers in the terminal
_ADVISED, _OTHER = "#b35900", "#7fb2dc"  # as `d-missed` and `d-met` in page.css


def write(found: Explanation, folder: Path) -> list[Path]:
    """Write explain.html, explain.png and explain.json.

    Raises:
        UsageError: the folder cannot be written.
    """
    paths = [folder / f"explain.{kind}" for kind in ("html", "png", "json")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(paths[0], render_page(found))
        write_bytes(paths[1], draw(found))
        write_text(paths[2], to_json(found))
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}. Choose another --output.") from error
    return paths


def to_json(found: Explanation) -> str:
    """Everything in it, for programs."""
    return redact(json.dumps(asdict(found), indent=2, ensure_ascii=False)) + "\n"


def render_page(found: Explanation) -> str:
    """The explanation as HTML, whole: style and drawings are in it."""
    shown = map_strings(found, clean)
    page = _environment().from_string(resource("model_cards/explain.html.jinja").read_text(encoding="utf-8"))
    return page.render(
        found=shown, summary=summary(shown), sections=sections(shown), style=style(), version=__version__
    )


def sections(found: Explanation, *, texts: bool = True) -> Markup:
    """What to do, the layers, and the examples that flip; `texts`: with what these say."""
    template = _environment().from_string(resource("model_cards/explanation.html.jinja").read_text(encoding="utf-8"))
    shown = found.layers[:MOST_LAYERS]
    largest = max((cause.effect for cause in shown), default=0.0) or 1.0
    layers = {"layers": found.advice.layers} if found.advice else {}
    html = template.render(
        found=found,
        advice=advice(found),
        recipe=yaml.safe_dump(layers, sort_keys=False).strip(),
        bars=[{"x": 100 * cause.effect / largest, "value": cause} for cause in shown],
        texts=texts and any(flip.text for flip in found.flips),
        outlier=OUTLIER,
    )
    return Markup(html)  # noqa: S704 (every value in it was escaped)


def style() -> Markup:
    """What pages look like."""
    return Markup(resource("model_cards/page.css").read_text(encoding="utf-8"))  # noqa: S704 (a file of ours)


def summary(found: Explanation) -> list[str]:
    """What is lost, and where, in sentences."""
    bound = "at least" if found.higher_is_better else "at most"
    said = [
        f"{found.metric_label} on {found.split}: INT8 {number(found.score)}, FP32 {number(found.baseline)}. "
        f"The goal is {bound} {number(found.threshold)}."
    ]
    total = sum(cause.effect for cause in found.layers)
    mend = [cause for cause in found.layers if cause.advice]
    if total and mend:
        share = sum(cause.effect for cause in mend) / total
        said.append(
            f"{count(len(mend), 'layer')} of {len(found.layers)} {'makes' if len(mend) == 1 else 'make'} "
            f"{percent(share, 2)} of the error that reaches the output."
        )
    if found.flipped is not None:
        said.append(f"{count(found.flipped, 'answer')} of {found.examples:,} flip.")
    return said


def advice(found: Explanation) -> str:
    """What becomes of the score and the error when the advice is taken."""
    if found.advice is None:
        return ""
    ways = "; ".join(f"{how}: {', '.join(names)}" for how, names in found.advice.layers.items())
    met = "meets the goal" if found.advice.met else "misses the goal"
    return (
        f"{ways}. So the plain model gets {found.metric_label} {number(found.advice.score)}, which {met}, and an output "
        f"error of {percent(found.advice.error, 2)} instead of {percent(found.error, 2)}. The search goes on from there."
    )


def show(found: Explanation) -> None:
    """Print the summary, the layers with the largest effects, and what to do."""
    console = Console(width=max(Console().width, 140))  # layer names are long, and cut they say nothing
    shown = map_strings(found, clean)
    for sentence in summary(shown):
        console.print(sentence, markup=False)
    table = Table(
        "Layer", "Reaches output", "Own error", "Input range", "Outlier channels", "Clipped", "Left with", box=None
    )
    for cause in shown.layers[:_SHOWN]:
        table.add_row(escape(printable(cause.layer)), *_cells(cause))
    console.print(table)
    for flip in shown.flips[:_SHOWN] if shown.flipped is not None else ():
        how = "flips it alone" if flip.alone else "takes most of its margin"
        console.print(f"row {flip.row}, margin {number(flip.margin, 3)}: {flip.layer} {how}", markup=False)
    if shown.advice:
        console.print(f"What to do: {advice(shown)}", markup=False)
        console.print(f"  {shown.advice.command}", markup=False, soft_wrap=True)


def draw(found: Explanation) -> bytes:
    """A bar for each layer's effect, as PNG; what is advised beside it."""
    shown = map_strings(found, clean).layers[:MOST_LAYERS]
    figure, axes = new_figure(height=1.0 + 0.23 * len(shown))
    places = range(len(shown))
    effects = [100 * cause.effect for cause in shown]
    axes.barh(places, effects, color=[_ADVISED if cause.advice else _OTHER for cause in shown], height=0.72, zorder=2)
    for place, cause in zip(places, shown, strict=True):
        at = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        text = percent(cause.effect, 2) + (f" → {cause.advice}" if cause.advice else "")
        axes.annotate(text, (100 * cause.effect, place), fontsize=8, **at)
    axes.set_yticks(places, [short(cause.layer) for cause in shown], fontsize=8, family="monospace", parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1.45 * max([*effects, 1e-9]))
    axes.set_xlabel("squared error of the output with this layer alone in INT8, %")
    axes.grid(axis="y", visible=False)
    return png(figure)


def without_texts(found: Explanation) -> Explanation:
    """What may be published: without what examples say."""
    return replace(found, flips=[replace(flip, text="") for flip in found.flips])


def _cells(cause: LayerCause) -> list[str]:
    seen = cause.activations
    ranges = f"{number(seen.low, 3)} … {number(seen.high, 3)}" if seen else ""
    channels = ", ".join(map(str, seen.outlier_channels[:3])) if seen else ""
    factor = f" ({number(seen.outlier_factor, 2)}×)" if seen and channels else ""
    best = next((remedy for remedy in cause.remedies if remedy.how == cause.advice), None)
    left = f"{best.how} {percent(best.error, 2)}" if best else ""
    clipped = percent(seen.clipped, 2) if seen else ""
    return [percent(cause.effect, 2), percent(cause.error, 2), ranges, channels + factor, clipped, left]


def _environment() -> SandboxedEnvironment:
    environment = SandboxedEnvironment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(FORMATS)
    return environment
