"""A builder of `datasets` for JSON in which what is written as text stays text.

Its own takes a column for moments if all of it so far looks like dates, and then writes each anew; of a table it guesses
more: "0123" becomes a number.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json
from datasets.builder import Key
from datasets.packaged_modules.json import json as reading
from datasets.packaged_modules.json.json import Json, JsonConfig

from ..common.errors import DataError
from ..common.reading import parse_json
from .rows import same_source

_NAMED = ("name", "version")
_LONG = re.compile(rb"[:\[,]\s*-?[0-9]{19,}\s*[,}\]]")  # may be a whole number of more than 64 bits; or inside a text
_OF_LINES = (".jsonl", ".ndjson")
_DIGITS = 100  # of a number that Python is asked to read


class Records(Json):
    """Rows of JSON objects."""

    def _generate_tables(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Key, pa.Table]]:
        with _text_stays_text():
            yield from super()._generate_tables(*args, **kwargs)


def as_records(builder: Json, *, token: str | None = None) -> Records:
    """The builder that reads the same files as `builder`."""
    options = (option.name for option in fields(JsonConfig) if option.name not in _NAMED)
    asked = {name: getattr(builder.config, name) for name in options}
    return Records(**same_source(builder, token, __file__), info=builder.info.copy(), **asked)


def check_lines(files: Mapping[str, Sequence[str]]) -> None:
    """Look in those files of JSON lines that lie here for a line that is no row.

    Raises:
        DataError: naming the first.
    """
    for path in (Path(path) for paths in files.values() for path in paths):
        if path.suffix.lower() in _OF_LINES and path.is_file():
            with path.open(encoding="utf-8-sig") as file:
                _check_lines(file, path)


def _check_lines(lines: Iterable[str], path: Path) -> None:
    for number, line in enumerate(lines, 1):
        try:
            is_row = not line.strip() or isinstance(parse_json(line), dict)
        except ValueError:  # it is no JSON, which has a message of its own
            return
        if not is_row:
            raise DataError(
                f'Line {number} of {path} is {line.strip()[:100]}; expected an object in each line, such as {{"text": …}}. Mend or '
                "remove it."
            )


class _Reader:
    """In place of `pyarrow.json`."""

    ReadOptions = pyarrow.json.ReadOptions

    @staticmethod
    def read_json(file: io.BytesIO, *, read_options: Any) -> pa.Table:
        _check_numbers(file.getvalue())
        table = pyarrow.json.read_json(file, read_options=read_options)
        schema = pa.schema([field.with_type(_as_text(field.type)) for field in table.schema])
        if schema == table.schema:
            return table
        file.seek(0)
        options = pyarrow.json.ParseOptions(explicit_schema=schema)
        return pyarrow.json.read_json(file, read_options=read_options, parse_options=options)


@contextmanager
def _text_stays_text() -> Iterator[None]:
    """While the block runs, `datasets` reads JSON so."""
    before = reading.paj, reading.pandas_read_json, reading.ujson_loads
    reading.paj, reading.pandas_read_json = _Reader, partial(before[1], dtype=False)
    reading.ujson_loads = _checked(reading.ujson_loads)
    try:
        yield
    finally:
        reading.paj, reading.pandas_read_json, reading.ujson_loads = before


def _checked(parse: Callable[..., Any]) -> Callable[..., Any]:
    def parsed(text: str | bytes) -> Any:
        try:
            return parse(text)
        except ValueError:
            _check_numbers(text.encode() if isinstance(text, str) else text)
            raise

    return parsed


def _check_numbers(content: bytes) -> None:
    """Refuse whole numbers that would become floats, of which the last digits are others.

    Raises:
        ValueError: naming the first.
    """
    if not _LONG.search(content):
        return
    found: list[str] = []
    try:
        json.loads(content, parse_int=found.append)
    except ValueError:  # it is a line for each row, or no JSON at all, which is not our business
        for line in filter(_LONG.search, content.splitlines()):
            with suppress(ValueError):
                json.loads(line, parse_int=found.append)
    for digits in found:
        if len(digits) > _DIGITS or not -(2**63) <= int(digits) < 2**63:
            raise ValueError(
                f"the number {digits[:60]} in it does not fit into 64 bits and would be read as another. Write such numbers "
                "as text, between quotation marks"
            )


def _as_text(kind: pa.DataType) -> pa.DataType:
    """A type that was inferred of JSON, with text for moments: JSON has none."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_as_text(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_text(field.type)) for field in kind])
    return kind
