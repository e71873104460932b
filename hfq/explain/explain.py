"""Put an explanation together: of the plain static int8 of a float checkpoint, or of an exported int8 one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from ..common.ui import Reporter
from ..data.session import Session, calibration_inputs, open_session
from ..measure.compare import evaluate_float, evaluate_split, goal_of
from ..measure.evaluate import Evaluation
from ..ptq.calibration import encoder_output
from ..ptq.convert import quantize_model
from ..ptq.inputs import Batch, count, spread
from ..ptq.layers import weight_rows
from ..ptq.observers import OBSERVERS
from ..ptq.scheme import LayerScheme, Plan, quantize_rows
from ..recipe import Recipe, command
from ..runtime.fusion.fuse import fuse
from ..source.checkpoint import Checkpoint
from ..source.model import load_model
from ..tuning.candidates import Candidate, Space
from ..tuning.goal import Goal
from ..tuning.options import Options, rules_of
from ..tuning.tuner import Calibration, prepare
from .activations import mapping_of, token_peaks
from .errors import effects, embedding_error
from .explanation import Activations, Advice, Explanation, LayerCause
from .exported import plan_of
from .flips import Pair, flips
from .remedies import NOW, WEIGHTS, advised, measured, remedies

SLICE = 16  # calibration examples on which layers are compared: the model runs once for each layer
SHARE = 0.8  # of all effects, which those layers have that are to be mended
VISIBLE = 1e-4  # of an effect: what is less changes no answer
STANDING_OUT = 30.0  # times the middle effect: such a layer is to be mended also where the goal is met
PLAIN = Candidate("static")


@dataclass(frozen=True)
class Case:
    """What is explained: a plan for the float model of a session, and what both put out for the evaluation split."""

    session: Session
    space: Space
    plan: Plan
    name: str
    floats: Evaluation
    int8: Evaluation


def explain_checkpoint(
    recipe: Recipe, *, recipes: Path, ui: Reporter, token: str | None = None, exported: Checkpoint | None = None
) -> Explanation:
    """Explain the plain static int8 of a recipe's float checkpoint; `exported`: what was made of it instead.

    Raises:
        HfqError: the checkpoint or the dataset cannot be used.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    session = open_session(recipe, recipes=recipes, ui=ui, token=token)
    rules = rules_of(recipe.layers, session.model)
    ui.stage("FP32")
    floats = evaluate_float(session, session.evaluation, session.data.evaluation)
    ui.note(f"{session.metric} {floats.score:.4f}")
    ui.stage(f"Calibration on {len(session.data.calibration)} examples")
    batches = calibration_inputs(session, session.calibration)
    space = prepare(session.model, Calibration(batches), options=Options(rules=rules), ui=ui)
    if exported is None:
        name, plan = PLAIN.name, space.plan(PLAIN)
    else:
        loaded = load_model(exported, session.task.auto_class, trust_remote_code=recipe.trust_remote_code)
        if space.rotation is not None and space.rotation.was_applied(loaded, session.model):
            space = space.rotated
        name, plan = exported.info.id, plan_of(loaded, space.model, space.folds)
    ui.stage(f"INT8: {name}")
    int8 = _evaluated(session, space, plan)
    ui.note(f"{session.metric} {int8.score:.4f}")
    return explain(Case(session, space, plan, name, floats, int8), ui=ui)


def explain(case: Case, *, ui: Reporter) -> Explanation:
    """Why the int8 model of a plan differs from the float one. The model runs once for each layer, on few examples."""
    session, space, plan = case.session, case.space, case.plan
    goal = goal_of(session, case.floats)
    few = spread(space.batches, SLICE)
    ui.stage(f"Each layer alone, on {sum(map(count, few))} examples")
    found = effects(space, plan, few, track=lambda names: ui.track(names, text="layers"))
    met = goal.met(case.int8.score)
    causes = _causes(space, plan, few, found)
    mend = _to_mend(causes, met=met)
    causes = [replace(cause, advice=advised(cause)) if cause.layer in mend else cause for cause in causes]
    ui.stage("Examples that are answered otherwise")
    pair = Pair(case.floats.outputs, case.int8.outputs)
    traced, flipped = flips(session, space, plan, pair, track=lambda names: ui.track(names, text="layers"))
    if flipped is not None:
        ui.note(f"{flipped} of {len(pair.floats)} flip")
    info, judge = session.data.info, session.judge
    return Explanation(
        checkpoint=session.checkpoint.info.id,
        candidate=case.name,
        metric=session.metric,
        metric_label=judge.label,
        split=info.split,
        examples=info.examples,
        baseline=case.floats.score,
        score=case.int8.score,
        threshold=goal.threshold,
        higher_is_better=judge.higher_is_better,
        met=met,
        error=_error(space, plan, few),
        slice_examples=sum(map(count, few)),
        layers=causes,
        flips=traced,
        flipped=flipped,
        advice=_advice(case, causes, few, goal, ui=ui),
    )


def _causes(space: Space, plan: Plan, few: Sequence[Batch], effect: Mapping[str, float]) -> list[LayerCause]:
    worst = sorted(effect, key=effect.__getitem__, reverse=True)
    folded = space.rescaled(plan.smoothing)
    errors = measured(space, plan, folded, few, worst=worst)
    seen = mapping_of(space.statistics, token_peaks(space.model, [*plan.layers], few), plan.layers)
    return [_cause(space, plan, name, effect[name], errors.get(name, {}), seen.get(name)) for name in worst]


def _cause(
    space: Space, plan: Plan, name: str, effect: float, errors: Mapping[str, float], seen: Activations | None
) -> LayerCause:
    if name not in plan.layers:
        layer = space.model.get_submodule(name)
        error = embedding_error(space.model, name, quantize_rows(weight_rows(layer)))
        return LayerCause(name, "embedding", error, error, effect, None, remedies({}, LayerScheme("weight-only")))
    scheme = plan.layers[name]
    return LayerCause(name, scheme.approach, errors[NOW], errors[WEIGHTS], effect, seen, remedies(errors, scheme))


def _to_mend(causes: Sequence[LayerCause], *, met: bool) -> set[str]:
    """The layers that stand out; where the goal is missed, at least so many that they have most of all effects."""
    effects = [cause.effect for cause in causes]
    standing_out = max(VISIBLE, STANDING_OUT * median(effects))
    left, names = SHARE * sum(effects), set()
    for cause in causes:
        if cause.effect >= standing_out or (not met and left > 0):
            names.add(cause.layer)
            left -= cause.effect
    return names


def _advice(
    case: Case, causes: Sequence[LayerCause], few: Sequence[Batch], goal: Goal, *, ui: Reporter
) -> Advice | None:
    """The remedies of the layers that are to be mended, tried together; None where nothing is lost."""
    layers: dict[str, list[str]] = {}
    for cause in causes:
        if cause.advice:
            layers.setdefault(cause.advice, []).append(cause.layer)
    if not layers:
        return None
    ui.stage("What would mend it, together")
    session, space = case.session, case.space
    plan = _mended(space, case.plan, layers)
    score = _evaluated(session, space, plan).score
    ui.note(f"{session.metric} {score:.4f}")
    recipe = session.recipe
    named = {how: [*recipe.layers.get(how, []), *layers.get(how, [])] for how in [*recipe.layers, *layers]}
    wanted = recipe.model_copy(update={"layers": named})
    return Advice(layers, _error(space, plan, few), score, goal.met(score), command("hfq quantize", wanted))


def _mended(space: Space, plan: Plan, layers: Mapping[str, Sequence[str]]) -> Plan:
    """`plan` where layers run as they are said to."""
    schemes = dict(plan.layers)
    float_embeddings: set[str] = set()
    for how, names in layers.items():
        for name in names:
            if how == "float":
                schemes.pop(name, None)
                float_embeddings.update(space.layers.tied.get(name, (name,)))
            elif how in OBSERVERS:
                schemes[name] = LayerScheme.static(OBSERVERS[how](space.statistics[name]))
            else:
                schemes[name] = LayerScheme("dynamic")
    embeddings = tuple(name for name in plan.embeddings if name not in float_embeddings)
    return replace(plan, layers=schemes, embeddings=embeddings)


def _evaluated(session: Session, space: Space, plan: Plan) -> Evaluation:
    quantized = quantize_model(space.model, plan, space.folds)
    fuse(quantized)
    return evaluate_split(session, quantized, session.evaluation, session.data.evaluation)


def _error(space: Space, plan: Plan, few: Sequence[Batch]) -> float:
    reference = encoder_output(space.model, few)
    return encoder_output(quantize_model(space.model, plan, space.folds), few).error(reference)
