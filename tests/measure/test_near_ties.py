"""Which answers of another order of summation are near ties, and which are another model's."""

import torch
from torch import Tensor

from hfq.measure.compare import near_ties
from hfq.tasks.text.text_classification import TextClassification

TASK = TextClassification({"id2label": {"0": "no", "1": "yes"}})
EXAMPLES = 1000


def logits(*, moved: float, of: Tensor | None = None, seed: int = 0) -> Tensor:
    """Logits `[examples, 2]` of all margins, or `of` others moved by chance."""
    noise = torch.randn(EXAMPLES, 2, generator=torch.Generator().manual_seed(seed))
    return noise if of is None else of + moved * noise


FLOATS = logits(moved=0)
OURS = logits(moved=0.1, of=FLOATS, seed=1)


def lacking(stock: Tensor) -> tuple[float, float]:
    """What stock's answers lack of agreement, and how much of that is near ties."""
    floats, ours, others = (list(rows) for rows in (FLOATS, OURS, stock))
    return 1 - TASK.fidelity(others, ours), near_ties(TASK, floats, ours, others)


def test_what_rounding_flips_is_a_near_tie() -> None:
    lacks, near = lacking(logits(moved=0.05, of=OURS, seed=2))
    assert lacks > 0.01
    assert near > 0.9 * lacks


def test_a_fault_in_some_examples_is_none() -> None:
    stock = logits(moved=0.001, of=OURS, seed=2)
    stock[::25] = -stock[::25]
    lacks, near = lacking(stock)
    assert lacks > 0.03
    assert near < 0.01


def test_what_rounds_as_far_from_the_float_model_another_way_is_a_near_tie() -> None:
    lacks, near = lacking(logits(moved=0.1, of=FLOATS, seed=2))
    assert lacks > 0.03
    assert near > 0.9 * lacks


def test_nothing_is_where_more_moves_than_int8_moved() -> None:
    lacks, near = lacking(logits(moved=0.5, of=OURS, seed=2))
    assert lacks > 0.05
    assert near == 0
