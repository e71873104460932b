"""The model card: metadata first, then text from `model_cards/card.md.jinja`. No network, no torch.

A card states what the report states and nothing else. Much of a report was written by strangers (names,
labels and licences of somebody's checkpoint and dataset), so its strings are shown, never interpreted:
control characters, local paths and tokens go first, then every value the template prints is escaped for
Markdown and HTML unless a filter here has already done so.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from .errors import UsageError
from .redact import redact, redact_command
from .report import CheckpointInfo, Comparison, DatasetInfo, FitReport, Report
from .resources import resource

TEMPLATE = "model_cards/card.md.jinja"
FIT_TEMPLATE = "model_cards/fit.md.jinja"
TAGS = ["int8", "quantized", "compressed-tensors", "hfq", "cpu"]

# `ModelCard.from_template` runs Jinja without sandbox or escaping: it only joins metadata and finished text.
_FRAME = "---\n{{ card_data }}\n---\n\n{{ body }}"
_SIGNIFICANCE = 0.05

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_NAME = re.compile(r"\w[\w .:+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")
_PATH = re.compile(r"""'/[^']*'|"/[^"]*"|(?<![\w:/.~)-])(?:file://)?/[^\s'"`,;]+""")
# What Markdown, HTML, GitHub's extensions, LaTeX on the Hub or Jinja could act on inside a line. `_` only
# where it can open or close emphasis, `:` only where a bare address would become a link.
_SPECIAL = re.compile(r"[\\`*\[\]{}<>&|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|@|(?<=\bwww)\.")
_NOT_PLAIN_CODE = re.compile(r"[`|<>&\[\]{}\\*]")

T = TypeVar("T")
R = TypeVar("R", Report, FitReport)


@dataclass(frozen=True)
class Score:
    """Both accuracies on one split, with the paired comparison where one was made."""

    split: str
    examples: int
    baseline: float
    quantized: float
    seen_in_tuning: bool
    comparison: Comparison | None


def render_card(report: Report, *, repo_id: str | None) -> str:
    """The content of README.md: YAML metadata and Markdown.

    Args:
        repo_id: where the model will be published, for the title and the loading snippets; None for a folder.

    Raises:
        UsageError: `repo_id` cannot be a repository's name.
    """
    if repo_id is not None and not _is_repo_id(repo_id):
        raise UsageError(f"{repo_id!r} is not a repository id; expected 'name' or 'user/name'.")
    report = _public(replace(report, command=redact_command(report.command)))
    name = repo_id.rpartition("/")[2] if repo_id else model_name(report)
    scores = _scores(report)
    body = (
        _environment()
        .from_string(resource(TEMPLATE).read_text(encoding="utf-8"))
        .render(
            report=report,
            name=name,
            load_from=Markup(repo_id or "path/to/this/folder"),  # noqa: S704 (an id, checked above)
            base_on_hub=_is_hub_model(report.checkpoint),
            data_on_hub=_is_hub_dataset(report.dataset),
            metric_label="Accuracy" if report.metric == "accuracy" else f"Accuracy ({report.metric})",
            scores=scores,
            published=scores[-1],
            evaluated=[trial for trial in report.trials if trial.accuracy is not None],
            float_layers=_by_reason(report.layers.float_layers),
        )
    )
    metadata = _metadata(report, name=name, score=scores[-1])
    return str(ModelCard.from_template(metadata, template_str=_FRAME, body=body))


def render_fit_card(report: FitReport) -> str:
    """The content of README.md for a model that was quantized as an object: what `report` says, and how to load it."""
    report = _public(report)
    body = (
        _environment()
        .from_string(resource(FIT_TEMPLATE).read_text(encoding="utf-8"))
        .render(report=report, float_layers=_by_reason(report.layers.float_layers))
    )
    metadata = ModelCardData(tags=TAGS, base_model_relation="quantized")
    return str(ModelCard.from_template(metadata, template_str=_FRAME, body=body))


def model_name(report: Report | FitReport) -> str:
    """What to call the quantized model when nobody says: the base model's own name and `-int8`."""
    base = report.checkpoint.id if isinstance(report, Report) else report.model
    name = re.sub(r"[^A-Za-z0-9._]+|\.{2,}", "-", PurePosixPath(base).name)
    return (name[:90].strip("-.") or "model") + "-int8"


def _scores(report: Report) -> list[Score]:
    """The evaluation split, then the holdout where one was measured. The last one is published.

    Tuning chose the candidate that does well on the evaluation split, so that figure flatters; the holdout's
    does not.
    """
    data, baseline, quantized = report.dataset, report.baseline, report.quantized
    compared = {row.split: row for row in report.comparisons}
    row = compared.get(data.split)
    seen = row.seen_in_tuning if row else True
    scores = [Score(data.split, data.examples, baseline.accuracy, quantized.accuracy, seen, row)]
    before, after = baseline.holdout_accuracy, quantized.holdout_accuracy
    if data.holdout_split and before is not None and after is not None:
        row = compared.get(data.holdout_split)
        seen = row.seen_in_tuning if row else False
        scores.append(Score(data.holdout_split, data.holdout_examples, before, after, seen, row))
    return scores


def _metadata(report: Report, *, name: str, score: Score) -> ModelCardData:
    """What the Hub reads. A value the Hub would reject or misread is left out, the text still has it.

    `base_model` and `datasets` are links to repositories: the name of a local folder there would be refused,
    or worse, point to a stranger's repository of that name. Results on local data have the type `local` for
    the same reason, because a result must have one.
    """
    data, checkpoint = report.dataset, report.checkpoint
    base = checkpoint.id if _is_hub_model(checkpoint) else None
    public_data = _is_hub_dataset(data)
    data_name = data.id if public_data else _plain(PurePosixPath(data.id).name) or "local data"
    subset = _plain(data.subset)
    result = EvalResult(
        task_type=report.task,
        dataset_type=data.id if public_data else "local",
        dataset_name=f"{data_name} {subset}" if subset else data_name,
        dataset_config=subset,
        dataset_split=_plain(score.split),
        dataset_revision=data.revision if public_data else None,
        metric_type=report.metric,
        metric_value=score.quantized,
    )
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        license=_license(checkpoint.license),
        language=[code for code in checkpoint.language if _LANGUAGE.fullmatch(code)] or None,
        library_name="transformers",
        pipeline_tag=report.task,
        datasets=[data.id] if public_data else None,
        metrics=[report.metric],
        tags=TAGS,
        model_name=name,
        eval_results=[result],
    )


def _license(text: str | None) -> str | None:
    """An identifier as the Hub spells them; `other` for anything that cannot be one."""
    if not text:
        return None
    return text.lower() if _LICENSE.fullmatch(text.lower()) else "other"


def _plain(text: str | None) -> str | None:
    """`text` if it is a name such as datasets and splits have, else nothing."""
    return text if text and _NAME.fullmatch(text) else None


def _is_hub_model(checkpoint: CheckpointInfo) -> bool:
    return not checkpoint.revision.startswith("sha256:") and _is_repo_id(checkpoint.id)


def _is_hub_dataset(dataset: DatasetInfo) -> bool:
    return dataset.revision is not None and _is_repo_id(dataset.id)


def _is_repo_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _by_reason(float_layers: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for layer, reason in float_layers.items():
        reasons.setdefault(reason, []).append(layer)
    return reasons


def _verdict(comparison: Comparison) -> str:
    """Whether a difference this large is what chance alone would do, by the interval and by the test."""
    low, high = comparison.interval
    chance = [low <= 0 <= high, comparison.p_value >= _SIGNIFICANCE]
    if all(chance):
        return "within noise"
    if any(chance):
        return "at the edge of noise (the interval and the test disagree)"
    return "outside noise: a real difference"


def _public(report: R) -> R:
    """The report with every string on one line and free of absolute paths and tokens."""
    named: tuple[str, ...] = (report.checkpoint.id, report.dataset.id) if isinstance(report, Report) else ()
    folders: list[str] = [text for text in named if text.startswith("/")]

    def clean(text: str) -> str:
        for folder in folders:  # named first: only we know where a path with spaces ends
            text = text.replace(folder, PurePosixPath(folder).name)
        text = redact(text)
        text = _PATH.sub(_file_name, text)
        return "".join(char if char.isprintable() else " " for char in text).strip()

    return _map_strings(report, clean)


def _file_name(match: re.Match[str]) -> str:
    path = match[0]
    quote = path[0] if path[0] in "'\"" else ""
    return quote + PurePosixPath(path.strip("'\"")).name + quote


def _map_strings(value: T, change: Callable[[str], str]) -> T:
    """`value` with `change` applied to every string in it: a dataclass, dict or list, however deep."""
    result: Any = value
    if isinstance(value, str):
        result = change(value)
    elif isinstance(value, dict):
        result = {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    elif isinstance(value, list):
        result = [_map_strings(item, change) for item in value]
    elif is_dataclass(value) and not isinstance(value, type):
        result = replace(
            value, **{field.name: _map_strings(getattr(value, field.name), change) for field in fields(value)}
        )
    return result


def _environment() -> SandboxedEnvironment:
    """Jinja in which nothing reaches the card unescaped: `finalize` sees every value that is printed."""
    environment = SandboxedEnvironment(
        finalize=_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        code=_code, codes=_codes, block=_block, number=_number, count=_count, points=_points, percent=_percent
    )
    environment.globals.update(verdict=_verdict)
    return environment


def _entity(match: re.Match[str]) -> str:
    return f"&#{ord(match[0])};"


def _text(value: object) -> Markup:
    """Prose: the characters that mean something become entities, which no Markdown reader interprets."""
    return value if isinstance(value, Markup) else Markup(_SPECIAL.sub(_entity, str(value)))  # noqa: S704


def _code(value: object) -> Markup:
    """An identifier in a fixed-width font; entities inside `<code>` where backticks would not hold it."""
    text = str(value)
    if not text or _NOT_PLAIN_CODE.search(text):
        return Markup(f"<code>{_SPECIAL.sub(_entity, text)}</code>")  # noqa: S704
    return Markup(f"`{text}`")  # noqa: S704


def _codes(values: Iterable[object]) -> Markup:
    return Markup(", ").join(_code(value) for value in values)


def _block(value: str, language: str) -> Markup:
    """A fenced block, with a fence longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{value}\n{fence}")  # noqa: S704


def _number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits, and never an exponent for large numbers."""
    if value is None:
        return "not measured"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def _count(value: int, noun: str) -> str:
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"
