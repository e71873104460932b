"""CSV and its kin as text: every cell as it is written, and every row, or an error with its line.

pandas, by which datasets reads such files, guesses types ("NA", "True", "0123"), pads short rows, and takes a lone
quotation mark for the start of a cell that may swallow the rows after it.
"""

import codecs
import csv
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common.errors import DataError

SEPARATORS = ",\t;|"
_BOMS = {  # UTF-32's begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Layout:
    """How a file is read. `given`: it has no line with the names of its columns."""

    encoding: str
    separator: str = ","
    quoted: bool = True
    names: tuple[str, ...] = ()
    given: bool = False


@dataclass(frozen=True)
class Asked:
    """What somebody who knows the file says of it; None where it is to be found out."""

    separator: str | None = None
    quoted: bool | None = None
    names: tuple[str, ...] | None = None
    encoding: str | None = None


class BadLineError(ValueError):
    """A row that cannot be read."""


def find_encoding(path: Path) -> str:
    """UTF-8, or what the byte order mark says.

    Raises:
        ValueError: the file is in neither, saying what it seems to be.
    """
    with path.open("rb") as file:
        start = file.read(4)
        for mark, encoding in _BOMS.items():
            if start.startswith(mark):
                return encoding
        file.seek(0)
        for number, line in enumerate(file, 1):
            if b"\0" in line:
                raise ValueError(
                    f"line {number} holds zero bytes, as UTF-16 without a byte order mark does. Expected UTF-8: convert "
                    "it (`iconv -f UTF-16LE -t UTF-8`)"
                )
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x}); Latin-1 (ISO-8859-1) or Windows-1252, "
                    "perhaps. Expected UTF-8: convert it (`iconv -f WINDOWS-1252 -t UTF-8`)"
                ) from error
    return "utf-8"


def find_layout(path: Path, asked: Asked, *, name: str) -> Layout:
    """The one way in which every row of a file has the columns of its first line.

    `name`: what the file is called in messages.

    Raises:
        DataError: there is none, naming the line that does not fit; or there are two that differ.
    """
    csv.field_size_limit(sys.maxsize)  # a text may be longer than 128 KiB, which Python allows
    try:
        encoding = asked.encoding or find_encoding(path)
        first = _first_line(path, encoding)
        separators = [asked.separator] if asked.separator and asked.separator in first else _separators(first)
        problems = []
        for separator in separators:
            try:
                return _find_quotes(path, Layout(encoding, separator), asked)
            except BadLineError as error:
                problems.append(error)
        raise problems[0]
    except (ValueError, LookupError, csv.Error) as error:
        raise DataError(f"{name} cannot be read: {error}.") from error


def read_rows(path: Path, layout: Layout) -> Iterator[list[str | None]]:
    """The rows of a file, whose cells are None where nothing is written."""
    for row in _rows(path, layout):
        yield [cell or None for cell in row]


def _find_quotes(path: Path, layout: Layout, asked: Asked) -> Layout:
    """Whether a quotation mark encloses cells or is one of their characters."""
    if asked.quoted is not None:
        found = _named(path, replace(layout, quoted=asked.quoted), asked)
        _check(path, found)
        return found
    doubtful, problem = None, None
    try:
        quoted = _named(path, layout, asked)
        doubtful = _check(path, quoted)
        if doubtful is None:
            return quoted
    except BadLineError as error:
        problem = error
    try:
        literal = _named(path, replace(layout, quoted=False), asked)
        _check(path, literal)
        _check_marks(path, literal)
    except BadLineError:
        if problem:
            raise problem from None
        return quoted
    if problem or layout.separator == "\t":
        return literal
    raise ValueError(
        f"a cell seems to begin with the quotation mark in line {doubtful}, and to go on in the next; yet each line is a "
        "whole row if the mark is part of the text. Write such marks twice, and the cell between two others"
    )


def _named(path: Path, layout: Layout, asked: Asked) -> Layout:
    if asked.names:
        return replace(layout, names=asked.names, given=True)
    names = [cell.strip() or f"Unnamed: {i}" for i, cell in enumerate(_header(path, layout))]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise ValueError(f"two columns are called {twice!r} in its first line. Expected a line with the columns' names")
    if any(_is_number(name) for name in names):
        raise ValueError(
            f"its first line has no names of columns: {', '.join(map(repr, names))[:200]}. Put one before it, as text"
            f"{layout.separator}label"
        )
    return replace(layout, names=tuple(names))


def _header(path: Path, layout: Layout) -> list[str]:
    try:
        return next(_records(path, layout))[1]
    except StopIteration:
        raise ValueError("it is empty; expected a line with the names of the columns") from None


def _check(path: Path, layout: Layout) -> int | None:
    """The first line on which a cell begins that may be rows taken for one: with line breaks, and separators not of prose.

    Raises:
        BadLineError: a row has more or fewer cells than there are names.
    """
    doubtful = None
    separator = layout.separator
    for line, row in _records(path, layout):
        if len(row) != len(layout.names):
            marked = "tabs" if separator == "\t" else repr(separator)
            raise BadLineError(
                f"expected {len(layout.names)} fields in line {line}, saw {len(row)}. Mend that row; a text with {marked} "
                "or line breaks stands between quotation marks"
            )
        if doubtful is None:
            long = [cell for cell in row if "\n" in cell or "\r" in cell]
            if any(cell.count(separator) > cell.count(f"{separator} ") for cell in long):
                doubtful = line
    return doubtful


def _check_marks(path: Path, layout: Layout) -> None:
    """Where marks are doubled or escaped inside of marks, or enclose the names, somebody meant them to enclose cells."""
    for i, (line, row) in enumerate(_records(path, layout)):
        for cell in row:
            if len(cell) > 1 and cell[0] == cell[-1] == '"' and (i == 0 or re.search(r'["\\]"', cell[1:-1])):
                raise BadLineError(f"line {line} encloses its cells in quotation marks")


def _records(path: Path, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """All that is not blank, the names too, with the line on which it begins."""
    options: dict[str, Any] = {"strict": True} if layout.quoted else {"quoting": csv.QUOTE_NONE}
    with path.open(encoding=layout.encoding, newline="") as file:
        reader = csv.reader(file, delimiter=layout.separator, **options)
        line = 1
        try:
            for row in reader:
                if len(row) > 1 or "".join(row).strip():
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise BadLineError(
                f"the row in line {line} has a quotation mark that does not enclose a whole cell ({error}). Write marks "
                "that belong to a text twice, and the text between two others"
            ) from error


def _rows(path: Path, layout: Layout) -> Iterator[list[str]]:
    records = _records(path, layout)
    if not layout.given:
        next(records)
    return (row for _, row in records)


def _first_line(path: Path, encoding: str) -> str:
    with path.open(encoding=encoding, newline="") as file:
        return next((line for line in file if line.strip()), "")


def _separators(line: str) -> Sequence[str]:
    """Those that a line holds, the most frequent first."""
    return sorted((mark for mark in SEPARATORS if mark in line), key=line.count, reverse=True) or SEPARATORS[:1]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
