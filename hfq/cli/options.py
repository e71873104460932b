"""Flags. Those of a recipe's keys are made from `Recipe`; here are the others that several commands share, or that
belong together.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo

from ..common.errors import UsageError
from ..common.files import user_path
from ..common.redact import remember
from ..recipe import Recipe, flag

Command = Callable[..., None]
_EXAMPLES = {
    "columns": "ROLE=NAME, such as text=sentence1. `hfq tasks` lists the roles.",
    "layers": "HOW=NAME, such as dynamic=encoder.layer.0.output.dense. `hfq explain` says which.",
}


def with_options(*keys: str, **helps: str) -> Callable[[Command], Command]:
    """Let typer see a command's options that its own signature holds in bundles.

    Its parameter `flags` becomes a flag for each of these keys of a recipe, and is given those that were used. A
    parameter whose type is a dataclass becomes an option for each field. `helps`: keys with a help text of their own.
    """

    def decorate(command: Command) -> Command:
        bundles = {own.name: _bundle(own, keys, helps) for own in signature(command).parameters.values()}

        @wraps(command)
        def run(**given: Any) -> None:
            command(**{name: make({one.name: given[one.name] for one in of}) for name, (make, of) in bundles.items()})

        parameters = [one for _, of in bundles.values() for one in of]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _bundle(
    own: Parameter, keys: Sequence[str], helps: Mapping[str, str]
) -> tuple[Callable[[dict[str, Any]], Any], list[Parameter]]:
    """How an argument is made from what typer gives by name, and what typer is to see for it."""
    if own.name == "flags":
        return _used, [_of_recipe(key, helps.get(key)) for key in Recipe.model_fields if key in {*keys, *helps}]
    if is_dataclass(own.annotation):
        make: Any = own.annotation
        fields = signature(make).parameters.values()
        return lambda given: make(**given), [one.replace(kind=Parameter.KEYWORD_ONLY) for one in fields]
    return lambda given: given[own.name], [own.replace(kind=Parameter.KEYWORD_ONLY)]


def _of_recipe(key: str, text: str | None) -> Parameter:
    """An option, or where a recipe cannot do without it an argument, from a key's type, default and description."""
    field = Recipe.model_fields[key]
    kind: Any = field.annotation
    text = text or _help(field)
    if field.is_required():
        argument = typer.Argument(help=text, show_default=False)
        return Parameter(key, Parameter.KEYWORD_ONLY, annotation=Annotated[kind, argument])
    form = _said(field).get("form")
    option = typer.Option(flag(key), help=text, show_default=False, metavar=form)
    if kind is bool:
        return Parameter(key, Parameter.KEYWORD_ONLY, annotation=Annotated[bool, option], default=False)
    kind = list[str] if form else kind
    return Parameter(key, Parameter.KEYWORD_ONLY, annotation=Annotated[kind | None, option], default=None)


def _help(field: FieldInfo) -> str:
    """A key's description, and its default unless that is nothing."""
    unset = field.is_required() or field.annotation is bool or field.default in (None, [], {})
    default = _said(field).get("absent") if unset else field.default
    return f"{field.description}  \\[default: {default}]" if default is not None else str(field.description)


def _said(field: FieldInfo) -> dict[str, Any]:
    """What a recipe says of a key for the command line alone."""
    said: Any = field.json_schema_extra
    return said or {}


def _used(given: dict[str, Any]) -> dict[str, Any]:
    """Flags that were used: the others keep the recipe's defaults."""
    used = {key: value for key, value in given.items() if value is not None and value is not False and value != []}
    return {
        key: _by_use(key, value) if _said(Recipe.model_fields[key]).get("form") else value
        for key, value in used.items()
    }


def _by_use(key: str, words: Sequence[str]) -> dict[str, list[str]]:
    """Names by what they are for, from ROLE=NAME.

    Raises:
        UsageError: one has another form.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        use, _, name = word.partition("=")
        if not (use and name):
            raise UsageError(f"{flag(key)} {word!r} is not {_EXAMPLES[key]}")
        found.setdefault(use, []).append(name)
    return found


def expanded(value: Any) -> Any:
    """A path, or several, as `user_path` has them."""
    return [user_path(path) for path in value] if isinstance(value, list | tuple) else value and user_path(value)


def examples(*commands: str) -> str:
    """What stands below a command's help."""
    return "\n\n".join(("**Examples**", *commands))


def _clean_token(token: str | None) -> str | None:
    """Refuse what cannot be sent in a header: the HTTP client would, and show the token in its message."""
    for source, value in (("--token", token), ("HF_TOKEN", os.environ.get("HF_TOKEN"))):
        if value and not re.fullmatch("[!-~]*", value.strip()):
            raise UsageError(f"{source} holds characters that are in no token. Copy it again from your Hub settings.")
    remember(token)
    return token and token.strip()


def _be_verbose(given: bool) -> bool:
    """Let every `Reporter` of this process name what it would only count."""
    if given:
        os.environ["HFQ_VERBOSE"] = "1"
    return given


Token = Annotated[
    str | None,
    typer.Option(
        help="Hub token.  \\[default: HF_TOKEN or `hf auth login`]", show_default=False, callback=_clean_token
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run; no trial is repeated.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Name the files that are left behind.", callback=_be_verbose)
]
Recipes = Annotated[
    Path, typer.Argument(help="Folder of recipes, or one recipe.", show_default=False, callback=expanded)
]


@dataclass(frozen=True)
class Hub:
    """Where results go, and as whose."""

    token: Token = None
    local_hub: Annotated[
        bool,
        typer.Option("--local-hub", help="Start a Hub on loopback and push there: nothing leaves this machine."),
    ] = False


@dataclass(frozen=True)
class Place:
    """Where runs happen, and from where they go on."""

    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Where: here, or on the workers of a Ray cluster."),
    ] = "local"
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="host:port of the Ray cluster.  \\[default: RAY_ADDRESS, or the one on this machine]",
            show_default=False,
        ),
    ] = None
    resume: Resume = False


@dataclass(frozen=True)
class Listener:
    """How `hfq webhook` listens, and what it does with what it hears."""

    queue: Annotated[
        Path, typer.Option(help="Folder for what is to be done; it survives a restart.", callback=expanded)
    ] = Path("hfq-queue")
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860
    retry: Annotated[
        float, typer.Option(min=1, help="Seconds until what failed is tried again; doubles with each attempt.")
    ] = 60


@dataclass(frozen=True)
class Contest:
    """What `hfq bench` measures."""

    vs: Annotated[
        str,
        typer.Option(
            help="Peers, with commas: openvino, onnxruntime, torch, torchao, inc; of embeddings also st-onnx and "
            "st-openvino, sentence-transformers' own.  \\[default: those installed]",
            show_default=False,
        ),
    ] = ""
    peer_python: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH: the interpreter of a peer whose packages are in another environment.", show_default=False
        ),
    ] = None
    baseline: Annotated[
        str | None,
        typer.Option(help="Float checkpoint it was made from.  \\[default: what hfq.json names]", show_default=False),
    ] = None
    shapes: Annotated[str, typer.Option(help="Batch x length, with commas.")] = "1x16,1x128,8x128,32x128"
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every engine on each shape.")] = 5
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also time `hfq.compile`.")] = True
    growth: Annotated[
        bool, typer.Option("--growth", help="Also how time and memory grow with batch, length, processes and layers.")
    ] = False
