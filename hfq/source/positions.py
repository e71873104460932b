"""How long a text a model takes, asked of its own position embedding, and whether it answers texts of several lengths."""

from typing import Any

import torch
from torch import Tensor, nn

from .bounds import bounded
from .checkpoint import Checkpoint

_SLACK = 8  # rows that a table of positions has beside those of the tokens; a table of anything else differs by more


def make_skeleton(
    checkpoint: Checkpoint, auto_class: str, *, trust_remote_code: bool, **changes: Any
) -> nn.Module | None:
    """The model of a checkpoint without its weights; None where it cannot be made, which loading it will explain.

    `changes`: to its config.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=trust_remote_code, **changes
        )
        with torch.device("meta"), bounded(checkpoint):
            model = getattr(transformers, auto_class).from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # transformers raises many types
        return None
    return model.eval()


def most_tokens(model: nn.Module) -> int | None:
    """The tokens that a model has positions for: without the rows of its table that padding or an offset takes.

    None where it says no limit, as models of relative positions may.
    """
    said = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(said, int) or said < 1:
        return None
    tables = [module for name, module in model.named_modules() if "position" in name.rpartition(".")[2]]
    return min([said, *filter(None, (_tokens(table, said) for table in tables))])


def lacks_padding(checkpoint: Checkpoint, auto_class: str, *, trust_remote_code: bool, padding: int) -> bool:
    """Whether a model can answer a batch only once its config has `padding` as pad_token_id, which it does not have."""
    if checkpoint.config.get("pad_token_id") is not None:
        return False
    works = [
        _answers(make_skeleton(checkpoint, auto_class, trust_remote_code=trust_remote_code, **changes))
        for changes in ({}, {"pad_token_id": padding})
    ]
    return works == [False, True]


def _tokens(table: nn.Module, said: int) -> int | None:
    weight = getattr(table, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or abs(len(weight) - said) > _SLACK:
        return None
    padding, offset = getattr(table, "padding_idx", None), getattr(table, "offset", 0)
    return len(weight) - (0 if padding is None else padding + 1) - (offset if isinstance(offset, int) else 0)


def _answers(model: nn.Module | None) -> bool:
    """Whether a batch gets as far as a model without numbers can be taken."""
    if model is None:
        return False
    try:
        model(input_ids=torch.ones(2, 4, dtype=torch.long, device="meta"))
    except Exception as error:  # whatever its code does without the id
        return "meta tensor" in str(error)
    return True
