"""A sentence-transformers model as `fit` sees it: the transformers model inside is quantized, the rest stays around it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..common.copies import deep_copy
from .inputs import LABELS

ENCODED = "input_ids"


def around(part: nn.Module, whole: nn.Module, *, instead_of: nn.Module) -> Any:
    """A copy of `whole` with `part` where it has the module `instead_of`."""
    return deep_copy(whole, shared={id(instead_of): part})


def run_all(model: Any, dataloader: Iterable[Any]) -> None:
    """Run a SentenceTransformer, SparseEncoder or CrossEncoder on each batch.

    A batch is texts; columns of texts, as a dict or as torch's DataLoader puts rows together, maybe with labels; pairs
    of texts; or what the model's `preprocess` answers.

    Raises:
        TypeError: there is no text in a batch.
    """
    for batch in dataloader:
        if isinstance(batch, Mapping) and isinstance(batch.get(ENCODED), Tensor):
            model({name: value for name, value in batch.items() if name not in LABELS})
            continue
        texts = list(_inputs(batch, pairs=not hasattr(model, "encode")))
        if not texts:
            raise TypeError(
                f"A batch for a {type(model).__name__} is a {type(batch).__name__} without texts. Yield lists of texts, "
                "dicts of such lists, or what its `preprocess` answers."
            )
        run = model.encode if hasattr(model, "encode") else model.predict
        run(texts, batch_size=len(texts), show_progress_bar=False)


def _inputs(batch: Any, *, pairs: bool) -> Iterator[Any]:
    """What `encode` takes, texts; or, as `predict` does, pairs of them."""
    if isinstance(batch, str):
        yield batch
        return
    columns = [column for column in (batch.values() if isinstance(batch, Mapping) else batch) if _is_texts(column)]
    if not columns and not isinstance(batch, Mapping):  # the batch is one column itself
        yield from (text for text in batch if isinstance(text, str))
    elif not pairs:
        yield from (text for column in columns for text in column)
    elif isinstance(batch, Mapping) or len(columns) == 2 != len(columns[0]):
        yield from zip(*columns, strict=False)
    else:
        yield from columns  # rows


def _is_texts(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], str)
