"""The stage `--recover`: from the best static plan that missed the goal to weights and scales that were trained for it."""

from typing import NamedTuple

from torch import nn

from ..common.copies import deep_copy
from ..common.names import RECOVERY_FILE
from ..common.ui import Reporter
from ..data.session import Session, calibration_inputs
from ..measure.certainty import claim
from ..measure.compare import evaluate_split
from ..measure.evaluate import Evaluation
from ..ptq.convert import quantize_model
from ..ptq.scheme import Plan
from ..runtime.fusion.fuse import fuse
from ..tuning.goal import Goal
from ..tuning.log import TrialLog
from ..tuning.trial import Look
from .distillation import Schedule, distill
from .fake_quantization import fake_quantize, learned, train_what_is_rounded

PATIENCE = 4  # looks without a better score, after which training ends


class Recovered(NamedTuple):
    """The float model that was trained, and what it learned."""

    model: nn.Module
    plan: Plan


def recover(
    session: Session, plan: Plan, goal: Goal, *, baseline: Evaluation, log: TrialLog, ui: Reporter
) -> Recovered:
    """Fine-tune the session's model as `plan` quantizes it; the session's model is the teacher, and stays as it is.

    `baseline`: its evaluation. `log`: of the run, beside which lies what an interrupted training goes on from.
    """
    examples = len(session.data.training or ())
    ui.stage(f"Recovery: fine-tuning on {examples} examples of {session.data.info.calibration_split!r}, without labels")
    student = deep_copy(session.model)
    for parameter in student.parameters():
        parameter.data = parameter.data.clone()
    fake_quantize(student, plan)
    train_what_is_rounded(student, plan)

    def look(steps: int, loss: float) -> bool:
        found = _evaluated(session, *learned(student, session.model, plan))
        log.look(Look(steps, loss, found.score))
        ui.note(f"step {steps}: loss {loss:.4f}, {session.metric} {found.score:.4f}")
        accepted = _is_accepted(session, goal, (baseline, found), trial=log.judged + 1)
        return accepted or _stalls([-goal.loss(seen.score) for seen in log.looks])

    schedule = Schedule(seed=session.recipe.seed)
    batches = calibration_inputs(session, session.training)
    distill(student, session.model, batches, schedule=schedule, look=look, state=log.path.with_name(RECOVERY_FILE))
    return Recovered(*learned(student, session.model, plan))


def _is_accepted(session: Session, goal: Goal, pair: tuple[Evaluation, Evaluation], *, trial: int) -> bool:
    """Whether the trial with that number would meet the goal, as surely as is asked for."""
    if not goal.met(pair[1].score) or goal.confidence is None:
        return goal.met(pair[1].score)
    said = claim(
        session.judge,
        pair,
        session.data.evaluation.references,
        goal=goal,
        level=1 - goal.confidence,
        seed=session.recipe.seed,
    )
    return goal.proved(said.against, trial=trial)


def _stalls(scores: list[float]) -> bool:
    """Whether the last looks brought nothing better."""
    return len(scores) > PATIENCE and max(scores[-PATIENCE:]) <= max(scores[:-PATIENCE])


def _evaluated(session: Session, model: nn.Module, plan: Plan) -> Evaluation:
    quantized = quantize_model(model, plan, ())
    fuse(quantized)
    return evaluate_split(session, quantized, session.evaluation, session.data.evaluation)
