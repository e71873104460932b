"""The header of a safetensors file, checked by hand before any library allocates what it asks for.

The format: 8 bytes with the header's length, a JSON object of tensors, then their bytes without gaps.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SourceError
from .reading import read_text

LONGEST = 100_000_000  # bytes of a header, the limit of safetensors itself
MOST_TENSORS = 1 << 17
_MOST_MARKS = 16 * MOST_TENSORS  # commas, colons and brackets: what a parsed header costs in memory
_LONGEST_NAME = 512
_MOST_DIMENSIONS = 32
_LARGEST = 1 << 63
_METADATA = "__metadata__"
BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it. `begin` and `end`: bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name. Nothing but the header is read.

    Raises:
        SourceError: it is not a whole and consistent safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"its header should have {length} bytes, and the file has {size}")
            if length > LONGEST:
                raise ValueError(f"its header has {length} bytes; at most {LONGEST} are allowed")
            return parse_header(file.read(length), data_size=size - 8 - length)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is not a whole safetensors file: {error}. Download it again.") from error


def parse_header(header: bytes, *, data_size: int) -> dict[str, TensorInfo]:
    """The tensors of a header, whose data has `data_size` bytes.

    Raises:
        ValueError: what is wrong with it.
    """
    if sum(map(header.count, (b",", b":", b"[", b"{"))) > _MOST_MARKS:
        raise ValueError(f"its header is for more than {MOST_TENSORS} tensors")
    if not header.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    try:
        rows = json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    metadata = rows.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA} in its header is not a map from text to text")
    if len(rows) > MOST_TENSORS:
        raise ValueError(f"its header is for more than {MOST_TENSORS} tensors")
    tensors = {name: _tensor(name, row) for name, row in rows.items()}
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            raise ValueError(f"the bytes of {name!r} begin at {tensor.begin}, and should at {position}")
        position = tensor.end
    if position != data_size:
        raise ValueError(f"its tensors have {position} bytes, and the file holds {data_size}")
    return tensors


def read_index(path: Path, *, beside: Iterable[str] | None = None) -> dict[str, str]:
    """The `weight_map` of an index: the shard of each tensor, a file beside the index.

    `beside`: the files there, where they are not fetched yet.

    Raises:
        SourceError: it is not an index, or names files elsewhere.
    """
    try:
        index = json.loads(read_text(path), object_pairs_hook=_unique)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise ValueError("it has no weight_map")
        if not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError("its weight_map is not from tensors to file names")
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not an index of shards: {error}. Download it again.") from error
    for shard in set(shards.values()):
        plain = shard.endswith(".safetensors") and shard.isprintable() and not set(shard) & {"/", "\\"}
        is_there = (path.parent / shard).is_file() if beside is None else shard in beside
        if not plain or shard.startswith(".") or not is_there:
            raise SourceError(f"{path} names {shard!r}, which is not a safetensors file beside it.")
    return shards


def check_index(index: Mapping[str, str], shards: Mapping[str, Iterable[str]], *, path: Path) -> None:
    """Every tensor has to be in the shard that the index names, and in no other.

    Raises:
        SourceError: one is not.
    """
    held = [(tensor, shard) for shard, tensors in shards.items() for tensor in tensors]
    wrong = sorted(set(index.items()).symmetric_difference(held))
    if wrong or len(held) != len(index):
        tensor, shard = wrong[0] if wrong else held[0]
        where = f"{path.name} says" if (tensor, shard) in index.items() else "the shard itself says"
        raise SourceError(
            f"{path} does not fit its shards: {tensor!r} is in {shard!r}, as {where}, and the other does not. "
            "Download all of them again."
        )


def _tensor(name: str, row: Any) -> TensorInfo:
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise ValueError(f"{name[:80]!r} is no name of a tensor")
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!r} has the unknown dtype {str(dtype)[:80]!r}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name!r} has a shape that is none")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r} has data_offsets that are none")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{name!r} of shape {shape} and {dtype} cannot have {offsets[1] - offsets[0]} bytes")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _LARGEST for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has one key twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _no_number(text: str) -> float:
    raise ValueError(f"it holds {text[:40]}, and only whole numbers are expected")
