"""Quantization-aware training in a loop of the user's own, with Neural Compressor's names.

Without a loop, or labels, `hfq quantize --recover` trains by itself.
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .common.copies import deep_copy
from .common.ui import Reporter
from .config import QuantizationAwareTrainingConfig
from .ptq.convert import quantize_model
from .ptq.inputs import bind
from .ptq.observers import BINS, InputStatistics
from .quantization import goal_missed, goal_of, in_float32, metric_evaluation, report_of, score_of
from .quantized import quantized_like
from .recovery.fake_quantization import fake_quantize, learned
from .runtime.fusion.fuse import fuse
from .tuning.candidates import RECOVERED, Candidate, Space
from .tuning.log import TrialLog
from .tuning.options import Options
from .tuning.search import Outcome
from .tuning.trial import Trial
from .tuning.tuner import Calibration, Found, prepare

OBSERVED = 16  # forwards in training that make an input's range, before it is learned


class CallBacks:
    """What a training loop calls. Only the beginning and the end do something; the others are there for loops that call
    them, and for their losses to pass through.
    """

    def __init__(self, manager: "CompressionManager") -> None:
        self._manager = manager

    def on_train_begin(self, dataloader: Any = None) -> None:
        """Put the model into training mode."""
        self._manager.model.train()

    def on_train_end(self) -> None:
        """Make the int8 model of what was learned: `manager.model` from now on."""
        self._manager.convert()

    def on_epoch_begin(self, epoch: int) -> None: ...

    def on_epoch_end(self) -> None: ...

    def on_step_begin(self, batch_id: int) -> None: ...

    def on_step_end(self) -> None: ...

    def on_after_compute_loss(
        self, input: Any, student_output: Any, student_loss: Any, teacher_output: Any = None
    ) -> Any:
        """The loss as it is."""
        return student_loss

    def on_before_optimizer_step(self) -> None: ...

    def on_after_optimizer_step(self) -> None: ...


class CompressionManager:
    """A model in training that computes what int8 will. `prepare_compression` makes one.

    `model`: what is to be trained: a copy that rounds weights and inputs, whose scales are parameters too; after
    `callbacks.on_train_end()` the int8 model, with `save`, `report` and `push_to_hub`.
    """

    def __init__(self, model: nn.Module, conf: QuantizationAwareTrainingConfig) -> None:
        self.conf = conf
        self.callbacks = CallBacks(self)
        self._given = model
        self._floats = in_float32(model)
        self._space = _space(self._floats, conf)
        self._plan = self._space.plan(Candidate("dynamic" if conf.options().approach == "dynamic" else "static"))
        self.model: Any = deep_copy(self._floats)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()
        fake_quantize(self.model, self._plan, observes=OBSERVED)

    def convert(
        self, evaluate: Callable[[nn.Module], float] | None = None, baseline: float | None = None
    ) -> tuple[bool, Any]:
        """Make `model` the int8 one. Returns whether it meets the goal, and its report.

        Raises:
            ValueError: it was not trained, so nothing is known of its inputs.
        """
        student = self.model
        if any(
            getattr(module, "observes", 0) == OBSERVED and module.scheme.approach == "static"
            for module in student.modules()
        ):
            raise ValueError(
                "The model was not run in training mode: nothing is known of its layers' inputs. Train it first."
            )
        floats, plan = learned(student, self._floats, self._plan)
        floats.eval().requires_grad_(False)
        int8 = quantize_model(floats, plan, ())
        fuse(int8)
        started = time.monotonic()
        score = None if evaluate is None else score_of(evaluate, int8)
        goal = goal_of(self.conf, baseline)
        met = score is None or goal.met(score)
        candidate = Candidate("static" if self.conf.options().approach == "static" else "dynamic", RECOVERED)
        trial = (
            None
            if score is None
            else Trial(candidate.name, score, time.monotonic() - started, met, loss=goal.loss(score))
        )
        space = Space(floats, self._space.layers, {}, (), options=self.conf.options(), learned=plan)
        with tempfile.TemporaryDirectory(prefix="hfq-") as folder:
            log = TrialLog(Path(folder) / "trials.jsonl", depends_on={}, resume=False)
            if trial is not None:
                log.add(trial)
            found = Found(space, Outcome(candidate, trial, met), plan)
            report = report_of(floats, found, self.conf, baseline, 0.0, log, (), Reporter())
        self.model = quantized_like(self._given, int8, plan=plan, report=report, example=None)
        return met, report

    def save(self, root: str | Path) -> None:
        """Write the int8 model, as `Quantized.save` does."""
        self.model.save(root)


def prepare_compression(
    model: nn.Module, confs: QuantizationAwareTrainingConfig | list[QuantizationAwareTrainingConfig]
) -> CompressionManager:
    """Begin quantization-aware training of a copy of `model`, which stays as it is.

    Args:
        confs: a `QuantizationAwareTrainingConfig`, or a list with one. Pruning and distillation are not for hfq.

    Raises:
        TypeError: an argument of the wrong kind.
        UnsupportedError: the model has no layer that can run in int8.

    Example:
        >>> manager = prepare_compression(model, QuantizationAwareTrainingConfig())
        >>> manager.callbacks.on_train_begin()
        >>> train(manager.model)
        >>> manager.callbacks.on_train_end()
        >>> manager.save("./saved_model/")
    """
    conf: Any = confs[0] if isinstance(confs, list) and len(confs) == 1 else confs
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}, a {type(model).__name__}; expected a torch.nn.Module.")
    if not isinstance(conf, QuantizationAwareTrainingConfig):
        raise TypeError(f"confs is {confs!r}; expected one hfq.config.QuantizationAwareTrainingConfig.")
    return CompressionManager(model, conf)


def fit(
    compression_manager: CompressionManager,
    train_func: Callable[[nn.Module], Any],
    eval_func: Callable[[nn.Module], float] | None = None,
    eval_dataloader: Iterable[Any] | None = None,
    eval_metric: Any = None,
) -> Any:
    """Train by `train_func`, which is given the model, and return it in int8.

    Args:
        eval_func, eval_dataloader, eval_metric: as of `hfq.quantization.fit`; without them nothing is known of its score.

    Raises:
        GoalNotMetError: the score lost more than the configuration tolerates.
    """
    evaluate = eval_func
    if evaluate is None and eval_dataloader is not None:
        evaluate = metric_evaluation(eval_dataloader, eval_metric)
    floats = deep_copy(compression_manager._floats).eval()
    with torch.no_grad():
        baseline = None if evaluate is None else score_of(evaluate, floats)
    compression_manager.callbacks.on_train_begin()
    train_func(compression_manager.model)
    met, report = compression_manager.convert(evaluate, baseline)
    if not met:
        raise goal_missed(report)
    return compression_manager.model


def _space(model: nn.Module, conf: QuantizationAwareTrainingConfig) -> Space:
    """What may be int8, where nothing was seen of any input yet."""
    options: Options = conf.options()
    given = conf.example_inputs if conf.example_inputs is not None else getattr(model, "dummy_inputs", None)
    example = None if given is None else bind(model, given)
    found = prepare(model, Calibration((), example), options=options, ui=Reporter())
    nothing = torch.zeros(1)
    unseen = {name: InputStatistics(nothing, nothing, 0.0, 0.0, torch.zeros(BINS)) for name in found.layers.layers}
    return Space(model, found.layers, unseen, (), options=options)
