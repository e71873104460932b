"""The stage `--recover`: from the best static plan that missed the goal to weights and scales that were trained for it."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..common.copies import deep_copy
from ..common.ui import Reporter
from ..data.session import Session, calibration_inputs
from ..measure.compare import evaluate_split
from ..ptq.convert import quantize_model
from ..ptq.scheme import Plan
from ..runtime.fusion.fuse import fuse
from ..tuning.goal import Goal
from .distillation import Schedule, distill
from .fake_quantization import fake_quantize, learned, train_what_is_rounded
from .record import Look, Recovery

STATE = "recovery.safetensors"
PATIENCE = 4  # looks without a better score, after which training ends


class Recovered(NamedTuple):
    """The float model that was trained, what it learned, and what is said of it."""

    model: nn.Module
    plan: Plan
    record: Recovery


def recover(session: Session, plan: Plan, goal: Goal, *, before: float, work: Path, ui: Reporter) -> Recovered:
    """Fine-tune the session's model as `plan` quantizes it; the session's model is the teacher, and stays as it is.

    `work`: a folder for what an interrupted training goes on from.
    """
    examples = len(session.data.training or ())
    ui.stage(f"Recovery: fine-tuning on {examples} examples of {session.data.info.calibration_split!r}, without labels")
    student = deep_copy(session.model)
    for parameter in student.parameters():
        parameter.data = parameter.data.clone()
    fake_quantize(student, plan)
    train_what_is_rounded(student, plan)
    looks: list[Look] = []

    def look(steps: int, loss: float) -> bool:
        score = _score(session, *learned(student, session.model, plan))
        looks.append(Look(steps, loss, score))
        ui.note(f"step {steps}: loss {loss:.4f}, {session.metric} {score:.4f}")
        return goal.met(score) or _stalls([-goal.loss(seen.score) for seen in looks])

    schedule = Schedule(seed=session.recipe.seed)
    batches = calibration_inputs(session, session.training)
    distill(student, session.model, batches, schedule=schedule, look=look, state=work / STATE)
    record = Recovery(session.data.info.calibration_split, examples, before, looks)
    return Recovered(*learned(student, session.model, plan), record)


def _stalls(scores: list[float]) -> bool:
    """Whether the last looks brought nothing better."""
    return len(scores) > PATIENCE and max(scores[-PATIENCE:]) <= max(scores[:-PATIENCE])


def _score(session: Session, model: nn.Module, plan: Plan) -> float:
    quantized = quantize_model(model, plan, ())
    fuse(quantized)
    return evaluate_split(session, quantized, session.evaluation, session.data.evaluation).score
