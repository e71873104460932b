"""oneDNN's layout of int8 weights, as oneDNN makes it but thirty times as fast.

oneDNN moves one number after the other, which takes most of the time that a model takes to load. Where its layout turns
out to be `VNNI`, four input channels are moved at once instead.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .layouts import VNNI
from .native import bytes_of, packed_tensor
from .weight_memory import WeightMemory

WORTHWHILE = 1 << 16  # numbers of a weight


@dataclass(frozen=True)
class Packing:
    """How oneDNN packs weights of one shape here, if what comes first are the numbers, laid out as `VNNI`.

    `shape`, `descriptor`: of what it makes of them. `and_sums`: all that follows is the negative sum of each output
    channel, int32, with which zero points are made up for.
    """

    shape: tuple[int, ...]
    descriptor: bytes
    and_sums: bool


def pack(weight: Tensor, memory: WeightMemory) -> Tensor:
    """int8 `[out, in]` as oneDNN multiplies it with uint8 codes, in torch's opaque layout."""
    if weight.numel() >= WORTHWHILE:
        try:
            found = packing(*weight.shape, threads=torch.get_num_threads())
            if found is not None and found.and_sums:
                content = _write_content(weight, memory.take(_size(weight)))
                packed = packed_tensor(content.data_ptr(), shape=found.shape, descriptor=found.descriptor)
                packed._content = content  # type: ignore[attr-defined]  # the two live and die together
                return packed
        except (OSError, AttributeError, RuntimeError):  # another torch
            pass
    return _packed_by_onednn(weight)


def unpack(packed: Tensor, in_features: int) -> Tensor | None:
    """The int8 `[out, in]` that `pack` was given; None where oneDNN has packed it."""
    content: Tensor | None = getattr(packed, "_content", None)
    if content is None:
        return None
    numbers = content[: packed.shape.numel()]
    return VNNI.restore(numbers.view(-1, in_features, VNNI.block))


@lru_cache(maxsize=256)
def packing(out_features: int, in_features: int, *, threads: int) -> Packing | None:
    """What oneDNN does with a weight of this shape. The CPU decides, and the number of threads.

    Raises:
        AttributeError, RuntimeError: this torch does not say.
    """
    if not VNNI.suits(out_features, in_features):
        return None
    generator = torch.Generator().manual_seed(0)
    bounds = torch.iinfo(torch.int64)
    eights = torch.randint(bounds.min, bounds.max, (out_features * in_features // 8,), generator=generator)
    weight = eights.view(torch.int8).view(out_features, in_features)
    packed = _packed_by_onednn(weight)
    size = torch.ops.mkldnn._nbytes(packed)
    if size < weight.numel():
        return None
    content = _write_content(weight, torch.empty(_size(weight), dtype=torch.int8))
    numbers, sums = content.split([weight.numel(), 4 * out_features])
    found = bytes_of(packed, size)
    if not torch.equal(found[: len(numbers)], numbers):
        return None
    return Packing(tuple(packed.shape), descriptor_of(packed), and_sums=torch.equal(found[len(numbers) :], sums))


def descriptor_of(packed: Tensor) -> bytes:
    """oneDNN's description of a packed weight."""
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())


def _size(weight: Tensor) -> int:
    """Bytes of what `_write_content` writes."""
    return weight.numel() + 4 * len(weight)


def _write_content(weight: Tensor, content: Tensor) -> Tensor:
    """int8 `[out, in]` as `VNNI`, then the negative sum of each output channel, int32: all of it as int8 numbers."""
    numbers, sums = content.split([weight.numel(), 4 * len(weight)])
    VNNI.arrange(weight, numbers)
    ones = torch.ones(weight.shape[1], 8, dtype=torch.int8)
    # In an eighth of the time of a sum.
    torch.neg(torch._int_mm(weight, ones)[:, 0], out=sums.view(torch.int32))
    return content


def _packed_by_onednn(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed
