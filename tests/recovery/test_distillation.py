"""Fine-tuning in int8: what is computed meanwhile is what int8 computes, and it comes nearer to the float model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import logits, make_space, relative_error, tiny, token_batches
from torch import nn

from hfq.common.copies import deep_copy
from hfq.ptq.convert import quantize_model
from hfq.ptq.scheme import Plan
from hfq.recovery.distillation import Schedule, distill
from hfq.recovery.fake_quantization import fake_quantize, learned, rounded, train_what_is_rounded
from hfq.tuning.candidates import Candidate

BATCHES = token_batches(4)
SCHEDULE = Schedule(steps=48, look_after=16, weights_rate=3e-5, scales_rate=3e-2)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny()


def coarse(model: nn.Module, approach: Any = "static") -> Plan:
    """A plan whose input scales are four times too large."""
    plan = make_space(model, BATCHES).plan(Candidate(approach))
    layers = {name: replace(scheme, input_scale=4 * scheme.input_scale) for name, scheme in plan.layers.items()}
    return replace(plan, layers=layers)


def student_of(teacher: nn.Module, plan: Plan) -> nn.Module:
    student = deep_copy(teacher)
    fake_quantize(student, plan)
    train_what_is_rounded(student, plan)
    return student


@pytest.mark.parametrize("approach", ["static", "dynamic"])
def test_a_student_answers_as_the_int8_model_that_is_made_of_it(teacher: nn.Module, approach: str) -> None:
    plan = coarse(teacher, approach)
    student = student_of(teacher, plan)
    int8 = quantize_model(*learned(student, teacher, plan), ())
    assert relative_error(logits(int8, BATCHES), logits(student, BATCHES)) < 0.2 * relative_error(
        logits(int8, BATCHES), logits(teacher, BATCHES)
    )


def test_training_brings_it_nearer_to_the_teacher_whose_weights_stay(teacher: nn.Module, tmp_path: Path) -> None:
    plan, before = coarse(teacher), {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = student_of(teacher, plan)
    untrained = quantize_model(*learned(student, teacher, plan), ())
    looks: list[int] = []
    distill(
        student, teacher, BATCHES, schedule=SCHEDULE, look=lambda n, _: looks.append(n) or False, state=tmp_path / "s"
    )
    trained = quantize_model(*learned(student, teacher, plan), ())
    errors = [relative_error(logits(model, BATCHES), logits(teacher, BATCHES)) for model in (untrained, trained)]
    assert errors[1] < 0.75 * errors[0]
    assert looks == [16, 32, 48]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_an_interrupted_training_ends_as_one_that_was_not(teacher: nn.Module, tmp_path: Path) -> None:
    plan = coarse(teacher)
    whole, parts = (student_of(teacher, plan) for _ in range(2))
    distill(whole, teacher, BATCHES, schedule=SCHEDULE, look=lambda *_: False, state=tmp_path / "whole")
    state = tmp_path / "parts"
    distill(parts, teacher, BATCHES, schedule=SCHEDULE, look=lambda *_: True, state=state)
    again = student_of(teacher, plan)
    distill(again, teacher, BATCHES, schedule=SCHEDULE, look=lambda *_: False, state=state)
    assert relative_error(logits(again, BATCHES), logits(whole, BATCHES)) < 1e-5


def test_what_is_kept_is_looked_at_again_and_only_trained_on_by_the_same_layers(
    teacher: nn.Module, tmp_path: Path
) -> None:
    plan, state, looks = coarse(teacher), tmp_path / "kept", []

    def look(steps: int, loss: float) -> bool:
        looks.append((steps, loss))
        return True

    for _ in range(2):
        distill(student_of(teacher, plan), teacher, BATCHES, schedule=SCHEDULE, look=look, state=state)
    assert looks == [looks[0]] * 2
    assert looks[0][1] > 0
    *_, last = plan.layers
    fewer = replace(plan, layers={name: scheme for name, scheme in plan.layers.items() if name != last})
    distill(student_of(teacher, fewer), teacher, BATCHES, schedule=SCHEDULE, look=look, state=state)
    assert looks[2][0] == SCHEDULE.look_after
    assert looks[2][1] != looks[0][1]


def test_clipped_values_pull_the_scale_and_get_no_gradient() -> None:
    x = torch.tensor([0.4, 300.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    rounded(x, scale, (-127, 127)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 0.0]
    assert scale.grad is not None and scale.grad.item() == pytest.approx(127 + (0 - 0.4))
