"""Last look before publishing: the exported folder, freshly loaded, beside the float checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..common.errors import ExportError
from ..common.ui import Reporter
from ..data.examples import Examples
from ..data.session import Session, answers
from ..export.stock import answers_otherwise, other_model
from ..runtime.fusion.slicing import in_parts
from ..source.checkpoint import Checkpoint
from ..source.model import load_model
from ..tasks.base import Batch, Outputs, References, Task
from ..tuning.goal import Goal
from .certainty import Pair, plausible_differences, within
from .evaluate import Engine, Evaluation, evaluate, judged
from .figures import Comparison, Measurement, StockComparison
from .kept_outputs import keeping_outputs
from .statistics import mcnemar_p, middle, on_others
from .timing import Subject, Timing, examples_in, measure, outputs_of, some_batches, some_places, timed_batches

APART = 1.5  # the root of two, and some more
TIE = 4.5  # times the middle one: three standard deviations of what moves by chance
COMPARED = (256, 512)  # examples, of the tuning split and of the holdout, with stock: that takes twice as long as FP32
STOCK_TOKENS = 512  # at a time: what stock transformers computes of them takes twice the memory that it takes in float


@dataclass(frozen=True)
class Measured:
    """Both checkpoints, and the splits they were compared on. `evaluation`: of int8. `compared_examples`: with stock
    transformers, on the tuning split; `stock`: on the holdout, if there is one.
    """

    baseline: Measurement
    quantized: Measurement
    comparisons: list[Comparison]
    timed_examples: int
    evaluation: Evaluation
    compared_examples: int
    stock: StockComparison | None = None


def evaluate_split(session: Session, model: nn.Module, batches: Sequence[Batch], examples: Examples) -> Evaluation:
    """The recipe's metric of `model` on a split, by the recipe's engine."""
    from ..common.memory import weights_left_in_file

    recipe = session.recipe
    engine = Engine(recipe.accelerator, recipe.devices, recipe.strategy)
    with weights_left_in_file(model):
        return evaluate(model, batches, examples.references, task=session.task, metric=session.metric, engine=engine)


def evaluate_float(session: Session, batches: Sequence[Batch], examples: Examples) -> Evaluation:
    """The same of the float model, which need not run if it did in an earlier run. Where no labels are read, its outputs
    are there already: they are what is right.
    """
    task, metric = session.task, session.metric
    if not session.judge.of_labels:
        outputs = examples.references
        return judged(outputs, outputs, task=task, metric=metric, duration_s=session.answered_in_s)

    def compute() -> tuple[list[Tensor], float]:
        found = evaluate_split(session, session.model, batches, examples)
        return list(found.outputs), found.duration_s

    kept, duration_s = keeping_outputs(session, batches, compute)
    return judged(kept, examples.references, task=task, metric=metric, duration_s=duration_s)


def measure_export(
    session: Session, exported: Checkpoint, baseline: Evaluation, *, trials: int, ui: Reporter
) -> Measured:
    """The metric on every split, then time and memory in processes of their own. `trials`: it was chosen of so many."""
    recipe, data = session.recipe, session.data
    remote = recipe.trust_remote_code
    model = load_model(exported, session.task.auto_class, trust_remote_code=remote)
    quantized = evaluate_split(session, model, session.evaluation, data.evaluation)
    comparisons = [
        compare(session, (baseline, quantized), data.evaluation.references, split=data.info.split, chosen_of=trials),
    ]
    comparisons[0].remarks.extend(_company(session, model))
    held_out: list[float | None] = [None, None]
    stock = None
    if data.holdout and data.info.holdout_split:
        split, references = data.info.holdout_split, data.holdout.references
        before = evaluate_float(session, session.holdout, data.holdout)
        after = evaluate_split(session, model, session.holdout, data.holdout)
        held_out = [before.score, after.score]
        comparisons.append(compare(session, (before, after), references, split=split))
        ui.note(f"{split!r}, which tuning never saw: FP32 {before.score:.4f}, INT8 {after.score:.4f}")
        ours = compared_outputs(session, model, after.outputs, held_out=True)
        stock = compare_with_stock(session, ours, exported, held_out=True)
        ui.note(f"stock transformers agrees to {stock.agreement:.2%} on {stock.examples} examples there")

    batches = timed_batches(session.evaluation)
    subjects = [
        Subject(checkpoint, session.task, trust_remote_code=remote) for checkpoint in (session.checkpoint, exported)
    ]
    timings = measure(subjects, batches, threads=recipe.threads)
    return Measured(
        _measurement(session.checkpoint, baseline, timings[0], held_out[0]),
        _measurement(exported, quantized, timings[1], held_out[1]),
        comparisons,
        examples_in(batches),
        quantized,
        examples_in(_compared(session, held_out=False)),
        stock,
    )


def _company(session: Session, model: nn.Module) -> list[str]:
    """What the task says of examples beside others, in the middle of the evaluation split."""
    batch = session.evaluation[len(session.evaluation) // 2]
    with torch.inference_mode():
        return session.task.company(model, batch, session.data.processor)


def compared_outputs(session: Session, model: nn.Module, seen: Outputs, *, held_out: bool = False) -> list[Tensor]:
    """Outputs of `model` on what it is compared with stock transformers on: of the tuning split, or `held_out`.

    `seen`: its outputs on the first examples of the split, mostly on all, which are not computed again.
    """
    rows = _compared_rows(session, held_out=held_out)
    if rows[-1] < len(seen):
        return [seen[row] for row in rows]
    return answers(model, _compared(session, held_out=held_out), task=session.task)


def compare_with_stock(
    session: Session,
    ours: Outputs,
    exported: Checkpoint,
    *,
    held_out: bool = False,
    baseline: Evaluation | None = None,
) -> StockComparison:
    """`ours`, by int8 kernels, beside the outputs of the exported model in a process where hfq is not used.

    Both compute the same codes from the same scales, but sum in another order. A code that lies on the edge then
    rounds the other way and moves every code after it, so the two agree only as well as int8 resolves the model.

    `baseline`: the float model's evaluation of the tuning split, by which near ties are told from other answers.

    Raises:
        ExportError: they are so far apart that they cannot be the same model.
    """
    whole = _compared(session, held_out=held_out)
    batches = [dict(part) for batch in whole for part in in_parts(batch, tokens=STOCK_TOKENS)]
    subject = Subject(exported, session.task, stock=True, trust_remote_code=session.recipe.trust_remote_code)
    stock = outputs_of(subject, batches, threads=session.recipe.threads)
    agreement = session.task.fidelity(stock, ours)
    if session.task.discrete:
        mean_difference = 1 - agreement
    else:
        difference = answers_otherwise(*(torch.cat([row.float().flatten() for row in rows]) for rows in (ours, stock)))
        if difference is not None:
            raise ExportError(other_model(difference))
        mean_difference = _mean_difference(stock, ours)
    info = session.data.info
    return StockComparison(
        split=(info.holdout_split or "") if held_out else info.split,
        examples=len(stock),
        agreement=agreement,
        output_difference=mean_difference,
        seen_in_tuning=not held_out,
        near_ties=_near_ties(session, baseline, ours, stock) if baseline is not None else 0.0,
    )


def _near_ties(session: Session, baseline: Evaluation, ours: Outputs, stock: Outputs) -> float:
    """`near_ties` on the tuning split; none where stock's own score misses the goal."""
    rows = _compared_rows(session, held_out=False)
    floats, right = ([of[row] for row in rows] for of in (baseline.outputs, session.data.evaluation.references))
    found = near_ties(session.task, floats, ours, stock)
    score = session.judge.score(stock, right) - session.judge.score(floats, right) if found else 0.0
    return found if goal_of(session, baseline).met(baseline.score + score) else 0.0


def near_ties(task: Task, floats: Outputs, ours: Outputs, stock: Outputs) -> float:
    """How much of `task.fidelity` stock transformers lacks for no more than rounding, beside `ours`.

    On such examples neither answer is ahead of the other by more than three times what rounding usually moves. That is what
    the middle example moves, so a fault in a few is none; and where it is more than two int8 models are apart by chance, as
    far as either is from the float model, nothing is.
    """
    lead, floats_lead = task.margins(ours, stock), task.margins(floats, ours)
    own, floats_own = task.margins(ours, ours), task.margins(floats, floats)
    if lead is None or floats_lead is None or own is None or floats_own is None:
        return 0.0
    moved, by_int8 = ((a - b).abs().nanmedian() for a, b in ((own, lead), (floats_own, floats_lead)))
    flips = lead < 0
    if not flips.any() or moved > APART * by_int8:
        return 0.0
    near = torch.maximum(own, -lead)[flips] <= TIE * moved
    return near.float().mean().item() * (1 - task.fidelity(stock, ours))


def _compared(session: Session, *, held_out: bool) -> list[Batch]:
    return some_batches(session.holdout if held_out else session.evaluation, COMPARED[held_out])


def _compared_rows(session: Session, *, held_out: bool) -> list[int]:
    """The numbers of the examples in those batches."""
    batches = session.holdout if held_out else session.evaluation
    examples = session.data.holdout if held_out else session.data.evaluation
    assert examples is not None  # else nobody compares
    size, last = session.recipe.batch_size, len(examples)
    places = some_places(batches, COMPARED[held_out])
    return [row for place in places for row in range(place * size, min(place * size + size, last))]


def goal_of(session: Session, baseline: Evaluation) -> Goal:
    """What the recipe allows to be lost of the float model's score on a split."""
    recipe, higher = session.recipe, session.judge.higher_is_better
    return Goal(baseline.score, recipe.tolerable_loss, recipe.criterion, higher, recipe.confidence)


def compare(session: Session, pair: Pair, references: References, *, split: str, chosen_of: int = 1) -> Comparison:
    """Two models' outputs for the same examples of `split`: float first, int8 second.

    `chosen_of`: candidates tried on that split, of which int8 is the one that did well.
    """
    first, second = pair
    task, seed, goal, judge = session.task, session.recipe.seed, goal_of(session, first), session.judge
    differences = plausible_differences(judge, pair, references, seed=seed)
    of_labels = session.judge.of_labels
    rights = [task.per_example(found.outputs, references) if of_labels else None for found in (first, second)]
    found = Comparison(
        split=split,
        examples=len(references),
        agreement=task.fidelity(first.outputs, second.outputs),
        difference=second.score - first.score,
        interval=middle(differences, chosen_of=chosen_of),
        elsewhere=middle(on_others(differences), chosen_of=chosen_of),
        within=within(judge, pair, references, goal=goal, differences=differences, seed=seed),
        seen_in_tuning=split == session.data.info.split,
        remarks=task.remarks(session.judge, first.outputs, second.outputs, references),
        confusion=task.confusion(first.outputs, second.outputs, references) if of_labels else None,
    )
    a, b = rights
    if a is None or b is None:
        return found
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    return replace(
        found,
        both_right=int((a & b).sum()),
        only_float_right=only_first,
        only_int8_right=only_second,
        p_value=mcnemar_p(only_first, only_second),
    )


def _mean_difference(first: Outputs, second: Outputs) -> float:
    """Of every number that both models put out for the same example."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.shape == b.shape]
    total = sum((a.float() - b.float()).abs().sum().item() for a, b in pairs)
    return total / max(1, sum(a.numel() for a, _ in pairs))


def _measurement(
    checkpoint: Checkpoint, evaluation: Evaluation, timing: Timing, holdout_accuracy: float | None
) -> Measurement:
    return Measurement(
        accuracy=evaluation.score,
        duration_s=timing.duration_s,
        memory_mib=timing.memory_mib,
        size_mib=checkpoint.size_mib,
        peak_memory_mib=timing.peak_memory_mib,
        examples_per_s=timing.examples_per_s,
        holdout_accuracy=holdout_accuracy,
    )
