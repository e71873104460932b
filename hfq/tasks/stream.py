"""Examples that are too large to be held: decoded when a batch is made, and forgotten after it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from ..common.errors import DataError, WrongDataError
from .base import Encoding, require_columns

if TYPE_CHECKING:
    from datasets import Dataset


def find_file_column(
    features: Mapping[str, Any], requested: Sequence[str], *, kind: type, role: str, what: str
) -> list[str]:
    """The column of images or recordings: the one asked for, or the only one of that `datasets` feature.

    Files that Parquet has without a note of what they are count too. `what`: they are called in messages, as `role` is.

    Raises:
        WrongDataError: it does not exist, or the choice is not clear.
    """
    require_columns(requested, features, f"--column {role}=")
    held = [
        name
        for name, feature in features.items()
        if isinstance(feature, kind) or (isinstance(feature, Mapping) and set(feature) == {"bytes", "path"})
    ]
    found = list(requested) or held
    if len(found) == 1 and found[0] in held:
        return found
    raise WrongDataError(
        f"Which column holds the {what} is not clear. Columns: {', '.join(features)}; with {what}s: "
        f"{', '.join(held) or 'none'}. Name one with --column {role}=NAME."
    )


class Stream(Sequence[Encoding]):
    """The encodings of rows, each made anew whenever it is asked for.

    `decode`: from a row to its encoding, whatever it raises. `what`: the column that it decodes, for the message.
    """

    def __init__(self, rows: "Dataset", decode: Callable[[dict[str, Any]], Encoding], *, what: str) -> None:
        self.rows = rows
        self.decode = decode
        self.what = what
        self.places: Sequence[int] = range(len(rows))

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Encoding: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoding]: ...
    def __getitem__(self, index: int | slice) -> Encoding | list[Encoding]:
        """Raises `DataError` where a row cannot be decoded."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self.places[index]
        try:
            return self.decode(self.rows[row])
        except DataError:
            raise
        except Exception as error:  # a decoder raises whatever it likes about a broken file
            raise DataError(
                f"Row {row} (from 0) of split {str(self.rows.split or 'given')!r} cannot be read in column {self.what!r}: "
                f"{type(error).__name__}: {error}. Mend or remove it."
            ) from error

    def __iter__(self) -> Iterator[Encoding]:
        return (self[place] for place in range(len(self)))

    def ordered(self, order: Sequence[int]) -> "Stream":
        """The same, in another order."""
        found = Stream(self.rows, self.decode, what=self.what)
        found.places = [self.places[place] for place in order]
        return found
