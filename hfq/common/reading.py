"""Reading JSON and YAML that strangers wrote: within limits of size and depth that no honest file comes near.

Without them one file of a few kilobytes could end the process, or keep it busy for ever.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SMALL = 32 << 20  # bytes of a file that is parsed here: configurations, reports
LARGE = 512 << 20  # bytes of a file that a library parses, such as a vocabulary
DEEPEST = 64
_MOST_NODES = 200_000  # of YAML, with every alias written out
_LONGEST_NUMBER = 100  # digits


def read_text(path: Path, *, limit: int = SMALL) -> str:
    """A file's text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `limit` bytes, or not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {megabytes(limit)}")
    return content.decode("utf-8")


def read_json(path: Path, *, limit: int = SMALL) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, is larger than `limit` bytes, or nested deeper than `DEEPEST`.
    """
    return parse_json(read_text(path, limit=limit))


def parse_json(text: str) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: it is not JSON, or nested deeper than `DEEPEST`.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [item for parent in level for item in _items(parent)]
    if level:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    return value


def walk(value: Any, *, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value inside a parsed JSON value with the key it stands under; those of a list under the list's."""
    yield key, value
    if isinstance(value, dict):
        for name, item in value.items():
            yield from walk(item, key=str(name))
    elif isinstance(value, list):
        for item in value:
            yield from walk(item, key=key)


def read_yaml(text: str) -> Any:
    """The value of YAML text: plain values only, and aliases only as many as could be written out.

    Raises:
        yaml.YAMLError: it is not YAML.
        ValueError: a value is wrong; it is nested deeper than `DEEPEST`, or huge with its aliases written out.
    """
    check_yaml(text)
    try:
        return yaml.safe_load(text)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # as for `!!int ""`
        raise ValueError("a value of it is not of the type that its tag says") from error


def check_yaml(text: str) -> None:
    """Refuse YAML that would cost much more than its length says. Raises as `read_yaml`."""
    sizes: dict[str | None, int] = {}  # nodes under each anchor
    parents: list[tuple[str | None, int]] = []  # anchor and count so far, of each collection that is open
    count = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            parents.append((event.anchor, count))
            if len(parents) > DEEPEST:
                raise ValueError(f"it is nested deeper than {DEEPEST} levels")
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = parents.pop()
            sizes[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in parents):
                raise ValueError(f"its alias *{event.anchor} stands inside what it repeats")
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1
            count += 1
        if count > _MOST_NODES:
            raise ValueError(f"it has more than {_MOST_NODES} values, aliases written out")


def megabytes(count: int) -> str:
    """A limit in bytes, for people."""
    return f"{count >> 20} MiB"


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [item for item in value.values() if isinstance(item, dict | list)]
    return [item for item in value if isinstance(item, dict | list)] if isinstance(value, list) else []
