"""`hfq.compile`: same answers at every shape from two compilations, and an uncompiled model where nothing can be compiled."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from models import logits, quantized, relative_error, tiny, token_batches
from torch._dynamo.utils import counters
from transformers import AutoModel

import hfq
from hfq.runtime import compiling
from hfq.runtime.fusion import fuse
from hfq.tuning.candidates import Candidate

BATCHES = token_batches(2)


needs_compiler = pytest.mark.skipif(not compiling.has_compiler(), reason="no C++ compiler on this machine")


def compiled(model: Any) -> Any:
    return hfq.compile(model)


@needs_compiler
@pytest.mark.parametrize("approach", ["static", "dynamic"])
def test_every_shape_is_answered_as_before_from_two_compilations(approach: Any) -> None:
    batch = token_batches(1, rows=40, length=64)[0]
    shapes = [(16, 12), (1, 9), (5, 9), (40, 64), (1, 64), (2, 3)]  # the fourth runs in slices
    inputs = [{name: value[:rows, :length] for name, value in batch.items()} for rows, length in shapes]
    model = quantized(tiny(num_hidden_layers=1), Candidate(approach), BATCHES)
    fuse(model)
    before = [logits(model, [batch]) for batch in inputs]
    torch._dynamo.reset()
    counters.clear()
    model = compiled(model)
    after = [logits(model, [batch]) for batch in inputs]
    for a, b in zip(after, before, strict=True):
        assert relative_error(a, b) < 0.02
    assert counters["stats"]["unique_graphs"] == 2


@needs_compiler
def test_inputs_with_more_or_fewer_parts_are_told_apart() -> None:
    model: Any = tiny(num_hidden_layers=1).bert
    ids = BATCHES[0]["input_ids"][:2, :10]
    inputs = [{"input_ids": ids}, {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}]
    with torch.inference_mode():
        expected = [model(**given).last_hidden_state for given in inputs]
        model = compiled(model)
        found = [model(**given).last_hidden_state for given in (*inputs, *inputs)]
    for a, b in zip(found, expected * 2, strict=True):
        assert relative_error(a, b) < 1e-3


@needs_compiler
def test_what_is_unusual_runs_as_it_did() -> None:
    model: Any = tiny()
    ids = torch.randint(5, 200, (2, 9))
    labels = torch.zeros(2, dtype=torch.long)
    with torch.inference_mode():
        before = model(input_ids=ids, labels=labels).loss
    trained = model(input_ids=ids).logits
    model = compiled(model)
    counters.clear()
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids, labels=labels).loss, before)
    assert torch.equal(model(input_ids=ids).logits, trained)  # with gradients
    assert not counters["stats"]
    assert "attention_mask" in inspect.signature(model.forward).parameters


def test_without_a_compiler_the_model_is_returned_with_a_warning(tmp_path: Path) -> None:
    model = tiny()
    no_compiler = inductor.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)})
    with no_compiler, pytest.warns(UserWarning, match=r"C\+\+ compiler"):
        assert hfq.compile(model) is model
    assert torch.equal(logits(model, BATCHES), logits(tiny(), BATCHES))


@needs_compiler
def test_compiled_model_can_still_be_saved(tmp_path: Path) -> None:
    model = compiled(tiny().bert)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
