"""Evaluating a candidate on as many examples as its verdict takes: in looks, after each of which a test may end it.

Examples are in random order, look by look, so those that were seen are a sample of the split and of what the split is a
sample of. The test bets (`hfq.measure.certainty`), and may be looked at as often as one likes: by Ville's inequality no
wealth ever exceeds 1 / p with more than a probability of p. Of a split that is finite, from which nothing is drawn twice,
that holds for each look by itself (Joag-Dev and Proschan 1983: such draws are negatively associated), so that the looks
share the level there.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from ..data.session import Session
from ..tasks.base import Outputs
from ..tuning.goal import Goal
from .certainty import Claim, claim
from .compare import evaluate_split
from .evaluate import Evaluation

SURE = 0.001  # the probability, of all looks together, that the whole split would say otherwise where its score decides


@dataclass(frozen=True)
class Looked:
    """`outputs` of the examples that were seen. Of the whole split: `score`, the float model's there and the difference of both on what was
    seen; and `duration_s`, in proportion. `claim`: what was seen says of the goal; None where the score decides it.
    """

    score: float
    duration_s: float
    outputs: Outputs
    claim: Claim | None = None


def evaluate_until_decided(
    session: Session, model: nn.Module, baseline: Evaluation, *, goal: Goal, trial: int | None
) -> Looked:
    """Look at examples until they decide, or there are no more. `baseline`: the float model's evaluation, of all of them.

    `trial`: its number among those on this split; None where that is not known, and then no confidence is claimed before
    the end.
    """
    examples, size, judge = session.data.evaluation, session.recipe.batch_size, session.judge
    ends = examples.looks or [len(examples)]
    level = 1 - goal.confidence if goal.confidence else SURE / len(ends)
    outputs: list[Tensor] = []
    seconds = 0.0
    for start, end in pairwise([0, *ends]):
        part = evaluate_split(
            session, model, session.evaluation[start // size : -(-end // size)], examples.part(start, end)
        )
        outputs.extend(part.outputs)
        seconds += part.duration_s
        references = examples.references[:end]
        before, after = (
            Evaluation(judge.score(rows, references), rows, 0.0) for rows in (baseline.outputs[:end], outputs)
        )
        said = None
        if end < ends[-1] or goal.confidence:
            said = claim(judge, (before, after), references, goal=goal, level=level, seed=session.recipe.seed)
        if said is None or end == ends[-1] or decided(said, goal, level=level, trial=trial):
            break
    score = after.score + (baseline.score - before.score)
    return Looked(score, seconds * len(examples) / end, outputs, said if goal.confidence else None)


def decided(said: Claim, goal: Goal, *, level: float, trial: int | None) -> bool:
    """Whether more examples would not change a verdict: that too much is lost or, by the level, that it is not."""
    if said.for_ <= level:
        return True
    if goal.confidence:
        return trial is not None and goal.proved(said.against, trial=trial)
    return said.against <= level
