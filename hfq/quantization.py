"""`fit`: quantize any `torch.nn.Module` in memory, with Neural Compressor's arguments.

The command line's pipeline starts from a checkpoint and a dataset; here the user brings both as objects.
"""

import functools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .common.copies import deep_copy
from .common.errors import GoalNotMetError, HfqError
from .common.memory import weights_left_in_file
from .common.ui import Reporter
from .common.version import __version__
from .config import PostTrainingQuantConfig, QuantizationAwareTrainingConfig
from .measure.figures import Measurement
from .measure.hardware import hardware
from .ptq.convert import quantize_model
from .ptq.inputs import LABELS, bind, bind_call, head, take
from .ptq.sentences import around, run_all
from .quantized import quantized_like
from .report.report import Report, layers_of, now, package_versions
from .runtime.fusion.fuse import fuse
from .runtime.fusion.snapshot import unchanged
from .runtime.inside import sentence_transformer
from .runtime.int8.packed import memory_mib, state_mib
from .runtime.loading.ownership import own_tensors
from .runtime.loading.vocabulary import keep_vocabulary
from .source.checkpoint import CheckpointInfo
from .tuning.goal import Goal
from .tuning.log import TrialLog
from .tuning.options import Options
from .tuning.search import Outcome, Score, untuned
from .tuning.tuner import Calibration, Examiner, Found, find, prepare, ranked

Config = PostTrainingQuantConfig | QuantizationAwareTrainingConfig
Evaluate = Callable[[nn.Module], float]
HALF = (torch.bfloat16, torch.float16)
EXAMPLES = 2  # that a saved folder is checked with


class _EnoughError(Exception):
    """Ends a calibration function once enough examples went through the model."""


def fit(
    model: nn.Module,
    conf: PostTrainingQuantConfig | None = None,
    calib_dataloader: Iterable[Any] | None = None,
    calib_func: Callable[[nn.Module], Any] | None = None,
    eval_func: Evaluate | None = None,
    eval_dataloader: Iterable[Any] | None = None,
    eval_metric: Any = None,
) -> Any:
    """Quantize `model` to int8, so that `eval_func` loses no more than `conf` tolerates. `model` stays as it is.

    Args:
        model: any module in float: transformers', a LightningModule, plain torch, or sentence-transformers', of which
            the transformers model inside is quantized. Its batches are texts, or what its `preprocess` answers.
        conf: what may be done, and the goal; `PostTrainingQuantConfig()` when absent.
        calib_dataloader: yields dicts, `BatchEncoding`, tensors, or tuples such as (input, label). Labels are dropped.
        calib_func: calibrates instead, by running the model it is given on data of its own.
        eval_func: the score of a model; it is given int8 models that run. Without it, and without the next two,
            nothing is tuned, and a warning says so.
        eval_dataloader, eval_metric: instead of `eval_func`: batches with labels, and a torchmetrics `Metric` or its
            name ("accuracy").

    Returns:
        The int8 model. It behaves as `model` does, an instance of the same class with tensors of its own, and has
        `save`, `save_pretrained`, `push_to_hub`, `trials` and `report`. What stays float in it is float32, also where
        `model` is bfloat16 or float16, whose inputs it takes, too.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, naming it.
        UnsupportedError: the model has no layer that can run in int8.
        GoalNotMetError: no trial met the goal.

    Example:
        >>> q_model = fit(model, PostTrainingQuantConfig(), calib_dataloader=loader, eval_func=accuracy)
        >>> q_model.save("./saved_model/")
    """
    conf = PostTrainingQuantConfig() if conf is None else conf
    _check_arguments(model, conf, calib_dataloader, calib_func, eval_func, eval_dataloader, eval_metric)
    if sentence_transformer(model) is not None:
        return _fit_inside(in_float32(model), conf, calib_dataloader, calib_func, eval_func)
    evaluate = eval_func
    if evaluate is None and eval_dataloader is not None:
        evaluate = metric_evaluation(eval_dataloader, eval_metric)
    ui = Reporter()
    with _inference(model), tempfile.TemporaryDirectory(prefix="hfq-") as folder:
        started = time.monotonic()
        with unchanged(model), weights_left_in_file(model):
            baseline = None if evaluate is None else score_of(evaluate, model)
        seconds = time.monotonic() - started
        floats = in_float32(model)
        if evaluate is None:
            warnings.warn(
                "Neither eval_func nor eval_dataloader is given: the model is quantized without tuning, and nothing "
                "is known of its accuracy.",
                stacklevel=2,
            )
        batches: Sequence[Mapping[str, Any]] = []
        for i, size in enumerate(conf.sampling_sizes):
            batches = _calibration_batches(model, conf, size, calib_dataloader, calib_func)
            batches = batches if floats is model else [_widened(dict(batch)) for batch in batches]
            log = TrialLog(Path(folder) / f"trials-{i}.jsonl", depends_on={}, resume=False)
            found = _search(floats, batches, evaluate, baseline, conf=conf, log=log, ui=ui)
            if found.outcome.met:
                break
        report = report_of(floats, found, conf, baseline, seconds, log, batches, ui)
        if evaluate is not None and not found.outcome.met:
            raise goal_missed(report)
        quantized = quantize_model(floats, found.plan, found.space.folds)
        if floats is model:
            own_tensors(quantized, model)
        keep_vocabulary(quantized)
        example = head(batches[0], EXAMPLES) if batches else None
        quantized = quantized_like(model, quantized, plan=found.plan, report=report, example=example)
        fuse(quantized)  # it looks at the class, too
    return quantized


def _fit_inside(
    model: nn.Module,
    conf: PostTrainingQuantConfig,
    calib_dataloader: Iterable[Any] | None,
    calib_func: Callable[[nn.Module], Any] | None,
    eval_func: Evaluate | None,
) -> Any:
    """`fit` of a sentence-transformers model: of the transformers model inside, with the rest around it."""
    inside = sentence_transformer(model)
    assert inside is not None

    def calibrate(part: nn.Module) -> None:
        whole = around(part, model, instead_of=inside)
        if calib_func is not None:
            calib_func(whole)
        elif calib_dataloader is not None:
            run_all(whole, calib_dataloader)

    def evaluate(part: nn.Module) -> float:
        assert eval_func is not None
        return eval_func(around(part, model, instead_of=inside))

    is_calibrated = calib_func is not None or calib_dataloader is not None
    part = fit(
        inside,
        conf,
        calib_func=calibrate if is_calibrated else None,
        eval_func=None if eval_func is None else evaluate,
    )
    whole = around(part, model, instead_of=inside)
    plan, report, example = part._hfq_plan, part._hfq_report, part._hfq_example
    return quantized_like(model, whole, plan=plan, report=report, example=example)


def in_float32(model: nn.Module) -> nn.Module:
    """`model`, or a copy of it in float32: int8 layers have float32 scales, and so does the folder that is saved."""
    if not any(tensor.dtype in HALF for tensor in [*model.parameters(), *model.buffers()]):
        return model
    widened = deep_copy(model).float()
    widened.register_forward_pre_hook(_widen, with_kwargs=True)  # images and sounds come in the dtype of `model`
    return widened


def _widen(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _widened(args), _widened(kwargs)


def _widened(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.float() if x.dtype in HALF else x, inputs)


def _search(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    evaluate: Evaluate | None,
    baseline: float | None,
    *,
    conf: PostTrainingQuantConfig,
    log: TrialLog,
    ui: Reporter,
) -> Found:
    options = conf.options()
    calibration = Calibration(batches, None if conf.example_inputs is None else bind(model, conf.example_inputs))
    ui.stage(f"Calibration on {len(batches)} batches" if batches else "No calibration")
    if evaluate is None or baseline is None:
        space = prepare(model, calibration, options=options, ui=ui)
        candidate = untuned(options, ranked(space, log=log, ui=ui) if batches else None)
        return Found(space, Outcome(candidate, None, met=True), space.plan(candidate))

    def run(quantized: nn.Module, _: object) -> Score:
        started = time.monotonic()
        score = score_of(evaluate, quantized)
        return Score(score, time.monotonic() - started)

    ui.note(f"FP32 scores {baseline:.4f}")
    return find(model, calibration, Examiner(run, goal_of(conf, baseline)), options=options, log=log, ui=ui)


def _check_arguments(
    model: Any,
    conf: Any,
    calib_dataloader: Any,
    calib_func: Any,
    eval_func: Any,
    eval_dataloader: Any,
    eval_metric: Any,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}, a {type(model).__name__}; expected a torch.nn.Module.")
    if not isinstance(conf, PostTrainingQuantConfig):
        raise TypeError(f"conf is {conf!r}, a {type(conf).__name__}; expected hfq.config.PostTrainingQuantConfig.")
    for name, value in (("calib_func", calib_func), ("eval_func", eval_func)):
        if value is not None and not callable(value):
            raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected a function of the model.")
    for name, value in (("calib_dataloader", calib_dataloader), ("eval_dataloader", eval_dataloader)):
        if value is not None and not isinstance(value, Iterable):
            raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected something that yields batches.")
    if calib_dataloader is not None and calib_func is not None:
        raise ValueError("calib_dataloader and calib_func are both given; expected one of them.")
    if eval_func is not None and (eval_dataloader is not None or eval_metric is not None):
        raise ValueError("eval_func is given beside eval_dataloader or eval_metric; expected one or the others.")
    if (eval_dataloader is None) != (eval_metric is None):
        raise ValueError("eval_dataloader and eval_metric belong together; one of them is missing.")
    if eval_dataloader is not None and sentence_transformer(model) is not None:
        raise ValueError(
            f"eval_dataloader and eval_metric do not suit a {type(model).__name__}: pass eval_func, such as "
            "`lambda model: evaluator(model)[evaluator.primary_metric]` with an evaluator of sentence-transformers."
        )
    if _needs_calibration(conf.options()) and calib_dataloader is None and calib_func is None:
        raise ValueError(
            f"approach {conf.approach!r} needs calibration: pass calib_dataloader or calib_func, or choose "
            "approach='dynamic'."
        )


def _needs_calibration(options: Options) -> bool:
    wanted = options.gptq or options.bias_correction or options.weight_correction
    return wanted or options.approach != "dynamic" or any(rule.approaches[0] == "static" for rule in options.rules)


def _calibration_batches(
    model: nn.Module,
    conf: PostTrainingQuantConfig,
    samples: int,
    dataloader: Iterable[Any] | None,
    function: Callable[[nn.Module], Any] | None,
) -> list[dict[str, Any]]:
    """Model inputs to calibrate on; where the approach needs none, an example to find the layers with, or nothing."""
    if dataloader is not None:
        return take(model, dataloader, samples)
    if function is not None:
        return take(model, _recorded(model, function, samples), samples)
    example = conf.example_inputs if conf.example_inputs is not None else getattr(model, "dummy_inputs", None)
    return [] if example is None else take(model, [example], samples)


def _recorded(model: nn.Module, function: Callable[[nn.Module], Any], samples: int) -> list[dict[str, Any]]:
    """What `function` calls the model with."""
    calls: list[dict[str, Any]] = []
    seen = 0
    forward = model.forward

    @functools.wraps(forward)  # inputs are bound to its signature
    def recorded(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        if seen >= samples:
            raise _EnoughError
        calls.append(bind_call(model, args, kwargs))
        seen += next((len(leaf) for leaf in tree_leaves(calls[-1]) if isinstance(leaf, Tensor) and leaf.dim()), 1)
        return forward(*args, **kwargs)

    own = vars(model).get("forward")
    model.forward = recorded  # not a hook, which callers of `forward` pass by
    try:
        with unchanged(model):
            function(model)
    except _EnoughError:
        pass
    finally:
        del model.forward
        if own is not None:
            model.forward = own
    if not calls:
        raise ValueError(f"calib_func {function!r} did not call the model: there is nothing to calibrate on.")
    return calls


def score_of(evaluate: Evaluate, model: nn.Module) -> float:
    """What `evaluate` says of a model. Raises `TypeError`, `HfqError` where that is no number."""
    score: Any = evaluate(model)
    try:
        number = float(score)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"eval_func returned {score!r}, a {type(score).__name__}; expected the score as a number."
        ) from error
    if number != number:
        raise HfqError("eval_func returned NaN: its score says nothing about the model.")
    return number


def metric_evaluation(dataloader: Iterable[Any], metric: Any) -> Evaluate:
    """An `eval_func` that runs a dataloader and updates a metric with (predicted classes or values, labels)."""
    import torchmetrics

    counts_right = metric == "accuracy"
    found = torchmetrics.MeanMetric() if counts_right else metric
    if not isinstance(found, torchmetrics.Metric):
        raise TypeError(
            f"eval_metric is {metric!r}, a {type(metric).__name__}; expected a torchmetrics.Metric or 'accuracy'."
        )

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> float:
        found.reset()
        batches = 0
        for batches, batch in enumerate(dataloader, 1):  # noqa: B007 (counts them)
            answer = next(leaf for leaf in tree_leaves(model(**bind(model, batch))) if isinstance(leaf, Tensor))
            labels = _labels(batch)
            found.update(*(((answer.argmax(-1) == labels).float(),) if counts_right else (answer, labels)))
        if not batches:
            raise ValueError("eval_dataloader yields no batch: there is nothing to evaluate on.")
        return float(found.compute())

    return evaluate


def _labels(batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in LABELS if name in batch), None)
    else:
        found = batch[-1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if found is None:
        raise TypeError("A batch of eval_dataloader has no labels: expected a key 'labels', or (input, label).")
    return torch.as_tensor(found)


@contextmanager
def _inference(model: nn.Module) -> Any:
    """Evaluation mode while the float model is read; each module's own mode afterwards.

    torch's transformer layers run module by module meanwhile: their fast path passes nested tensors, and hooks by.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode


def report_of(
    model: nn.Module,
    found: Found,
    conf: Config,
    baseline: float | None,
    seconds: float,
    log: TrialLog,
    batches: Sequence[Mapping[str, Any]],
    ui: Reporter,
) -> Report:
    """What was done to `model`. `seconds`: of its own evaluation."""
    trial = found.outcome.trial
    goal = goal_of(conf, baseline)
    int8 = quantize_model(model, found.plan, found.space.folds)
    return Report(
        hfq_version=__version__,
        checkpoint=CheckpointInfo(type(model).__name__, "in memory"),
        metric="score",
        metric_label="Score",
        metric_in_points=False,
        goal=goal,
        approach=found.outcome.candidate.approach,
        chosen=found.outcome.candidate.name,
        met=found.outcome.met if trial is not None else None,
        trials=log.trials,
        ranking=log.ranking,
        baseline=Measurement(baseline, None if trial is None else seconds, memory_mib(model), state_mib(model)),
        quantized=Measurement(
            None if trial is None else trial.accuracy,
            None if trial is None else trial.duration_s,
            memory_mib(int8),
            state_mib(int8),
        ),
        layers=layers_of(found),
        calibration_batches=len(batches),
        seed=conf.tuning_criterion.seed,
        created=now(),
        hardware=hardware(),
        versions=package_versions(),
        warnings=list(ui.warnings),
    )


def goal_of(conf: Config, baseline: float | None) -> Goal:
    """What a configuration tolerates."""
    accuracy = conf.accuracy_criterion
    return Goal(baseline, accuracy.tolerable_loss, accuracy.criterion, accuracy.higher_is_better)


def goal_missed(report: Report) -> GoalNotMetError:
    """The error that says so."""
    goal, best = report.goal, report.quantized.accuracy
    return GoalNotMetError(
        f"No trial met the goal: at most {goal.tolerable_loss:g} {goal.kind} loss from {report.baseline.accuracy:.4f}. "
        f"Best of {len(report.trials)}: {report.chosen}, {best:.4f}. Allow a larger tolerable_loss, more max_trials, or "
        "approach='auto'.",
        details=report.as_dict(),
    )
