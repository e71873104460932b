"""The stages in the order they run: source, task data, calibration, trials, export, measure, card.

Publishing is a step of its own (`hfq.publish`): what is pushed is a folder that is already whole.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .common.errors import GoalNotMetError, SourceError
from .common.files import write_text
from .common.memory import return_freed_memory
from .common.names import EXPORT, RECOVERY_FILE, REPORT_FILE, TRIALS_FILE
from .common.ui import Reporter
from .common.version import __version__
from .data.session import Session, calibration_inputs, open_session
from .explain.explain import Case, explain
from .export.checkpoint import export
from .export.stock import check_openable
from .measure.compare import (
    compare_with_stock,
    compared_outputs,
    evaluate_float,
    evaluate_split,
    goal_of,
    measure_export,
)
from .measure.evaluate import Evaluation
from .measure.hardware import hardware
from .measure.sequential import evaluate_until_decided
from .measure.timing import Subject, examples_in, measure, timed_batches
from .output import check_output, finish, work_folder
from .ptq.convert import quantize_model
from .ptq.graph import Fold
from .ptq.scheme import Plan
from .recipe import SETTINGS, Recipe
from .recovery.record import Recovery
from .report import plots
from .report.card import render_card
from .report.explained import without_texts
from .report.report import Report, Result, layers_of, now, package_versions
from .report.view import sure
from .runtime.compiling.compile import compile
from .runtime.int8.packed import unpack_all
from .source.checkpoint import pull
from .tasks.base import Trivial
from .tuning.candidates import RECOVERED
from .tuning.goal import Goal
from .tuning.log import TrialLog
from .tuning.lookahead import Helpers
from .tuning.options import Limits, Options, rules_of
from .tuning.search import Score, plain_candidates
from .tuning.tuner import Calibration, Examiner, Found, find, layer_errors, score_plan, undecided

TRAINABLE = 0.3  # output error, beyond which too little is left to train from: then layers that the search kept stay as they are


@dataclass(frozen=True)
class TrialContext:
    """What the trials of a run have in common. `depends_on`: what their results depend on.

    `baseline`: the float model's evaluation. `number`: of the next trial on the split; None where others run later ones too.
    """

    goal: Goal
    folds: Sequence[Fold]
    depends_on: Mapping[str, object]
    baseline: Evaluation
    number: Callable[[], int] | None = None


@dataclass(frozen=True)
class Execution:
    """How a run is made. `command`: repeats it. `resume`: from the log of an earlier one. `copy_log`: as `copy` of `TrialLog`.

    `helped_by`: makes those who evaluate later trials meanwhile.
    """

    command: str = ""
    resume: bool = False
    copy_log: Callable[[str], None] | None = None
    helped_by: Callable[[TrialContext], Helpers] | None = None


@dataclass(frozen=True)
class Tuning:
    """What the search found, and what it went by: the goal, the float model's evaluation, what a model scores that looks at
    no input, and the log. `recovery`: fine-tuning that it took.
    """

    found: Found
    goal: Goal
    baseline: Evaluation
    trivial: Trivial | None
    log: TrialLog
    recovery: Recovery | None = None


def quantize(
    recipe: Recipe,
    *,
    recipes: Path,
    ui: Reporter,
    token: str | None = None,
    execution: Execution = Execution(),
) -> Result:
    """Run every stage but publishing. `recipes`: folder searched for the checkpoint's recipe when no dataset is named.

    Raises:
        GoalNotMetError: no trial met the goal and `allow_loss` is off; nothing was exported.
        HfqError: anything else the user can mend. No output folder is left behind.
    """
    output = recipe.output_folder
    check_output(output)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    with work_folder(output) as work:
        session = open_session(recipe, recipes=recipes, ui=ui, token=token)
        check_openable(session.model)
        trivial = _trivial(session)
        baseline = _baseline(session, trivial, ui)
        goal = goal_of(session, baseline)
        depends_on = _dependencies(session)
        log = TrialLog(work / TRIALS_FILE, depends_on=depends_on, resume=execution.resume, copy=execution.copy_log)
        if not log.goes_on:
            (work / RECOVERY_FILE).unlink(missing_ok=True)
        context = TrialContext(goal, (), depends_on, baseline, number=lambda: log.judged + 1)
        while True:
            found, record = _tune(session, context, log, work=work, ui=ui, helped_by=execution.helped_by), None
            if recipe.recover and not found.outcome.met:
                found, record = _recovered(session, found, context, log=log, work=work, ui=ui)
            tuning = Tuning(found, goal, baseline, trivial, log, record)
            if not found.outcome.met:
                _goal_missed(session, tuning, ui)
            report = _write_checkpoint(session, tuning, folder=work / EXPORT, ui=ui, command=execution.command)
            if report.met or not found.outcome.met:
                break
            _refute(tuning, report, ui)
        finish(output, work)
    return Result(output, report)


def _recovered(
    session: Session, found: Found, context: TrialContext, *, log: TrialLog, work: Path, ui: Reporter
) -> tuple[Found, Recovery]:
    """The search once more, over a model that was fine-tuned in int8, if that brought it nearer to the goal."""
    from .recovery.recover import recover  # Lightning, which takes more than a second to import

    best = found.outcome.trial
    assert best is not None  # the search evaluated something
    space, options = found.space, search_options(session.recipe, session.model)
    start = min(plain_candidates(options), key=lambda candidate: log.ranking[candidate.name])
    if log.ranking[start.name] > TRAINABLE:
        start = replace(found.outcome.candidate, alpha=None, gptq=False, rotated=False)
    recovered = recover(session, space.plan(start), context.goal, baseline=context.baseline, log=log, ui=ui)
    again = find(
        recovered.model,
        Calibration(space.batches, learned=recovered.plan),
        Examiner(partial(_evaluate, session, context, work), context.goal, session.metric),
        options=replace(options, observers=(RECOVERED,), alphas=()),
        log=log,
        ui=ui,
    )
    loss = again.outcome.trial.loss if again.outcome.trial else None
    is_better = again.outcome.met or (loss is not None and best.loss is not None and loss < best.loss)
    info = session.data.info
    record = Recovery(info.calibration_split, len(session.data.training or ()), best.accuracy, log.looks)
    return (again if is_better else found), record


def run_trial(session: Session, plan: Plan, context: TrialContext) -> Score:
    """A trial of somebody else's run, on a session of one's own.

    Raises:
        SourceError: that session has another checkpoint or other data.
    """
    if _dependencies(session) != context.depends_on:
        raise SourceError(f"{session.recipe.checkpoint} or its dataset is not the same here as where it is quantized.")
    with tempfile.TemporaryDirectory(prefix="hfq-") as folder:
        evaluate = partial(_evaluate, session, context, Path(folder))
        return score_plan(session.model, plan, context.folds, evaluate)


def evaluate_checkpoint(
    recipe: Recipe,
    *,
    recipes: Path,
    ui: Reporter,
    token: str | None = None,
    compiled: bool = False,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Accuracy, seconds and memory of any checkpoint, quantized or not, freshly loaded; `compiled`: by `hfq.compile`.

    `baseline`: the float checkpoint that it is compared with where no labels are read.

    Raises:
        HfqError: the checkpoint or the dataset cannot be used.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    session = open_session(recipe, recipes=recipes, ui=ui, token=token, quantized=True, baseline=baseline)
    ui.stage("Evaluate")
    model = compile(session.model) if compiled else session.model
    found = evaluate_split(session, model, session.evaluation, session.data.evaluation)
    batches = timed_batches(session.evaluation)
    subject = Subject(session.checkpoint, session.task, compiled=compiled, trust_remote_code=recipe.trust_remote_code)
    (timing,) = measure([subject], batches, threads=recipe.threads)
    info = session.data.info
    return {
        "checkpoint": session.checkpoint.info.id,
        "revision": session.checkpoint.info.revision,
        "dataset": info.id,
        "split": info.split,
        "examples": info.examples,
        "batch_size": recipe.batch_size,
        "task": session.task.name,
        "metric": session.metric,
        "metric_label": session.judge.label,
        "accuracy": found.score,
        "duration_s": timing.duration_s,
        "examples_per_s": timing.examples_per_s,
        "timed_examples": examples_in(batches),
        "load_s": timing.load_s,
        "memory_mib": timing.memory_mib,
        "size_mib": session.checkpoint.size_mib,
        "peak_memory_mib": timing.peak_memory_mib,
    }


def search_options(recipe: Recipe, model: nn.Module) -> Options:
    """What a recipe lets the search try on `model`.

    Raises:
        UsageError: it names a layer that is not there.
    """
    return Options(
        approach=recipe.approach,
        rules=rules_of(recipe.layers, model),
        explore=recipe.explore,
        limits=Limits(recipe.max_trials, recipe.timeout),
        seed=recipe.seed,
    )


def _tune(
    session: Session,
    context: TrialContext,
    log: TrialLog,
    *,
    work: Path,
    ui: Reporter,
    helped_by: Callable[[TrialContext], Helpers] | None,
) -> Found:
    ui.stage(f"Calibration on {len(session.data.calibration)} examples of {session.data.info.calibration_split!r}")
    examiner = Examiner(
        partial(_evaluate, session, context, work),
        context.goal,
        session.metric,
        helped_by and (lambda folds: helped_by(replace(context, folds=folds, number=None))),
    )
    calibration = Calibration(calibration_inputs(session, session.calibration))
    return find(
        session.model, calibration, examiner, options=search_options(session.recipe, session.model), log=log, ui=ui
    )


def _refute(tuning: Tuning, report: Report, ui: Reporter) -> None:
    """What users load decides, and not what tuning saw of it: a trial that misses the goal then is one that missed it."""
    trial, accuracy = tuning.found.outcome.trial, report.quantized.accuracy
    assert trial is not None
    assert accuracy is not None  # of a run that evaluates
    tuning.log.refute(trial, accuracy=accuracy, loss=tuning.goal.loss(accuracy))
    ui.note(f"{trial.name} misses the goal where it is measured whole: the search goes on")


def _evaluate(session: Session, context: TrialContext, work: Path, model: nn.Module, plan: Plan) -> Score:
    """Accuracy of a trial and, if that meets the goal, whether stock transformers gives the same answers."""
    trial = context.number and context.number()
    found = evaluate_until_decided(session, model, context.baseline, goal=context.goal, trial=trial)
    score = Score(
        found.score,
        found.duration_s,
        against=found.claim.against if found.claim else None,
        needed=found.claim.needed if found.claim else None,
        examples=len(found.outputs) if len(found.outputs) < len(session.data.evaluation) else None,
    )
    if not context.goal.met(found.score):
        return score
    ours = compared_outputs(session, model, found.outputs)
    unpack_all(model)
    return_freed_memory()
    with tempfile.TemporaryDirectory(dir=work) as parent:
        folder = Path(parent) / session.checkpoint.path.name
        export(model, plan, session.checkpoint, folder=folder, library=session.task.library)
        exported = pull(str(folder), trust_remote_code=session.recipe.trust_remote_code)
        stock = compare_with_stock(session, ours, exported, baseline=context.baseline)
    return replace(
        score,
        stock_agreement=stock.agreement,
        output_difference=stock.output_difference,
        stable_from=session.task.stable_agreement,
        near_ties=stock.near_ties,
    )


def _baseline(session: Session, trivial: Trivial | None, ui: Reporter) -> Evaluation:
    ui.stage("Baseline")
    baseline = evaluate_float(session, session.evaluation, session.data.evaluation)
    info, metric = session.data.info, session.judge
    ui.note(f"FP32 {session.metric} {baseline.score:.4f} on the {info.examples} examples of {info.split!r}")
    if trivial and (baseline.score <= trivial.score if metric.higher_is_better else baseline.score >= trivial.score):
        ui.warn(
            f"The float model's {session.metric} is {baseline.score:.4f}, no better than always {trivial.how} "
            f"({trivial.score:.4f}). Are this dataset and these labels the ones it was trained for?"
        )
    return baseline


def _trivial(session: Session) -> Trivial | None:
    if not session.judge.of_labels:
        return None
    return session.task.trivial(session.metric, session.data.evaluation.references)


def _goal_missed(session: Session, tuning: Tuning, ui: Reporter) -> None:
    recipe, goal, outcome, log = session.recipe, tuning.goal, tuning.found.outcome, tuning.log
    best = outcome.trial
    assert best is not None  # the search evaluated something
    doubt = undecided(best, goal) or ""
    message = (
        f"No trial met the goal: at most {goal.tolerable_loss:g} {goal.kind} loss from FP32 {session.metric} "
        f"{goal.baseline:.4f}{', within ' + outcome.stopped if outcome.stopped else ''}. Best of {len(log.trials)}: "
        f"{best.name}, {session.metric} {best.accuracy:.4f}, loss {best.loss:+.4f}{doubt and f': {doubt}'}."
    )
    if recipe.allow_loss:
        ui.warn(message)
        return
    raise GoalNotMetError(
        f"{message} Nothing was exported. Raise --tolerable-loss, or --resume with a larger --max-trials or --timeout, "
        "or pass --allow-loss to save the best trial with a card that says so. `hfq explain` with the same data says why.",
        details={
            "hfq_version": __version__,
            "met": False,
            "metric": session.metric,
            "goal": asdict(goal),
            "baseline": {"accuracy": goal.baseline},
            "best": asdict(best),
            "trials": [asdict(trial) for trial in log.trials],
        },
    )


def _write_checkpoint(session: Session, tuning: Tuning, *, folder: Path, ui: Reporter, command: str) -> Report:
    """Export the chosen trial into `folder`, measure what was written, and put report and card beside it."""
    recipe, info = session.recipe, session.data.info
    found, goal, baseline, log = tuning.found, tuning.goal, tuning.baseline, tuning.log
    ui.stage(f"Export: {found.outcome.candidate.name}")
    shutil.rmtree(folder, ignore_errors=True)
    export(
        quantize_model(found.space.model, found.plan, found.space.folds),
        found.plan,
        session.checkpoint,
        folder=folder,
        library=session.task.library,
    )
    exported = pull(str(folder), trust_remote_code=recipe.trust_remote_code)
    ui.note(
        f"{exported.size_mib:.1f} MiB, {exported.size_mib / session.checkpoint.float32_mib:.1%} of FP32, read back bit for bit"
    )
    ui.left_behind(session.checkpoint.left, where="exported")

    ui.stage("Measure the exported folder, freshly loaded")
    measured = measure_export(session, exported, baseline, trials=log.judged, ui=ui)
    met = measured.quantized.accuracy is not None and goal.met(measured.quantized.accuracy)
    for comparison in measured.comparisons:
        if comparison.within is not None:
            ui.note(
                f"by the {comparison.examples} examples of {comparison.split!r} it is {sure(comparison.within)} sure that the "
                "loss is within the goal's"
            )
    metric, tag = session.judge, session.task.tag(session.checkpoint.card)
    trial = found.outcome.trial
    assert trial is not None  # the search evaluated something
    explanation = None
    if recipe.explain:
        case = Case(session, found.space, found.plan, trial.name, baseline, measured.evaluation)
        explanation = without_texts(explain(case, ui=ui))
    report = Report(
        hfq_version=__version__,
        task=session.task.name,
        pipeline_tag=tag,
        library=session.task.library,
        usage=session.task.usage(tag),
        checkpoint=session.checkpoint.info,
        dataset=info,
        metric=session.metric,
        metric_label=metric.label,
        metric_in_points=metric.in_points,
        decisions=dict(session.task.decisions),
        goal=goal,
        approach=found.outcome.candidate.approach,
        chosen=found.outcome.candidate.name,
        met=met,
        trials=log.trials,
        ranking=log.ranking,
        baseline=measured.baseline,
        quantized=measured.quantized,
        comparisons=measured.comparisons,
        layers=layers_of(found),
        trivial=tuning.trivial,
        output_difference=trial.output_difference,
        timed_examples=measured.timed_examples,
        compared_examples=measured.compared_examples,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        command=command,
        created=now(),
        hardware=hardware(),
        versions=package_versions(),
        warnings=list(ui.warnings),
        stock_agreement=trial.stock_agreement,
        sensitivity=layer_errors(found.space, found.outcome.candidate),
        baseline_pass_s=baseline.duration_s,
        held_out_stock=measured.stock,
        float32_mib=session.checkpoint.float32_mib,
        explanation=explanation,
        recovery=tuning.recovery,
    )
    write_text(folder / REPORT_FILE, report.to_json())
    drawn = plots.write(report, folder)
    write_text(folder / "README.md", render_card(report, repo_id=recipe.to, plots=drawn))
    return report


def renew_card(folder: Path, report: Report, *, repo_id: str) -> None:
    """Name the repository in a card that was written before it was known. A card somebody edited stays."""
    card, drawn = folder / "README.md", plots.find(folder)
    if card.is_file() and card.read_text(encoding="utf-8") == render_card(report, repo_id=None, plots=drawn):
        write_text(card, render_card(report, repo_id=repo_id, plots=drawn))


def _dependencies(session: Session) -> dict[str, object]:
    """What the result of a trial depends on: a log made with anything else is not resumed."""
    recipe = session.recipe.model_dump(
        include={
            "tolerable_loss",
            "criterion",
            "confidence",
            "approach",
            "seed",
            "batch_size",
            "calibration_samples",
            "layers",
            *SETTINGS,
        }
    )
    return {
        "hfq": __version__,
        "checkpoint": session.checkpoint.info.revision,
        "dataset": asdict(session.data.info),
        "metric": session.metric,
        "recipe": recipe,
    }
