"""The transformers model inside of another object: of a LightningModule, or of a sentence-transformers model."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def transformers_part(model: nn.Module) -> str | None:
    """The name of the one transformers model that `model`, a LightningModule say, is built around.

    None if it is one itself, has none or several, or has parameters beside it.
    """
    if isinstance(model, PreTrainedModel):
        return None
    names = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(names) != 1 or any(not name.startswith(f"{names[0]}.") for name in model.state_dict()):
        return None
    return names[0]


def sentence_transformer(model: Any) -> PreTrainedModel | None:
    """The transformers model of a SentenceTransformer, CrossEncoder or SparseEncoder; None of anything else.

    Its other modules (pooling, dense, normalize) are small, and stay as they are.
    """
    found = getattr(model, "transformers_model", None)
    return found if isinstance(found, PreTrainedModel) and found is not model else None
