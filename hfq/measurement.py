"""Last look before publishing: the exported folder, freshly loaded, beside the float checkpoint."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .benchmark import Subject, Timing, logits_of, measure, timed_batches
from .errors import ExportError
from .evaluation import Evaluation
from .report import Comparison, Measurement, StockComparison
from .runtime.slicing import in_parts
from .session import Session, load_model
from .source import Checkpoint
from .stock import answers_otherwise, other_model
from .tuning.acceptance import mcnemar_p, paired_interval
from .ui import Reporter

STOCK_TOKENS = 512  # at a time: what stock transformers computes of them takes twice the memory that it takes in float


@dataclass(frozen=True)
class Measured:
    """Both checkpoints, and the splits they were compared on. `stock`: on the holdout, if there is one."""

    baseline: Measurement
    quantized: Measurement
    comparisons: list[Comparison]
    timed_examples: int
    stock: StockComparison | None = None


def measure_export(session: Session, exported: Checkpoint, baseline: Evaluation, *, ui: Reporter) -> Measured:
    """Accuracy on every split, then time and memory in processes of their own."""
    recipe, info = session.recipe, session.data.info
    remote = recipe.trust_remote_code
    model = load_model(exported, session.auto_class, trust_remote_code=remote)
    quantized = session.evaluate(model, session.evaluation)
    comparisons = [
        compare(baseline, quantized, split=info.split, seed=recipe.seed, seen_in_tuning=True),
    ]
    held_out: list[float | None] = [None, None]
    stock = None
    if session.holdout and info.holdout_split:
        before = session.evaluate(session.model, session.holdout)
        after = session.evaluate(model, session.holdout)
        held_out = [before.score, after.score]
        comparisons.append(compare(before, after, split=info.holdout_split, seed=recipe.seed, seen_in_tuning=False))
        ui.note(f"{info.holdout_split!r}, which tuning never saw: FP32 {before.score:.4f}, INT8 {after.score:.4f}")
        stock = compare_with_stock(session, answers(session, model, held_out=True), exported, held_out=True)
        ui.note(f"stock transformers gives the same answer on {stock.agreement:.2%} of {stock.examples} examples there")

    batches = timed_batches(session.evaluation)
    subjects = [
        Subject(checkpoint, session.auto_class, trust_remote_code=remote)
        for checkpoint in (session.checkpoint, exported)
    ]
    timings = measure(subjects, batches, threads=recipe.threads)
    return Measured(
        _measurement(session.checkpoint, baseline, timings[0], held_out[0]),
        _measurement(exported, quantized, timings[1], held_out[1]),
        comparisons,
        sum(len(batch["input_ids"]) for batch in batches),
        stock,
    )


def answers(session: Session, model: nn.Module, *, held_out: bool = False) -> Tensor:
    """Logits of `model` on the examples that it is compared with stock transformers on: of tuning, or `held_out`."""
    batches = timed_batches(session.holdout if held_out else session.evaluation)
    with torch.inference_mode():
        return torch.cat([model(**batch).logits.float() for batch in batches])


def compare_with_stock(
    session: Session, ours: Tensor, exported: Checkpoint, *, held_out: bool = False
) -> StockComparison:
    """`ours`, by int8 kernels, beside the answers of the exported model in a process where hfq is not used.

    Both compute the same codes from the same scales, but sum in another order. A code that lies on the edge then
    rounds the other way and moves every code after it, so the two agree only as well as int8 resolves the model.

    Raises:
        ExportError: they are so far apart that they cannot be the same model.
    """
    whole = timed_batches(session.holdout if held_out else session.evaluation)
    batches = [part for batch in whole for part in in_parts(batch, tokens=STOCK_TOKENS)]
    remote = session.recipe.trust_remote_code
    subject = Subject(exported, session.auto_class, stock=True, trust_remote_code=remote)
    stock = logits_of(subject, batches, threads=session.recipe.threads)
    difference = answers_otherwise(ours, stock)
    if difference is not None:
        raise ExportError(other_model(difference))
    same = stock.argmax(1) == ours.argmax(1)
    info = session.data.info
    return StockComparison(
        split=(info.holdout_split or "") if held_out else info.split,
        examples=len(same),
        agreement=same.float().mean().item(),
        logit_difference=(stock - ours).abs().mean().item(),
        seen_in_tuning=not held_out,
    )


def compare(first: Evaluation, second: Evaluation, *, split: str, seed: int, seen_in_tuning: bool) -> Comparison:
    """Two models' answers to the same examples of `split`: float first, int8 second."""
    a, b = first.right, second.right
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    return Comparison(
        split=split,
        examples=len(a),
        both_right=int((a & b).sum()),
        only_float_right=only_first,
        only_int8_right=only_second,
        agreement=(first.logits.argmax(1) == second.logits.argmax(1)).float().mean().item(),
        interval=paired_interval(a, b, seed=seed),
        p_value=mcnemar_p(only_first, only_second),
        seen_in_tuning=seen_in_tuning,
    )


def _measurement(
    checkpoint: Checkpoint, evaluation: Evaluation, timing: Timing, holdout_accuracy: float | None
) -> Measurement:
    return Measurement(
        accuracy=evaluation.score,
        duration_s=timing.duration_s,
        memory_mb=timing.memory_mb,
        size_mb=checkpoint.size_mb,
        peak_memory_mb=timing.peak_memory_mb,
        examples_per_s=timing.examples_per_s,
        holdout_accuracy=holdout_accuracy,
    )
