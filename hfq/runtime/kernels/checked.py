"""oneDNN's int8 matmul on x86 CPUs without VNNI, made exact: it is looked at where it may saturate, and mended there.

The instruction that multiplies there adds the products of two neighbouring input channels to 16 bits. Only where both
weights are large, of the same sign, and both codes are large as well does that saturate: seldom, in few output channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernel import PLAIN, Codes, Epilogue
from .native import bytes_of
from .onednn import OneDnnKernel
from .portable import PortableKernel

GROUP = 4  # input channels; where there are some left over, oneDNN may start its pairs anywhere
MOST = 2**15 - 1  # that two products may add up to
LARGEST_CODE = 255
WORTHWHILE = 4  # if more than one in so many output channels would be computed anew, all are, in floats
FEW_ROWS = 64  # looking for sums that saturate takes longer than is saved


class CheckedKernel(OneDnnKernel):
    """oneDNN's matmul, where output channels that may have saturated are computed anew as the portable kernel does."""

    name = "onednn-checked"

    def __init__(self) -> None:
        super().__init__()
        self._portable = PortableKernel()
        self._traced = OneDnnKernel()  # made here: a lock cannot be made while a graph is traced

    def pack(self, weight: Tensor, scale: Tensor) -> Tensor:
        """A plain weight, which is the portable kernel's, where oneDNN's cannot be read, or adds in another way."""
        if not weight.numel() or weight.shape[1] % GROUP:
            return self._portable.pack(weight, scale)
        packed = super().pack(weight, scale)
        if torch.ops.mkldnn._nbytes(packed) != weight.numel() or not torch.equal(_columns(packed), weight.t()):
            return self._portable.pack(weight, scale)
        setattr(packed, _PAIRS, _Pairs.of(weight))  # the two live and die together
        return packed

    def unpack(self, packed: Tensor, scale: Tensor, in_features: int) -> Tensor:
        if packed.is_mkldnn:
            return _columns(packed).t().contiguous()
        return self._portable.unpack(packed, scale, in_features)

    def static(
        self,
        codes: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        input_codes: Codes,
        epilogue: Epilogue = PLAIN,
    ) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # What is computed anew depends on the codes, which a graph does not. It sees no memory either.
            packed = self._traced.unpack(packed, scale, codes.shape[-1])
        if not packed.is_mkldnn:
            return self._portable.static(codes, packed, scale, bias, input_codes, epilogue)
        columns = _columns(packed)
        rows = codes.reshape(-1, len(columns))
        in_floats = len(rows) < FEW_ROWS
        if not in_floats:
            pairs: _Pairs = getattr(packed, _PAIRS)
            wrong = pairs.may_saturate(rows)
            in_floats = len(wrong) * WORTHWHILE > len(scale)
        if in_floats:
            return self._portable.static(codes, columns.t(), scale, bias, input_codes, epilogue)
        if not len(wrong):
            return super().static(codes, packed, scale, bias, input_codes, epilogue)
        residual = epilogue.residual
        anew = self._portable.static(
            codes,
            columns.index_select(1, wrong).t(),
            scale[wrong],
            None if bias is None else bias[wrong],
            input_codes,
            epilogue if residual is None else epilogue._replace(residual=residual.index_select(-1, wrong)),
        )
        y = super().static(codes, packed, scale, bias, input_codes, epilogue)
        y.view(-1, len(scale)).index_copy_(1, wrong, anew.reshape(-1, len(wrong)))
        return y


@dataclass(frozen=True)
class _Pairs:
    """Neighbouring weights of which two products of large codes saturate, in any order.

    `pair`: int32 `[pairs]`, of input channels; `channel`: int32 `[pairs]`, of the output; `sizes`: uint8 `[2, pairs]`.
    """

    pair: Tensor
    channel: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "_Pairs":
        """Those of int8 `[out, in]`."""
        first, second = weight[:, 0::2].short(), weight[:, 1::2].short()
        channel, pair = first.add(second).abs_().gt(MOST // LARGEST_CODE).nonzero(as_tuple=True)
        sizes = torch.stack([half[channel, pair].abs_().to(torch.uint8) for half in (first, second)])
        return cls(pair.int(), channel.int(), sizes)

    def may_saturate(self, codes: Tensor) -> Tensor:
        """The output channels, int64, in which a sum of `codes`, uint8 `[rows, in]`, may not fit; at least those.

        There is at least one row.
        """
        largest = codes.amax(0).int()
        sums = largest[0::2].index_select(0, self.pair).mul_(self.sizes[0])
        sums.add_(largest[1::2].index_select(0, self.pair).mul_(self.sizes[1]))
        return self.channel[sums > MOST].unique().long()


def saturates_in_pairs() -> bool:
    """Whether oneDNN, here, is wrong only where the products of two neighbouring channels leave 16 bits.

    It is asked with codes and weights that saturate often, in several shapes, since it has code for each.
    """
    kernel = OneDnnKernel()
    generator = torch.Generator().manual_seed(0)
    for rows, depth, channels in ((1, 64, 48), (5, 260, 33), (67, 516, 64), (9, 1540, 16)):
        codes = torch.randint(0, 256, (rows, depth), dtype=torch.uint8, generator=generator)
        weight = torch.randint(-128, 128, (channels, depth), dtype=torch.int8, generator=generator)
        scale = torch.ones(channels)
        pairs = codes.view(rows, 1, -1, 2).int() * weight.view(1, channels, -1, 2).int()
        expected = pairs.sum(-1).clamp_(-MOST - 1, MOST).sum(-1).float()
        try:
            packed = kernel.pack(weight, scale)
            found = kernel.static(codes, packed, scale, None, (1.0, 0))
        except (RuntimeError, AttributeError, NotImplementedError):
            return False
        if not torch.equal(found, expected):
            return False
    return True


_PAIRS = "_hfq_pairs"


def _columns(packed: Tensor) -> Tensor:
    """int8 `[in, out]` over the memory of a weight that oneDNN keeps so."""
    return bytes_of(packed, packed.shape.numel()).view(packed.shape)
