"""Calibrate a model, rank the candidates, and run the trials. Where batches and scores come from is the caller's."""

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import cache

from torch import nn

from ..common.memory import free_unused, only_new_garbage, return_freed_memory
from ..common.ui import Reporter
from ..ptq.calibration import EncoderOutput, calibrate, encoder_output, sensitivity
from ..ptq.convert import int8_layer, quantize_model
from ..ptq.graph import Fold, find_folds
from ..ptq.inputs import Batch, head, spread
from ..ptq.layers import find_quantizable, linear
from ..ptq.scheme import Plan
from ..runtime.fusion.fuse import fuse
from ..runtime.int8.packed import memory_mib, state_mib
from .candidates import TRACED, Candidate, Space
from .goal import Goal
from .log import TrialLog
from .lookahead import Helpers, LookAhead
from .options import Options
from .search import Outcome, Score, rank, tune
from .search_orders import ORDERS, Searchable
from .trial import Trial

RANKED = 32  # calibration examples on which errors are compared: thousands of tokens. A dozen candidates run on them


@dataclass(frozen=True)
class Calibration:
    """What scales come from: batches, if any. `example`: what the graph is traced with, where that is not the first of them.
    `learned`: what the model was trained with.
    """

    batches: Sequence[Batch] = ()
    example: Batch | None = None
    learned: Plan | None = None

    @property
    def traced(self) -> Batch | None:
        return self.example or (self.batches[0] if self.batches else None)


@dataclass(frozen=True)
class Examiner:
    """By what candidates are judged. `evaluate` is given an int8 model that runs, and the plan it was made from.

    `metric`: what its score is called. `helped_by`: makes those who evaluate what comes next meanwhile, given the folds.
    """

    evaluate: Callable[[nn.Module, Plan], Score]
    goal: Goal
    metric: str = "score"
    helped_by: Callable[[Sequence[Fold]], Helpers] | None = None


@dataclass(frozen=True)
class Found:
    """What the search ended with. `plan` is the outcome's, in `space`."""

    space: Space
    outcome: Outcome
    plan: Plan

    @property
    def float_layers(self) -> dict[str, str]:
        """Layers that are not in the plan, with the reason."""
        reasons = {**self.space.layers.float_layers, **self.space.must_stay_float()}
        kept = [name for name in self.space.layers.layers if name not in self.plan.layers and name not in reasons]
        return reasons | dict.fromkeys(kept, "sensitive: kept in float to meet the goal")


@only_new_garbage()
def find(
    model: nn.Module, calibration: Calibration, examiner: Examiner, *, options: Options, log: TrialLog, ui: Reporter
) -> Found:
    """Search for a plan that meets the goal. The float model is read, never changed."""
    goal, helped_by = examiner.goal, examiner.helped_by
    space = prepare(model, calibration, options=options, ui=ui)
    searchable = ranked(space, log=log, ui=ui)
    order = ORDERS[options.order]
    ahead: LookAhead | None = None
    if helped_by:
        unlogged = replace(searchable, output_error=searchable.peek)
        ahead = LookAhead(order, unlogged, helpers=helped_by(space.folds), plan=space.plan, log=log)

    def run_trial(candidate: Candidate) -> Score:
        score = ahead.score(candidate) if ahead else None
        return score or score_plan(model, space.plan(candidate), space.folds, examiner.evaluate)

    def tell(trial: Trial) -> None:
        verdict = "meets the goal" if trial.accepted else undecided(trial, goal) or "misses the goal"
        if trial.stock_agreement is not None:
            verdict += f", stock transformers agrees on {trial.stock_agreement:.2%}"
            verdict += f" ({trial.near_ties:.2%} are near ties)" if trial.near_ties else ""
        seen = f" by {trial.examples:,} examples" if trial.examples else ""
        ui.note(f"{trial.name:<40} {examiner.metric} {trial.accuracy:.4f}, loss {trial.loss:+.4f}{seen}: {verdict}")

    ui.stage(f"Trials: {goal.kind} loss of at most {goal.tolerable_loss:g}")
    with closing(ahead) if ahead else nullcontext():
        outcome = tune(
            order(searchable),
            run_trial,
            goal,
            output_error=searchable.output_error,
            log=log,
            options=options,
            tell=tell,
        )
    return Found(space, outcome, space.plan(outcome.candidate))


def undecided(trial: Trial, goal: Goal) -> str | None:
    """Words for one whose score meets the goal by more luck than was allowed; None for any other."""
    if trial.accepted or not goal.met(trial.accuracy):
        return None
    more = f", about {trial.needed:,} examples would decide" if trial.needed else ""
    return f"undecided ({1 - (trial.against or 0):.1%} sure{more})"


def score_plan(
    model: nn.Module, plan: Plan, folds: Sequence[Fold], evaluate: Callable[[nn.Module, Plan], Score]
) -> Score:
    """What `evaluate` finds of the int8 model that a plan makes of `model`."""
    free_unused()  # the model before this one
    quantized = quantize_model(model, plan, folds)
    fuse(quantized)  # evaluate what will be loaded
    score = evaluate(quantized, plan)
    return replace(score, memory_mib=memory_mib(quantized), size_mib=state_mib(quantized))


def prepare(model: nn.Module, calibration: Calibration, *, options: Options, ui: Reporter) -> Space:
    """Find what can be int8 and, where activations may need a scale, calibrate. Without batches: by structure alone."""
    first, batches = calibration.traced, calibration.batches
    layers = find_quantizable(
        model, first, first=options.quantize_first, last=options.quantize_last, asked_for=options.wants_int8
    )
    folds = find_folds(model, head(first, TRACED), layers.layers) if first and options.smooths else []
    return_freed_memory()
    statistics = calibrate(model, layers.layers, batches, track=lambda b: ui.track(b, text="calibrating"))
    embeddings = f" and {len(layers.embeddings)} embeddings" if layers.embeddings else ""
    smoothing = f"; {len(folds)} SmoothQuant folds" if folds else ""
    ui.note(f"{len(layers.layers)} layers{embeddings} can run in int8{smoothing}")
    return Space(model, layers, statistics, folds, batches=batches, options=options, learned=calibration.learned)


def ranked(space: Space, *, log: TrialLog, ui: Reporter) -> Searchable:
    """The candidates by output error on the calibration slice."""
    ui.stage("Ranking by output error on the calibration slice")
    compute = cache(_output_error(space))

    def peek(candidate: Candidate) -> float:
        return log.ranking[candidate.name] if candidate.name in log.ranking else compute(candidate)

    def output_error(candidate: Candidate) -> float:
        if candidate.name not in log.ranking:
            log.rank(candidate.name, compute(candidate))
        return log.ranking[candidate.name]

    errors = rank(space.options, output_error, can_smooth=bool(space.folds))
    for candidate, error in errors.items():
        ui.note(f"{candidate.name:<40} {error:.2e}")

    @cache
    def sensitive(candidate: Candidate) -> list[str]:
        found = layer_errors(space, replace(candidate, alpha=None, gptq=False))
        return [name for name in found if space.may_stay_float(name)]

    def rotated(candidate: Candidate) -> Candidate | None:
        return None if space.rotation is None else replace(candidate, alpha=None, rotated=True)

    return Searchable(errors, sensitive, output_error, space.options, peek, rotated)


def layer_errors(space: Space, candidate: Candidate) -> dict[str, float]:
    """Output error of each layer alone on the calibration slice, fed what the float model feeds it; the largest first.

    Of a layer that `candidate` keeps in float it is the error that was avoided. Costs one pass of the float model.
    """
    free_unused()
    space, candidate = space.of(candidate)
    plan = space.plan(replace(candidate, float_layers=()))
    folded = space.folded(candidate.alpha)
    twins = {
        name: int8_layer(
            linear(folded, name), scheme, rows=plan.weights.get(name), bias_shift=plan.bias_shifts.get(name)
        )
        for name, scheme in plan.layers.items()
    }
    found = sensitivity(folded, twins, spread(space.batches, RANKED))
    return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))


def _output_error(space: Space) -> Callable[[Candidate], float]:
    """Squared error of the encoder's output on the calibration slice, relative to the float model's output.

    Not the logits: a fine-tuned classifier is saturated on its own training data, so they hide most of the error.
    """
    return_freed_memory()
    few = spread(space.batches, RANKED)

    @cache
    def reference(*, rotated: bool) -> EncoderOutput:
        return encoder_output(space.rotated.model if rotated else space.model, few)

    def output_error(candidate: Candidate) -> float:
        return_freed_memory()
        where, plain = space.of(candidate)
        quantized = quantize_model(where.model, where.plan(plain), where.folds)
        return encoder_output(quantized, few).error(reference(rotated=candidate.rotated))

    return output_error
