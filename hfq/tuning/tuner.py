"""Calibrate a session's model, rank the candidates, and run the trials."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..export import export
from ..measurement import compare_with_stock
from ..quantization.calibration import calibrate, encoder_output, sensitivity
from ..quantization.convert import int8_linear, quantize_model
from ..quantization.graph import find_folds
from ..quantization.layers import find_quantizable, linear
from ..quantization.observers import OBSERVERS
from ..quantization.scheme import Plan
from ..report import Trial
from ..runtime.fusion import fuse
from ..session import Session
from ..source import pull
from ..ui import Reporter
from .acceptance import Goal
from .candidates import Candidate, Space
from .log import TrialLog
from .search import Limits, Outcome, Score, rank, strategy, tune


@dataclass(frozen=True)
class Found:
    """What the search ended with. `plan` is the outcome's, in `space`."""

    space: Space
    outcome: Outcome
    plan: Plan


def find(session: Session, goal: Goal, *, log: TrialLog, ui: Reporter) -> Found:
    """Search for a plan that meets `goal`. The float model is read, never changed."""
    recipe, model = session.recipe, session.model
    inputs = [_inputs(batch) for batch in session.calibration]
    ui.stage(f"Calibration on {len(session.data.calibration)} examples of {session.data.info.calibration_split!r}")
    space = _calibrate(session, inputs, ui)
    output_error = _output_error(session, space, inputs, log=log)
    ui.stage("Ranking by output error on the calibration slice")
    errors = rank(recipe.approach, list(OBSERVERS), output_error, can_smooth=bool(space.folds))
    for candidate, error in errors.items():
        ui.note(f"{candidate.name:<40} {error:.2e}")

    def sensitive(candidate: Candidate) -> list[str]:
        linears = space.plan(replace(candidate, alpha=None)).linears  # the float model's inputs are not smoothed
        twins = {name: int8_linear(linear(model, name), scheme) for name, scheme in linears.items()}
        found = sensitivity(model, twins, inputs)
        return sorted(found, key=found.__getitem__, reverse=True)

    def run_trial(candidate: Candidate) -> Score:
        plan = space.plan(candidate)
        quantized = quantize_model(model, plan, space.folds)
        fuse(quantized)  # evaluate what will be loaded
        found = session.evaluate(quantized, session.evaluation)
        if not goal.met(found.score):
            return Score(found.score, found.duration_s)
        with tempfile.TemporaryDirectory(dir=log.path.parent) as parent:
            folder = Path(parent) / session.checkpoint.path.name
            export(quantized, plan, session.checkpoint, folder=folder)
            stock = compare_with_stock(
                session, quantized, pull(str(folder), trust_remote_code=recipe.trust_remote_code)
            )
        return Score(found.score, found.duration_s, stock.agreement, stock.logit_difference)

    def tell(trial: Trial) -> None:
        verdict = "meets the goal" if trial.accepted else "misses the goal"
        if trial.stock_agreement is not None:
            verdict += f", stock transformers agrees on {trial.stock_agreement:.2%}"
        ui.note(f"{trial.name:<40} {recipe.metric} {trial.accuracy:.4f}, loss {trial.loss:+.4f}: {verdict}")

    ui.stage(f"Trials: {recipe.criterion} loss of at most {recipe.tolerable_loss:g}")
    outcome = tune(
        strategy(errors, sensitive, output_error, approach=recipe.approach, explore=recipe.explore),
        run_trial,
        goal,
        output_error=output_error,
        log=log,
        limits=Limits(recipe.max_trials, recipe.timeout),
        tell=tell,
    )
    return Found(space, outcome, space.plan(outcome.candidate))


def _calibrate(session: Session, inputs: list[dict[str, Tensor]], ui: Reporter) -> Space:
    layers = find_quantizable(session.model, inputs[0])
    example = {name: tensor[:2] for name, tensor in inputs[0].items()}
    folds = find_folds(session.model, example, layers.linears)
    statistics = calibrate(session.model, layers.linears, inputs, track=lambda b: ui.track(b, text="calibrating"))
    ui.note(
        f"{len(layers.linears)} linear and {len(layers.embeddings)} embedding layers can run in int8; "
        f"{len(folds)} SmoothQuant folds"
    )
    return Space(session.model, layers, statistics, folds)


def _output_error(
    session: Session, space: Space, inputs: list[dict[str, Tensor]], *, log: TrialLog
) -> Callable[[Candidate], float]:
    """Squared error of the encoder's output on the calibration slice, relative to the float model's output.

    Not the logits: a fine-tuned classifier is saturated on its own training data, so they hide most of the error.
    """
    reference = encoder_output(session.model, inputs)

    def output_error(candidate: Candidate) -> float:
        if candidate.name not in log.ranking:
            quantized = quantize_model(session.model, space.plan(candidate), space.folds)
            log.rank(candidate.name, encoder_output(quantized, inputs).error(reference))
        return log.ranking[candidate.name]

    return output_error


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
