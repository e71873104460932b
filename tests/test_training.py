"""Quantization-aware training with Neural Compressor's names: the loop of its documentation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import ROUNDING, logits, relative_error, tiny, token_batches
from torch import nn

import hfq
from hfq.common.errors import GoalNotMetError
from hfq.config import AccuracyCriterion, QuantizationAwareTrainingConfig
from hfq.training import fit, prepare_compression

BATCHES = token_batches(2)


def loop(model: nn.Module, callbacks: Any, targets: list[torch.Tensor], *, rate: float = 1e-4) -> None:
    """A loop that calls every callback."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        for step, (batch, target) in enumerate(zip(BATCHES, targets, strict=True)):
            callbacks.on_step_begin(step)
            output = model(**batch).logits
            loss = callbacks.on_after_compute_loss(batch, output, (output - target).square().mean())
            loss.backward()
            callbacks.on_before_optimizer_step()
            optimizer.step()
            callbacks.on_after_optimizer_step()
            optimizer.zero_grad()
            callbacks.on_step_end()
        callbacks.on_epoch_end()


@pytest.mark.parametrize("approach", ["static", "dynamic"])
def test_what_was_trained_is_saved_in_int8_and_opens_again(approach: str, tmp_path: Path) -> None:
    model = tiny()
    targets = [logits(model, [batch]) for batch in BATCHES]
    manager = prepare_compression(model, QuantizationAwareTrainingConfig(approach=approach))
    manager.callbacks.on_train_begin()
    loop(manager.model, manager.callbacks, targets)
    manager.callbacks.on_train_end()
    manager.save(tmp_path / "saved")
    int8 = logits(manager.model, BATCHES)
    assert (
        relative_error(logits(hfq.load(tmp_path / "saved"), BATCHES), int8) < ROUNDING
    )  # fused or not, a code may round the other way
    assert relative_error(int8, torch.cat(targets)) < 0.1
    assert len(manager.model.report().layers.float_layers) == 1  # what makes the logits
    assert all(torch.equal(logits(model, [batch]), target) for batch, target in zip(BATCHES, targets, strict=True))


def test_fit_holds_the_goal_against_the_float_score() -> None:
    model = tiny()
    targets = [logits(model, [batch]) for batch in BATCHES]

    def closeness(model: nn.Module) -> float:
        return 1 - relative_error(logits(model, BATCHES), torch.cat(targets))

    def train(loss_allowed: float, rate: float) -> Any:
        conf = QuantizationAwareTrainingConfig(accuracy_criterion=AccuracyCriterion(tolerable_loss=loss_allowed))
        manager = prepare_compression(model, conf)
        return fit(manager, lambda student: loop(student, manager.callbacks, targets, rate=rate), eval_func=closeness)

    int8 = train(0.1, 1e-4)
    assert [trial.accepted for trial in int8.trials] == [True]
    assert int8.trials[0].accuracy == pytest.approx(closeness(int8))
    with pytest.raises(GoalNotMetError, match="No trial met the goal"):
        train(0.001, 0.1)


def test_a_model_that_was_not_trained_is_refused() -> None:
    manager = prepare_compression(tiny(), QuantizationAwareTrainingConfig())
    with pytest.raises(ValueError, match="Train it first"):
        manager.callbacks.on_train_end()


def test_other_configurations_are_refused() -> None:
    with pytest.raises(TypeError, match="expected one hfq"):
        prepare_compression(tiny(), object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend is 'ipex'"):
        QuantizationAwareTrainingConfig(backend="ipex")
