"""The int8 twin of `nn.Embedding`."""

import torch
from torch import Tensor, nn

from .packed import frozen


class Int8Embedding(nn.Module):
    """Embedding with int8 rows: `weight` int8 `[rows, dim]`, `weight_scale` float32 `[rows, 1]`.

    `factor`: what its outputs are multiplied by; not part of the state, as the rows may be a head's, too.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        factor: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.factor = factor
        self.weight_scale = frozen(torch.empty(num_embeddings, 1, device=device))  # first, as in `Int8Linear`
        self.weight = frozen(torch.empty(num_embeddings, embedding_dim, dtype=torch.int8, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """integer ids `[..]` to float `[.., dim]`, in the dtype of the scales."""
        rows = nn.functional.embedding(ids, self.weight).to(self.weight_scale.dtype)
        rows = rows.mul_(nn.functional.embedding(ids, self.weight_scale))
        return rows if self.factor == 1 else rows.mul_(self.factor)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def factor_of(layer: nn.Embedding) -> float | None:
    """What `layer` multiplies the rows of a plain Embedding by, as Gemma's and BART's do; None if it does something else."""
    if type(layer) is nn.Embedding:
        return 1.0
    factor = getattr(layer, "scalar_embed_scale", getattr(layer, "embed_scale", None))
    if type(layer).__bases__ != (nn.Embedding,) or not isinstance(factor, int | float):
        return None
    if layer.weight.is_floating_point() and not layer.weight.is_meta:
        rows = layer.weight.detach()[:2]
        with torch.no_grad():
            if not torch.allclose(layer(torch.arange(len(rows))), rows * factor):
                return None
    return float(factor)
