"""`hfq.compile`: same answers, lengths in buckets, and an uncompiled model where nothing can or need be compiled."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from models import logits, quantized, relative_error, tiny, token_batches
from transformers import AutoModel, BertModel

import hfq
from hfq.runtime import compiling
from hfq.tuning.candidates import Candidate

BATCHES = token_batches(2)


needs_compiler = pytest.mark.skipif(not compiling.has_compiler(), reason="no C++ compiler on this machine")


def compiled(model: Any) -> Any:
    return hfq.compile(model)


@needs_compiler
def test_compiled_model_answers_as_before_and_compiles_once_a_bucket() -> None:
    model = quantized(tiny(), Candidate("static"), BATCHES)
    inputs = [{name: value[:, :length] for name, value in BATCHES[0].items()} for length in (12, 9, 7)]
    before = [logits(model, [batch]) for batch in inputs]
    model = compiled(model)
    after = [logits(model, [batch]) for batch in inputs]
    for a, b in zip(after, before, strict=True):
        assert relative_error(a, b) < 0.02
    assert model.forward.shapes == {(16, 16)}


@needs_compiler
def test_token_outputs_are_cut_back_to_the_length_that_came_in() -> None:
    model: Any = tiny().bert
    assert isinstance(model, BertModel)
    ids = BATCHES[0]["input_ids"][:2, :10]
    with torch.inference_mode():
        expected = model(input_ids=ids).last_hidden_state
        found = compiled(model)(input_ids=ids).last_hidden_state
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 1e-3


@needs_compiler
def test_what_is_large_or_unusual_runs_as_it_did() -> None:
    model: Any = tiny(max_position_embeddings=600)
    ids = torch.randint(5, 200, (40, 64))
    labels = torch.zeros(2, dtype=torch.long)
    with torch.inference_mode():
        before = [model(input_ids=ids).logits, model(input_ids=ids[:2, :9], labels=labels).loss]
        model = compiled(model)
        after = [model(input_ids=ids).logits, model(input_ids=ids[:2, :9], labels=labels).loss]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not model.forward.shapes
    assert "attention_mask" in inspect.signature(model.forward).parameters


@needs_compiler
def test_no_more_shapes_are_compiled_than_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MOST_SHAPES", 0)
    model = tiny()
    before = logits(model, BATCHES)
    assert torch.equal(logits(compiled(model), BATCHES), before)


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
