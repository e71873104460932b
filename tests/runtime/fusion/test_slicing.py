"""Ragged and large batches run in slices, and answer as they do whole."""

import copy
import pickle
from typing import Any

import pytest
import torch
from support.command import CHECKPOINT, DEMO
from support.models import ROUNDING, quantized, relative_error, tiny, token_batches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hfq
from hfq.runtime.fusion import slicing
from hfq.runtime.fusion.flow import ignores_padding
from hfq.runtime.fusion.fuse import fuse
from hfq.runtime.fusion.slicing import slice_batches, slices
from hfq.tuning.candidates import Candidate

Forward = tuple[list[tuple[int, ...]], Any]


class Embedded(TorchDispatchMode):
    """Notes the shapes of ids that are looked up in `table`."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.seen = table, list[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default and args[0].data_ptr() == self.table.data_ptr():
            self.seen.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def shapes_of(model: Any, run: Any) -> Forward:
    """Shapes of the ids that reach the embedding, and what the model returned. No hook: it would see the whole batch."""
    with torch.inference_mode(), Embedded(model.get_input_embeddings().weight) as embedded:
        outputs = run(model)
    return embedded.seen, outputs


def take_slices(model: Any) -> None:
    """As `fuse` has it, of a model whose answers do not depend on padding."""
    slice_batches(model)
    model.forward.cuts_padding = ignores_padding(model, model.dummy_inputs)
    assert model.forward.cuts_padding


def ragged(rows: int = 24, length: int = 60, *, left: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (rows, length), generator=generator)
    lengths = torch.randint(5, length, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Roberta", "Electra", "MPNet"])
def test_slices_answer_as_the_whole_batch_and_compute_less_padding(family: str) -> None:
    model = quantized(tiny(family), Candidate("static"), token_batches(2))
    batch = ragged()
    whole, expected = shapes_of(model, lambda m: m(**batch).logits)
    take_slices(model)
    parts, found = shapes_of(model, lambda m: m(**batch).logits)
    assert whole == [(24, 60)] and len(parts) > 1
    assert sum(rows for rows, _ in parts) == 24
    assert sum(rows * length for rows, length in parts) < 24 * 50
    assert relative_error(found, expected) < ROUNDING


def test_a_large_batch_is_cut_and_a_small_even_one_is_not() -> None:
    model = tiny()
    take_slices(model)
    size = slicing.tokens_at_once() // 64
    ids = torch.randint(5, 200, (2 * size + 8, 64))
    parts, logits = shapes_of(model, lambda m: m(ids).logits)
    assert parts == [(size, 64), (size, 64), (8, 64)] and logits.shape == (2 * size + 8, 3)
    assert shapes_of(model, lambda m: m(input_ids=ids[:8]).logits)[0] == [(8, 64)]


@pytest.mark.parametrize("rows, longest, computed", [(1, 9, 16), (4, 16, 16), (3, 17, 32), (2, 49, 60), (1, 0, 1)])
def test_padding_that_no_row_needs_is_cut_off_to_a_multiple_of_16(rows: int, longest: int, computed: int) -> None:
    model = tiny()
    batch = {name: tensor[:rows] for name, tensor in ragged().items()}
    batch["attention_mask"] = (torch.arange(60) < longest).long().repeat(rows, 1)
    whole, expected = shapes_of(model, lambda m: m(**batch).logits)
    take_slices(model)
    parts, found = shapes_of(model, lambda m: m(**batch).logits)
    assert whole == [(rows, 60)] and parts == [(rows, computed)]
    assert longest == 0 or relative_error(found, expected) < 1e-4


def test_left_padding_is_never_cut_off() -> None:
    model = tiny()
    batch = ragged(left=True)
    with torch.inference_mode():
        expected = model(**batch).logits
    take_slices(model)
    parts, found = shapes_of(model, lambda m: m(**batch).logits)
    assert {length for _, length in parts} == {60}
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("arguments", [{"labels": torch.zeros(24, dtype=torch.long)}, {"output_hidden_states": True}])
def test_what_is_more_than_one_row_of_logits_is_answered_whole(arguments: dict[str, Any]) -> None:
    model, batch = tiny(), ragged()
    expected = shapes_of(model, lambda m: m(**batch, **arguments))[1]
    take_slices(model)
    parts, found = shapes_of(model, lambda m: m(**batch, **arguments))
    assert parts == [(24, 60)]
    assert torch.equal(found[0], expected[0])


def test_slices_are_the_same_however_a_model_is_called() -> None:
    model, batch = tiny(), ragged()
    take_slices(model)
    parts, expected = shapes_of(model, lambda m: m(**batch).logits)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for call in (
        lambda m: m(ids, mask, return_dict=False)[0],
        lambda m: m(ids, attention_mask=mask, labels=None, output_attentions=False, return_dict=True).logits,
    ):
        again, found = shapes_of(model, call)
        assert again == parts
        assert torch.equal(found, expected)


def test_token_outputs_are_answered_whole() -> None:
    model: Any = tiny().bert
    batch = ragged()
    slice_batches(model)
    _, outputs = shapes_of(model, lambda m: m(**batch))
    assert outputs.last_hidden_state.shape == (24, 60, 64)
    assert shapes_of(model, lambda m: m(**batch))[0] == [(24, 60)]  # and tried once only


def test_copies_slice_with_their_own_weights() -> None:
    model, batch = tiny(), ragged()
    take_slices(model)
    before = shapes_of(model, lambda m: m(**batch).logits)[1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.classifier.bias.data += 1
        assert relative_error(shapes_of(other, lambda m: m(**batch).logits)[1], before + 1) < 1e-5
    assert torch.equal(shapes_of(model, lambda m: m(**batch).logits)[1], before)


def test_rows_without_a_single_token_are_answered() -> None:
    model, batch = tiny(), ragged()
    batch["attention_mask"][3] = 0
    take_slices(model)
    assert shapes_of(model, lambda m: m(**batch).logits)[1].isfinite().all()


@pytest.mark.parametrize("family", ["ConvBert", "FNet"])
def test_padding_that_counts_is_not_cut_off(family: str) -> None:
    model = quantized(tiny(family), Candidate("dynamic"), token_batches(2))
    batch = ragged()
    expected = shapes_of(model, lambda m: m(**batch).logits)[1]
    fuse(model)
    assert relative_error(shapes_of(model, lambda m: m(**batch).logits)[1], expected) < 1e-3
    ids = torch.randint(5, 200, (2 * slicing.tokens_at_once() // 64, 64))
    assert len(shapes_of(model, lambda m: m(input_ids=ids).logits)[0]) == 2  # slices of rows are no harm


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
def test_a_traced_model_takes_other_lengths() -> None:
    model, batch, other = tiny(), ragged(), ragged(left=True)
    take_slices(model)

    class Logits(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = model(input_ids=ids, attention_mask=mask).logits
            return y

    with torch.inference_mode():
        traced = torch.jit.trace(Logits(), tuple(batch.values()), check_trace=False)
        assert relative_error(traced(*other.values()), model(**other).logits) < 1e-4


def test_every_row_is_in_one_slice() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in (0, 1, 7, 300):
        lengths = torch.randint(0, 600, (rows,), generator=generator).tolist()
        found = slices(lengths)
        assert sorted(row for part in found for row in part) == list(range(rows))
        assert all(len(part) == 1 or len(part) * lengths[part[-1]] <= slicing.tokens_at_once() for part in found)


def test_batches_by_length_hold_little_padding_and_give_the_answers_in_order() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForSequenceClassification.from_pretrained(CHECKPOINT)
    texts = [line.partition(",")[0] for line in (DEMO / "data" / "test.csv").read_text().splitlines()[1:61]]
    encodings = tokenizer(texts, truncation=True)
    lengths = [len(ids) for ids in encodings["input_ids"]]
    found = torch.empty(len(texts), model.config.num_labels)
    seen, computed = [], 0
    with torch.inference_mode():
        for rows, batch in hfq.by_length(encodings, tokenizer, most_tokens=256):
            assert batch["input_ids"].shape == (len(rows), max(lengths[row] for row in rows))
            assert len(rows) == 1 or batch["input_ids"].numel() <= 256
            seen += rows
            computed += batch["input_ids"].numel()
            found[rows] = model(**batch).logits
        expected = model(**tokenizer(texts, truncation=True, padding=True, return_tensors="pt")).logits
    assert sorted(seen) == list(range(len(texts))) and [lengths[row] for row in seen] == sorted(lengths)
    assert computed < 1.2 * sum(lengths) and 2 * computed < len(texts) * max(lengths)
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("setting, sliced", [("exact", True), ("activation", False), ("none", False)])
def test_slicing_can_be_turned_off(setting: str, sliced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_FUSIONS", setting)
    model: nn.Module = quantized(tiny(), Candidate("dynamic"), token_batches(2))
    fuse(model)
    assert (len(shapes_of(model, lambda m: m(**ragged()).logits)[0]) > 1) == sliced
