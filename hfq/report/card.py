"""The model card: metadata first, then text from `model_cards/card.md.jinja`. No network, no torch.

A card states what the report states and nothing else. Much of a report was written by strangers (names,
labels and licences of somebody's checkpoint and dataset), so its strings are shown, never interpreted:
control characters, local paths and tokens go first, then every value the template prints is escaped for
Markdown and HTML unless a filter here has already done so.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from ..common.errors import UsageError
from ..common.installation import installation
from ..common.redact import redact
from ..common.resources import resource
from ..source.checkpoint import CheckpointInfo
from ..source.contents import relative_link
from ..source.metadata import in_words, texts
from .plots import alt_text
from .report import Report
from .view import (
    FORMATS,
    Score,
    by_reason,
    difference,
    int8_layers,
    is_hub_dataset,
    is_hub_model,
    is_repo_id,
    is_source_halved,
    map_strings,
    measured_scores,
    metric_label,
    model_name,
    public,
    results,
    stock_comparison,
    verdict,
)

TEMPLATE = "model_cards/card.md.jinja"
FIT_TEMPLATE = "model_cards/fit.md.jinja"
HUB_METRICS = {  # what the Hub calls metrics whose names here say more, or say it in words
    "spearman": "spearmanr",
    "pearson": "pearsonr",
    "mean_squared_error": "mse",
    "micro_f1": "f1",
    "macro_f1": "f1",
    "pseudo_perplexity": "perplexity",
}
TAGS = ["int8", "quantized", "compressed-tensors", "hfq", "cpu"]

# `ModelCard.from_template` runs Jinja without sandbox or escaping: it only joins metadata and finished text.
_FRAME = "---\n{{ card_data }}\n---\n\n{{ body }}"

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LICENSE_NAME = re.compile(r"\w[\w .:+()/-]{0,99}")
_URL = re.compile(r"https?://[^\s<>()\\]+")
_NAME = re.compile(r"\w[\w .:+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")
_BCP_47 = re.compile(r"([a-z]{2,3})((-[a-z0-9]{2,8})+)", re.IGNORECASE)
# What Markdown, HTML, GitHub's extensions, LaTeX on the Hub or Jinja could act on inside a line. `_` only
# where it can open or close emphasis, `:` only where a bare address would become a link.
_SPECIAL = re.compile(r"[\\`*\[\]{}<>&|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|@|(?<=\bwww)\.")
_NOT_PLAIN_CODE = re.compile(r"[`|<>&\[\]{}\\*]")


def render_card(report: Report, *, repo_id: str | None, plots: Mapping[str, str] | None = None) -> str:
    """The content of README.md: YAML metadata and Markdown.

    Args:
        repo_id: where the model will be published, for the title and the loading snippets; None for a folder.
        plots: those there are, by name, as paths relative to the card: what `hfq.report.plots.write` returns. Others are
            not shown.

    Raises:
        UsageError: `repo_id` cannot be a repository's name.
    """
    if repo_id is not None and not is_repo_id(repo_id):
        raise UsageError(f"{repo_id!r} is not a repository id; expected 'name' or 'user/name'.")
    terms = _terms(report.checkpoint)  # as they are written: they may have more than one line
    report = public(report)
    name = repo_id.rpartition("/")[2] if repo_id else model_name(report)
    scores = measured_scores(report)
    body = (
        _environment()
        .from_string(resource(TEMPLATE).read_text(encoding="utf-8"))
        .render(
            report=report,
            name=name,
            usage=_usage(report, repo_id or "path/to/this/folder"),
            results=results(report),
            halved=is_source_halved(report),
            base_on_hub=is_hub_model(report.checkpoint),
            data_on_hub=is_hub_dataset(report.data),
            metric_label=metric_label(report),
            scores=scores,
            published=scores[-1],
            stock=stock_comparison(report),
            evaluated=[trial for trial in report.trials if trial.accuracy is not None],
            int8_layers=int8_layers(report.layers),
            float_layers=by_reason(report.layers.float_layers),
            plots={name: _image(alt_text(name, report), path) for name, path in (plots or {}).items()},
            licences=[*texts(report.checkpoint.license), *in_words(report.checkpoint.terms.get("license_name"))],
            license_links=in_words(report.checkpoint.terms.get("license_link")),
            other_languages=[text for text in report.checkpoint.language if not any(_languages([text]))],
            installation=_own(installation()),
        )
    )
    metadata = _metadata(report, name=name, score=scores[-1], terms=terms)
    return str(ModelCard.from_template(metadata, template_str=_FRAME, body=body))


def render_fit_card(report: Report) -> str:
    """The content of README.md for a model that was quantized as an object: what `report` says, and how to load it."""
    report = public(report)
    body = (
        _environment()
        .from_string(resource(FIT_TEMPLATE).read_text(encoding="utf-8"))
        .render(
            report=report,
            results=results(report),
            int8_layers=int8_layers(report.layers),
            float_layers=by_reason(report.layers.float_layers),
            installation=_own(installation()),
        )
    )
    metadata = ModelCardData(tags=TAGS, base_model_relation="quantized")
    return str(ModelCard.from_template(metadata, template_str=_FRAME, body=body))


def _metadata(report: Report, *, name: str, score: Score, terms: Mapping[str, Any]) -> ModelCardData:
    """What the Hub reads. A value the Hub would reject or misread is left out, the text still has it.

    `terms`: what the base model's own metadata say of who may do what, which binds this one too.

    `base_model` and `datasets` are links to repositories: the name of a local folder there would be refused,
    or worse, point to a stranger's repository of that name. Results on local data have the type `local` for
    the same reason, because a result must have one.
    """
    data, checkpoint = report.data, report.checkpoint
    metric = HUB_METRICS.get(report.metric, report.metric)
    base = checkpoint.id if is_hub_model(checkpoint) else None
    public_data = is_hub_dataset(data)
    data_name = data.id if public_data else _plain(PurePosixPath(data.id).name) or "local data"
    subset = _plain(data.subset)
    result = EvalResult(
        task_type=report.pipeline_tag or "",
        dataset_type=data.id if public_data else "local",
        dataset_name=f"{data_name} {subset}" if subset else data_name,
        dataset_config=subset,
        dataset_split=_plain(score.split),
        dataset_revision=data.revision if public_data else None,
        metric_type=metric,
        metric_name=_metric_name(report, score, metric),
        metric_value=score.quantized,
    )
    codes, regional = _languages(checkpoint.language)
    own: dict[str, Any] = {
        "library_name": report.library,
        "license": _license(checkpoint.license),
        "language_bcp47": regional or None,
    }
    library = [] if report.library == "transformers" else [report.library]  # which finds its models by that tag
    return ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        language=codes or None,
        pipeline_tag=report.pipeline_tag,
        datasets=[data.id] if public_data else None,
        metrics=[metric],
        model_name=name,
        eval_results=[result],
        **{**own, **terms, "tags": [*library, *TAGS, *texts(terms.get("tags"))]},
    )


def _metric_name(report: Report, score: Score, metric: str) -> str | None:
    """What has to be said of a result beyond the type of its metric, which the Hub calls `metric`."""
    label = metric_label(report)
    if score.seen_in_tuning:
        return f"{label} on the split that tuning chose by"
    return None if label.lower().replace(" ", "_") == metric else label


def _terms(checkpoint: CheckpointInfo) -> dict[str, Any]:
    """The terms as the card's metadata have them, without what the Hub could not show, and without tokens."""
    found: dict[str, Any] = map_strings(dict(checkpoint.terms), redact)
    name, link = found.pop("license_name", None), found.pop("license_link", None)
    if name is not None and _LICENSE_NAME.fullmatch(str(name)):
        found["license_name"] = str(name)
    if isinstance(link, str) and (_URL.fullmatch(link) or relative_link(link)):
        found["license_link"] = link
    return found


def _license(value: str | list[str] | None) -> str | list[str] | None:
    """Identifiers as the Hub spells them; `other` for anything that cannot be one. A list stays one."""
    if isinstance(value, list):
        return list(dict.fromkeys(str(_license(text)) for text in value if text)) or None
    if not value:
        return None
    return value.lower() if _LICENSE.fullmatch(value.lower()) else "other"


def _languages(stated: Iterable[str]) -> tuple[list[str], list[str]]:
    """Codes that the Hub takes as `language`, and as `language_bcp47` those with a region or script: zh, and zh-CN."""
    codes: list[str] = []
    regional: list[str] = []
    for text in (text.strip().replace("_", "-") for text in stated):
        tag = _BCP_47.fullmatch(text)
        if tag:
            regional.append(tag[1].lower() + "".join(map(_subtag, tag[2][1:].split("-"))))
        if code := tag[1].lower() if tag else text.lower() if _LANGUAGE.fullmatch(text.lower()) else None:
            codes.append(code)
    return list(dict.fromkeys(codes)), list(dict.fromkeys(regional))


def _subtag(text: str) -> str:
    """A part of a language tag as it is written by custom: a region in capitals, a script with one."""
    return f"-{text.upper() if len(text) == 2 else text.title() if len(text) == 4 else text.lower()}"


def _plain(text: str | None) -> str | None:
    """`text` if it is a name such as datasets and splits have, else nothing."""
    return text if text and _NAME.fullmatch(text) else None


def _environment() -> SandboxedEnvironment:
    """Jinja in which nothing reaches the card unescaped: `finalize` sees every value that is printed."""
    environment = SandboxedEnvironment(
        finalize=_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FORMATS, code=_code, codes=_codes, block=_block, link=_link)
    environment.globals.update(verdict=verdict, difference=difference)
    return environment


def _own(text: str) -> Markup:
    """What hfq says itself needs no escaping."""
    return Markup(text)  # noqa: S704


def _usage(report: Report, load_from: str) -> str:
    """How the model is run, with where it is. Its code is allowed there, as it was here."""
    code, remote = report.usage.replace("{model}", load_from), report.checkpoint.remote_code
    return code.replace(', device="cpu"', ', device="cpu", trust_remote_code=True') if remote else code


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


def _image(alt: str, path: str) -> Markup:
    return Markup("![{}]({})").format(_text(alt), Markup(path))  # noqa: S704 (a path of ours)


def _link(text: object, target: object) -> Markup:
    """A link to an address or to a file beside the card; what it says where it is neither."""
    if _URL.fullmatch(str(target)) or re.fullmatch(r"[\w./-]+", str(target)):
        return Markup("[{}]({})").format(_text(text), _text(target))
    return _text(text) if text == target else Markup("{}: {}").format(_text(text), _code(target))


def _codes(values: Iterable[object]) -> Markup:
    return Markup(", ").join(_code(value) for value in values)


def _block(value: str, language: str) -> Markup:
    """A fenced block, with a fence longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{value}\n{fence}")  # noqa: S704
