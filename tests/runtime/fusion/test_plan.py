"""Short inputs whose shape comes again run as plans, and answer as the model does by itself."""

from typing import Any

import pytest
import torch
from support.families import FAMILIES
from support.models import int8_linears, quantized, relative_error
from torch import Tensor, nn

from hfq.runtime.fusion.fuse import fuse
from hfq.runtime.fusion.plan import record
from hfq.runtime.fusion.planning import SEEN
from hfq.runtime.int8.packed import pack_all
from hfq.tuning.candidates import Candidate

TEXTS = ("albert", "bert", "bert with words", "deberta", "distilbert", "electra", "modernbert", "mpnet", "roberta")


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 100, shape, generator=torch.Generator().manual_seed(seed))


def batch(rows: int, length: int, *, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
    found = ids(rows, length, seed=seed)
    mask = torch.ones_like(found)
    mask[-1, length - padding :] = 0
    return {"input_ids": found * mask, "attention_mask": mask}


def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return next(iter(model(**inputs).to_tuple()))


def planned(model: Any, *inputs: dict[str, Tensor]) -> int:
    """Have `model` see each of `inputs` until it makes plans. Returns: how many it has."""
    for one in inputs:
        for _ in range(SEEN + 1):
            outputs(model, one)
    return len(model.forward.plans)


def pair(monkeypatch: pytest.MonkeyPatch, family: str = "bert") -> tuple[Any, Any]:
    """An int8 model with the same fusions, without plans and with them."""
    float_model = FAMILIES[family].make()
    found = []
    for fusions in ("activation,residual,requantization,shared-matmul,slices,encoder-layer", "exact"):
        monkeypatch.setenv("HFQ_FUSIONS", fusions)
        model: Any = quantized(float_model, Candidate("static"), [FAMILIES[family].inputs()])
        fuse(model)
        pack_all(model)
        found.append(model)
    return found[0], found[1]


@pytest.mark.parametrize("family", TEXTS)
def test_a_plan_answers_as_the_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = pair(monkeypatch, family)
    assert planned(twin, batch(1, 12), batch(1, 12, padding=3), batch(2, 9)) >= 2
    for rows, length, padding in ((1, 12, 0), (1, 12, 3), (1, 12, 5), (2, 9, 0), (2, 9, 4)):
        inputs = batch(rows, length, padding=padding, seed=1)
        assert relative_error(outputs(twin, inputs), outputs(model, inputs)) < 1e-3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "sized",
    [
        lambda x: x.nonzero(as_tuple=True)[0],
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0)[0],
        lambda x: torch.argwhere(x),
        lambda x: x.flatten().repeat_interleave(x.clamp(min=0).flatten()),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_a_size_that_the_values_decide_makes_no_plan(sized: Any, mode: Any) -> None:
    """Longformer picks its tokens of global attention so: a plan would take those of another text, or none."""
    x = torch.tensor([[3, 0, 2]])
    with mode():
        assert record(lambda x: sized(x) * 2, {"x": x})[1] is None
        assert record(lambda x: x[torch.arange(1), x.argmax(1)] * 2, {"x": x})[1] is not None


def test_what_is_changed_in_the_model_afterwards_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = pair(monkeypatch)
    inputs = batch(1, 12)
    assert planned(twin, inputs)
    state = {name: value + 0.5 if "LayerNorm.bias" in name else value for name, value in model.state_dict().items()}
    for one in (model, twin):
        one.load_state_dict(state)
        one.classifier.bias = nn.Parameter(torch.ones(3), requires_grad=False)
    assert relative_error(outputs(twin, inputs), outputs(model, inputs)) < 1e-3
    layer, other = (next(iter(int8_linears(one).values())) for one in (model, twin))
    for one in (layer, other):
        one.load_state_dict({**one.state_dict(), "weight": one.weight.flip(0)})
    pack_all(twin)
    assert relative_error(outputs(twin, inputs), outputs(model, inputs)) < 1e-3


def test_a_hook_sees_modules_after_a_plan_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair(monkeypatch)
    inputs = batch(1, 12)
    expected = outputs(model, inputs)
    assert planned(model, inputs)
    seen: list[Any] = []
    handle = model.bert.encoder.layer[0].register_forward_hook(lambda *call: seen.append(call))
    assert relative_error(outputs(model, inputs), expected) < 0.05
    assert seen
    handle.remove()
    assert relative_error(outputs(model, inputs), expected) < 1e-3


def test_outputs_are_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair(monkeypatch)
    inputs = batch(1, 12)
    assert planned(model, inputs)
    first = outputs(model, inputs)
    kept = first.clone()
    outputs(model, batch(1, 12, seed=1))
    assert torch.equal(first, kept)
    first.zero_()
    assert relative_error(outputs(model, inputs), kept) < 1e-3


def test_a_model_that_decides_by_its_inputs_has_a_plan_for_each_decision() -> None:
    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.sum() > 0) else -x

    inputs = {"x": torch.ones(3)}
    with torch.inference_mode():
        _, plan = record(lambda x: Deciding()(x * 1.0), inputs)
        assert plan is not None
        assert torch.equal(plan({"x": torch.full((3,), 2.0)}), torch.full((3,), 2.0))
        assert plan({"x": torch.full((3,), -2.0)}) is None


def test_what_writes_to_a_model_has_no_plan() -> None:
    kept = torch.zeros(3)
    with torch.inference_mode():
        found, plan = record(lambda x: kept.add_(x) * 2, {"x": torch.ones(3)})
    assert torch.equal(found, torch.full((3,), 2.0))
    assert plan is None
