"""What a checkpoint's README says in its metadata, read as the Hub reads them, and which of it binds a derived model.

The Hub reads YAML 1.2, in which `no` is Norwegian. PyYAML reads 1.1, in which it is false.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..common.reading import check_yaml, read_text

LONGEST_CARD = 4 << 20  # bytes
_BINDS = re.compile(r"licen[cs]e[_-]\w+|extra_gated_\w+|inference|gated|language_bcp47", re.IGNORECASE)
_LICENCE = re.compile(r"licen[cs]es?", re.IGNORECASE)
_TEXTS = re.compile(r"licen[cs]e[\w-]*|language\w*|library_name|tags", re.IGNORECASE)  # and no numbers
_FORBIDS_DERIVATIVES = re.compile(r"(^|[^a-z])nd([^a-z]|$)|no[-_ ]?deriv", re.IGNORECASE)
_AUDIENCE = "not-for-all-audiences"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: no yes and no, no dates, no octal or sexagesimal numbers."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as PyYAML declares it)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and _TEXTS.fullmatch(key.value):
                for item in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    _as_written(item)
        return super().construct_mapping(node, deep=deep)


for _tag, _text, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_text})$"), list(_first))


def read_card(path: Path) -> dict[str, Any]:
    """The metadata of a README.md; empty where there is none.

    Raises:
        ValueError: they cannot be read.
    """
    try:
        text = read_text(path, limit=LONGEST_CARD).removeprefix("\ufeff")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(str(error.strerror)) from error
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return {}
    try:
        check_yaml(block[2])
        found = yaml.load(block[2], Loader=_Loader)  # noqa: S506  # nosec B506 - a SafeLoader
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError("they are no keys and values")
    return {str(key): _plain(value) for key, value in found.items()}


def terms_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, but for licence and languages, that say who may do what with a model, or how it is loaded."""
    found = {key: value for key, value in card.items() if _BINDS.fullmatch(key) and value is not None}
    if tags := [tag for tag in texts(card.get("tags")) if tag == _AUDIENCE or tag.startswith("license:")]:
        found["tags"] = tags
    if card.get("library_name") == "sentence-transformers":  # which loads a classifier as a cross-encoder
        found["library_name"] = card["library_name"]
    return found


def licences_of(card: Mapping[str, Any]) -> list[str]:
    """What the metadata call the licence, whatever they hold there; under `license`, or as people spell it."""
    return [text for key, value in card.items() if _LICENCE.fullmatch(key) for text in in_words(value)]


def forbids_derivatives(card: Mapping[str, Any]) -> bool:
    """Whether the licence that a card names forbids derived works, such as an INT8 version."""
    named = [*licences_of(card), *in_words([card.get("license_name"), card.get("license_link")])]
    return any(_FORBIDS_DERIVATIVES.search(text) for text in named)


def texts(value: Any) -> list[str]:
    """A value that may be one text, several or none."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def in_words(value: Any) -> list[str]:
    """Like `texts` for what is to be kept whatever it is: a mapping is written out, `name: acme, link: https://…`."""
    if isinstance(value, list):
        return [text for item in value for text in in_words(item)]
    if isinstance(value, dict):
        return [", ".join(f"{key}: {' / '.join(in_words(item))}" for key, item in value.items())] if value else []
    return [] if value is None or value == "" else [str(value)]


def _as_written(node: yaml.Node) -> None:
    """Have a number, such as a licence's version, kept as the text that it is in the file."""
    if isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":null"):
        node.tag = "tag:yaml.org,2002:str"


def _plain(value: Any) -> Any:
    """A value that JSON has too."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
