"""Sparse embedding: a weight for each token of the vocabulary, most of them zero (SPLADE, Formal et al. 2021)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...source.sentence_model import load_head, read_sentence_model
from ..base import Outputs
from .sentence_embedding import SentenceEmbedding, all_vectors

if TYPE_CHECKING:
    from torch import nn

_TOKENS = 2048  # rows x length at a time: each token has a logit for every token of the vocabulary


class SparseEmbedding(SentenceEmbedding):
    """As sentence embedding, of a masked language model whose logits are pooled."""

    name = "sparse-embedding"
    auto_class = "AutoModelForMaskedLM"
    pipeline_tag = "feature-extraction"
    other_tags: ClassVar[Sequence[str]] = ("sentence-similarity",)
    settings: ClassVar[Sequence[str]] = ("prompt",)
    kind: ClassVar[str] = "SparseEncoder"
    stable_agreement: ClassVar[float] = 0.95  # dimensions that are nearly zero come and go
    default_similarity: ClassVar[str] = "dot"

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        return False

    @classmethod
    def claims(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        found = read_sentence_model(folder)
        return found is not None and (found.kind == cls.kind or found.has("SpladePooling"))

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Mean overlap of the active dimensions of the same text: those of both, as a share of those of either."""
        a, b = (all_vectors(rows) > 0 for rows in (outputs, others))
        either = (a | b).sum(1).double()
        return torch.where(either > 0, (a & b).sum(1) / either.clamp(min=1), 1.0).mean().item()

    def vectors(self, model: "nn.Module", inputs: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        return torch.cat([SentenceEmbedding.vectors(self, model, *part) for part in _parts(inputs, mask)])

    def head_of(self, folder: Path) -> "list[nn.Module]":
        if self.source is None:
            raise UsageError(
                f"{folder.name} has no modules.json, by which sentence-transformers knows a sparse encoder."
            )
        return load_head(folder, self.source)


def _parts(inputs: Mapping[str, Tensor], mask: Tensor) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
    size = max(1, _TOKENS // mask.shape[1])
    for start in range(0, len(mask), size):
        yield {name: rows[start : start + size] for name, rows in inputs.items()}, mask[start : start + size]
