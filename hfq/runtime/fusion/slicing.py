"""Ragged and large batches in slices: rows of like length run together, and nobody computes another row's padding.

A row's output does not depend on the rows beside it, so a classifier may take its batch in parts. A slice's
activations stay in cache, and the peak of memory is a slice's and not the batch's. Nor does it depend on its padding in
most models; which, `hfq.runtime.fusion.flow` finds out, and others keep it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...common.memory import LargestInput
from ..inputs import takes_numbers
from ..int8.known_forward import FusedForward, KnownForward
from .planning import Plans

MOST_TOKENS = 1024  # rows x length of a slice
MOST_TOKENS_IN_TILES = 2048  # with AMX, where matmuls are over so soon that what is between them counts
WASTE = 8  # one token in so many may be padding, which costs less than one more forward
KEYS = 16  # torch's attention takes as long for the 15 keys beyond a multiple of these as for the 64 before them
TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def slice_batches(model: nn.Module, known: KnownForward | None = None) -> None:
    """Let `model` take its batches in slices where it returns one row of logits for each of them."""
    if "forward" not in model.__dict__:
        model.forward = SlicedForward(model, known or KnownForward())
        model.forward.look_again()


def row_lengths(attention_mask: Tensor) -> Tensor:
    """Integers `[batch]`: tokens up to the last that counts. `attention_mask`: `[batch, length]`, 0 for padding."""
    positions = torch.arange(1, attention_mask.shape[1] + 1)
    return (attention_mask.ne(0) * positions).amax(1)


def by_length(
    encodings: Mapping[str, Sequence[Any]], tokenizer: Any, *, most_tokens: int | None = None
) -> Iterator[tuple[list[int], Any]]:
    """Batches of rows of like length, shortest first, each with the numbers of its rows: for any model, int8 or float.

    Args:
        encodings: what `tokenizer(texts, truncation=True)` returns, unpadded; or columns of a dataset, `rows[:]`.
        tokenizer: pads each batch to its own longest row.
        most_tokens: rows x length of a batch, padding included. A row that is longer has a batch of its own. By default
            what suits this CPU: 1024, or 2048 with AMX.

    Example:
        >>> encodings = tokenizer(texts, truncation=True)
        >>> logits = torch.empty(len(texts), model.config.num_labels)
        >>> for rows, batch in hfq.by_length(encodings, tokenizer):
        ...     logits[rows] = model(**batch).logits  # in the order of `texts`
    """
    columns = dict(encodings)
    for rows in slices([len(ids) for ids in columns["input_ids"]], most_tokens):
        batch = {name: [values[row] for row in rows] for name, values in columns.items()}
        yield rows, tokenizer.pad(batch, return_tensors="pt")


def slices(lengths: list[int], most_tokens: int | None = None) -> list[list[int]]:
    """Rows of each slice, given the rows' lengths: ascending, at most `most_tokens` and little padding in each."""
    most_tokens = most_tokens or tokens_at_once()
    found: list[list[int]] = []
    longest = waste = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[row]
        if found:
            waste += (length - longest) * len(found[-1])
        if not found or waste > most_tokens // WASTE or (len(found[-1]) + 1) * length > most_tokens:
            found.append([])
            waste = 0
        found[-1].append(row)
        longest = length
    return found


@functools.cache
def tokens_at_once() -> int:
    """Rows x length of a slice on this CPU."""
    return MOST_TOKENS_IN_TILES if torch.cpu.get_capabilities().get("amx_int8") else MOST_TOKENS


def is_token_batch(inputs: dict[str, Any]) -> bool:
    """Whether these are plain tokens: ids `[batch, length]`, and nothing but what goes with each of them."""
    if any(name not in TOKENS or not isinstance(value, Tensor) for name, value in inputs.items()):
        return False
    ids = inputs.get("input_ids")
    return ids is not None and all(value.dim() == 2 and value.shape == ids.shape for value in inputs.values())


def in_parts(batch: Mapping[str, Any], *, tokens: int = MOST_TOKENS) -> Iterator[Mapping[str, Any]]:
    """A batch of plain tokens in parts of at most so many, with the padding it has; any other as it is."""
    if not is_token_batch(dict(batch)):
        yield batch
        return
    rows, length = batch["input_ids"].shape
    size = max(1, tokens // max(1, length))
    for start in range(0, rows, size):
        yield {name: value[start : start + size] for name, value in batch.items()}


class SlicedForward(FusedForward):
    """A model's `forward` that runs another one on one slice after the other."""

    kept = ("cuts_padding",)

    def __init__(self, model: nn.Module, known: KnownForward) -> None:
        super().__init__(model, known)
        self._largest = LargestInput()
        self.plans: Plans | None = None
        self.whole = False  # the model returns a form that cannot be put together
        self.cuts_padding = False

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if args or self.model.training or not is_token_batch(kwargs):
            return forward(*args, **kwargs)
        if self.plans is not None and forward is self.forward and self.known.runs_directly:
            forward = functools.partial(self._planned, forward)
        if self.whole:
            return forward(**kwargs)
        mask = kwargs.get("attention_mask")
        rows, length = kwargs["input_ids"].shape
        lengths = [length] * rows if mask is None or not self.cuts_padding else _kept_lengths(mask)
        parts = slices(lengths)
        uncut = len(parts) < 2 and max(lengths, default=length) == length
        with self._largest.of(min(rows * length, tokens_at_once())):
            return forward(**kwargs) if uncut else self._in_parts(forward, kwargs, lengths, parts)

    def _planned(self, forward: Callable[..., Any], **inputs: Tensor) -> Any:
        assert self.plans is not None
        return self.plans(forward, inputs)

    def _in_parts(
        self, forward: Callable[..., Any], inputs: dict[str, Tensor], lengths: list[int], parts: list[list[int]]
    ) -> Any:
        logits: Tensor | None = None
        for part_rows in parts:
            index = torch.tensor(part_rows)
            longest = max(1, lengths[part_rows[-1]])
            outputs = forward(**{name: value[index, :longest] for name, value in inputs.items()})
            part = outputs.get("logits") if isinstance(outputs, dict) and len(outputs) == 1 else None
            if part is None or part.dim() != 2:
                self.whole = True
                return forward(**inputs)
            if logits is None:
                logits = part.new_empty(len(lengths), part.shape[1])
            logits[index] = part
        outputs["logits"] = logits
        return outputs

    def is_plain(self, *args: Any, **kwargs: Any) -> bool:
        are_numbers = takes_numbers(self.model) and kwargs.keys() == {self.model.main_input_name}
        return not args and (are_numbers or is_token_batch(kwargs)) and not self.model.training


def _kept_lengths(mask: Tensor) -> list[int]:
    """What is left of each row without the padding that is worth cutting off."""
    lengths = -(-row_lengths(mask) // KEYS) * KEYS
    found: list[int] = lengths.clamp(max=mask.shape[1]).tolist()
    return found
