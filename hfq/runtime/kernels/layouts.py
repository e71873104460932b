"""How int8 weights lie in memory where one instruction multiplies several input channels at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Weights int8 `[out, in]` as `[out / block, in, block]`, in memory `[out / block, in / group, block, group]`.

    What one instruction multiplies, `group` input channels of each of several output channels, lies side by side.
    """

    block: int
    group: int

    def arrange(self, weight: Tensor, into: Tensor | None = None) -> Tensor:
        """int8 `[out, in]` in this layout; in the memory of `into`, int8 `[out * in]`, if that is given."""
        columns = weight.shape[1]
        weight = (
            weight.contiguous()
            if weight.storage_offset() % self.group == 0
            else weight.clone(memory_format=torch.contiguous_format)
        )
        groups = weight.view({2: torch.int16, 4: torch.int32}[self.group])  # each is moved at once
        parts = groups.view(-1, self.block, columns // self.group).transpose(1, 2)
        arranged = parts.contiguous() if into is None else into.view(parts.dtype).view(parts.shape).copy_(parts)
        return arranged.view(torch.int8).view(-1, columns, self.block)

    def restore(self, blocks: Tensor) -> Tensor:
        """What `arrange` was given."""
        count, columns, _ = blocks.shape
        parts = blocks.view(count, columns // self.group, self.block, self.group)
        return parts.transpose(1, 2).reshape(count * self.block, columns)

    def suits(self, out_features: int, in_features: int) -> bool:
        """Whether a weight of this shape can be laid out so."""
        return out_features % self.block == 0 and in_features % self.group == 0


VNNI = Layout(block=64, group=4)  # oneDNN's, with AVX-512
PANELS = Layout(block=16, group=2)  # for 16-bit multiply-adds, which any x86 of the last ten years has
