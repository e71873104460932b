"""The examples that int8 answers otherwise than the float model, and the layer that makes each flip."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..data.session import Session, answers
from ..ptq.convert import quantize_model
from ..ptq.scheme import Plan
from ..tasks.base import Batch, Outputs
from ..tuning.candidates import Space
from .errors import alone
from .explanation import Flip

MOST = 12  # examples that are traced to a layer


@dataclass(frozen=True)
class Pair:
    """What both models put out for the evaluation split."""

    floats: Outputs
    int8: Outputs


def margins(session: Session, pair: Pair) -> Tensor | None:
    """`[examples]`: by how much the float model's answer is ahead in int8; None where answers are no choice."""
    return session.task.margins(pair.floats, pair.int8)


def flips(
    session: Session,
    space: Space,
    plan: Plan,
    pair: Pair,
    *,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> tuple[list[Flip], int | None]:
    """The flipped examples with the largest float margin, traced, and how many flipped in all.

    Where answers are no choice: those whose outputs moved most, and None.
    """
    task = session.task
    lead = margins(session, pair)
    own = task.margins(pair.floats, pair.floats)
    if lead is None or own is None:
        order = _distance(pair.floats, pair.int8).argsort(descending=True)[:MOST].tolist()
        flipped = None
    else:
        rows = (lead < 0).nonzero().flatten().tolist()
        flipped = len(rows)
        order = sorted(rows, key=lambda row: own[row].item(), reverse=True)[:MOST]
    if not order:
        return [], flipped
    few = Pair([pair.floats[row] for row in order], [pair.int8[row] for row in order])
    batches = [_collated(session, order)]
    lost = _lost(session, few.floats, few.int8)
    by_layer = {
        name: _lost(session, few.floats, answers(alone(space, plan, name), batches, task=task))
        for name in track([*plan.layers, *plan.embeddings])
    }
    names = list(by_layer)
    culprits = [names[i] for i in torch.stack(list(by_layer.values())).argmax(0).tolist()]
    mended = _mended(session, space, plan, few, culprits, batches)
    rights = task.per_example(pair.floats, session.data.evaluation.references) if session.judge.of_labels else None
    found = []
    for place, (row, name) in enumerate(zip(order, culprits, strict=True)):
        margin = None if own is None else own[row].item()
        found.append(
            Flip(
                row=session.data.evaluation.rows[row],
                margin=margin,
                moved=lost[place].item(),
                layer=name,
                alone=margin is not None and by_layer[name][place].item() > margin,
                mended=mended[place],
                was_right=None if rights is None else bool(rights[row]),
                text=task.excerpt(session.data.evaluation.encodings[row], session.data.processor),
            )
        )
    return found, flipped


def _mended(
    session: Session, space: Space, plan: Plan, few: Pair, culprits: Sequence[str], batches: Sequence[Batch]
) -> list[bool]:
    """Whether each example is answered as by the float model once its layer alone is float."""
    found = [False] * len(culprits)
    for name in dict.fromkeys(culprits):
        outputs = answers(_without(space, plan, name), batches, task=session.task)
        lead = session.task.margins(few.floats, outputs)
        for place in (place for place, culprit in enumerate(culprits) if culprit == name and lead is not None):
            assert lead is not None
            found[place] = lead[place].item() >= 0
    return found


def _without(space: Space, plan: Plan, name: str) -> nn.Module:
    """The int8 model with one layer in float."""
    tied = space.layers.tied.get(name, (name,))
    layers = {other: scheme for other, scheme in plan.layers.items() if other != name}
    embeddings = tuple(other for other in plan.embeddings if other not in tied)
    return quantize_model(space.model, replace(plan, layers=layers, embeddings=embeddings), space.folds)


def _lost(session: Session, floats: Outputs, others: Outputs) -> Tensor:
    """`[examples]`: what the float answer's margin loses; without margins, the distance of the outputs."""
    own, lead = session.task.margins(floats, floats), session.task.margins(floats, others)
    return _distance(floats, others) if own is None or lead is None else own - lead


def _distance(floats: Outputs, others: Outputs) -> Tensor:
    """float32 `[examples]`: squared difference of the outputs, relative to the mean square of the float model's."""
    squares = torch.stack([output.float().square().mean() for output in floats if output.numel()])
    moved = [
        (b.float() - a.float()).square().mean() if a.shape == b.shape and a.numel() else a.new_zeros(())
        for a, b in zip(floats, others, strict=True)
    ]
    return torch.stack(moved) / squares.mean().clamp(min=1e-30)


def _collated(session: Session, order: Sequence[int]) -> Batch:
    encodings = session.data.evaluation.encodings
    return session.task.collate([encodings[row] for row in order], session.data.processor)
