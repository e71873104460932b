"""The int8 twin of `nn.Embedding`."""

import torch
from torch import Tensor, nn

from .packed import frozen


class Int8Embedding(nn.Module):
    """Embedding with int8 rows: `weight` int8 `[rows, dim]`, `weight_scale` float32 `[rows, 1]`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.weight_scale = frozen(torch.empty(num_embeddings, 1, device=device))  # first, as in `Int8Linear`
        self.weight = frozen(torch.empty(num_embeddings, embedding_dim, dtype=torch.int8, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """integer ids `[..]` to float `[.., dim]`, in the dtype of the scales."""
        rows = nn.functional.embedding(ids, self.weight).to(self.weight_scale.dtype)
        return rows.mul_(nn.functional.embedding(ids, self.weight_scale))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
