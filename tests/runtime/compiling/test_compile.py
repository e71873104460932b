"""`hfq.compile`: same answers at every shape from two compilations that are kept, and an uncompiled model where nothing
can be compiled.
"""

import copy
import inspect
import pickle
import shutil
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import int8_linears, logits, quantized, relative_error, tiny, token_batches
from torch._dynamo.utils import counters
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)
from transformers.models.bert.modeling_bert import BertPooler

import hfq
from hfq.quantized import quantized_like
from hfq.runtime.compiling import compile as compiling
from hfq.runtime.compiling.blocked import in_blocks
from hfq.runtime.fusion.fuse import fuse
from hfq.runtime.int8.linear import Int8Linear
from hfq.runtime.kernels.cpu import can_compile, compiles_to_bfloat16, multiplies_in_tiles
from hfq.runtime.kernels.selection import select_kernel
from hfq.tuning.candidates import Candidate

BATCHES = token_batches(2)
PYTHON = sys.executable
NO_COMPILER = "no-such-compiler"
ROUNDED = 0.05 if compiles_to_bfloat16() else 0.02  # of codes that round another way, relative to all answers


pytestmark = pytest.mark.usefixtures("forked_workers")
needs_compiler = pytest.mark.skipif(not compiling.has_compiler(), reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled graphs are kept, empty."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    counters.clear()
    return tmp_path / "cache"


def kept(cache: Path) -> list[Path]:
    """Compiled graphs on disk."""
    return sorted(cache.glob("*/*/graph.so"))


def matmuls_are_compiled() -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == "AVX512" or (capability == "AVX2" and select_kernel().name != "onednn")


def cut(batch: dict[str, torch.Tensor], *shapes: tuple[int, int]) -> list[dict[str, torch.Tensor]]:
    return [{name: value[:rows, :length] for name, value in batch.items()} for rows, length in shapes]


def with_large_weights(model: Any) -> Any:
    """Sums of products as large as they can be: codes that round another way count for more."""
    for layer in int8_linears(model).values():
        layer.weight.copy_(layer.weight.sign() * 127)
    return model


def with_large_head(model: Any) -> Any:
    """Answers far from zero, and from each other."""
    torch.nn.init.normal_(model.classifier.weight)
    return model


def answers_as_before(model: Any, inputs: list[dict[str, torch.Tensor]], *, within: float = ROUNDED) -> None:
    """Fuse and compile `model`, and see that its answers stay."""
    fuse(model)
    before = [logits(model, [batch]) for batch in inputs]
    model = hfq.compile(model)
    for batch, expected in zip(inputs, before, strict=True):
        assert relative_error(logits(model, [batch]), expected) < within


def assert_same_in_every_spelling(model: Any, batch: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    """See that a compiled `model` says the same to the same, however it is called."""
    ids, mask, types = (batch[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    with torch.inference_mode():
        calls = [
            model(ids, mask, types),
            model(ids, attention_mask=mask, token_type_ids=types, return_dict=True),
            model(**batch, labels=None, inputs_embeds=None, output_attentions=False, output_hidden_states=False),
        ]
        as_tuple = model(**batch, return_dict=False)
    calls.append(model(**batch))  # no parameter wants a gradient
    assert all(torch.equal(outputs.logits, expected) for outputs in calls)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(*as_tuple, expected)


@needs_compiler
def test_every_shape_is_answered_as_before_from_two_compilations_that_outlive_the_process(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with static layers and with dynamic ones, for tokens of two kinds."""
    batch = token_batches(1, rows=40, length=64)[0]
    batch["token_type_ids"] = torch.arange(64).remainder(3).eq(0).long().expand(40, 64)
    inputs = cut(batch, (16, 12), (1, 9), (5, 9), (40, 64), (1, 64), (2, 3))  # the fourth runs in slices
    (none,) = cut(batch, (0, 9))
    dynamic = tuple(f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value"))
    model = quantized(tiny(num_hidden_layers=1), Candidate("static", dynamic_layers=dynamic), BATCHES)
    again, another = copy.deepcopy(model), copy.deepcopy(model)
    fuse(model)
    before = [logits(model, [batch]) for batch in inputs]
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", PYTHON)  # inductor has read CXX where the others are forked
        broken.setenv("CXX", shutil.which("false") or "")
        broken.delenv("TORCHINDUCTOR_VEC_ISA_OK", raising=False)
        with pytest.warns(UserWarning, match="runs uncompiled"):
            answers_as_before(another, inputs[:1])
    assert not list(cache.glob("*/*/refused.txt")), "it is tried again"

    model = hfq.compile(model)
    with pytest.raises(RuntimeError, match="0 elements"):  # transformers' own error
        logits(model, [none])
    after = [logits(model, [batch]) for batch in inputs]
    for a, b in zip(after, before, strict=True):
        assert relative_error(a, b) < ROUNDED
    with pytest.raises(RuntimeError, match="0 elements"):
        logits(model, [none])
    assert not torch.equal(after[1], before[1]), "or what follows shows nothing"
    assert_same_in_every_spelling(model, inputs[1], after[1])
    assert len(kept(cache)) == 2
    assert not counters["stats"]  # nothing was compiled in this process
    with torch.inference_mode():
        answer = model(**inputs[1]).logits
    gone = weakref.ref(answer)
    del answer
    assert gone() is None, "an answer is freed with its last user"

    monkeypatch.setenv("CXX", NO_COMPILER)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_in_every_spelling(twin, inputs[1], after[1])
    fitted = quantized_like(model, copy.deepcopy(again), plan=None, report=None, example=None)  # what `fit` returns
    fuse(fitted)
    assert torch.equal(logits(hfq.compile(fitted), [inputs[1]]), after[1])
    fuse(again)
    again = hfq.compile(again)
    assert all(torch.equal(logits(again, [batch]), a) for batch, a in zip(inputs, after, strict=True))
    too_long = torch.ones(1, 600, dtype=torch.long)  # for the model's 512 positions
    with pytest.raises((IndexError, RuntimeError)):
        again(input_ids=too_long)
    # So few rows that each CPU's kernel computes them in the same way, wherever the weights are laid out.
    one_kind = {name: value for name, value in inputs[5].items() if name != "token_type_ids"}
    expected = logits(another, [one_kind])
    assert torch.equal(logits(again, [one_kind]), expected), "other inputs need another graph: it is uncompiled"
    assert relative_error(before[5], expected) > 0.02

    if matmuls_are_compiled():
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # as where nothing is kept for it
            other = quantized(tiny(num_hidden_layers=1, seed=1), Candidate("static", dynamic_layers=dynamic), BATCHES)
            answers_as_before(with_large_weights(other), inputs, within=0.1)

    for_batches, single = kept(cache)
    content = for_batches.read_bytes()
    for_batches.unlink()  # what is loaded stays mapped
    for_batches.write_bytes(content[:-1])
    (single.parent / "graph.json").write_text("null")
    again = hfq.compile(copy.deepcopy(again))
    assert all(torch.equal(logits(again, [inputs[i]]), before[i]) for i in (0, 1))  # uncompiled
    assert not kept(cache)


@needs_compiler
@pytest.mark.skipif(select_kernel().name != "onednn", reason="that is this CPU's own way, which is tested above")
def test_without_vnni_no_sum_saturates(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_ISA", "portable")
    select_kernel.cache_clear()
    model = with_large_weights(quantized(tiny(num_hidden_layers=1), Candidate("static"), BATCHES))
    weights = {name: layer.weight.clone() for name, layer in int8_linears(model).items()}
    answers_as_before(model, cut(BATCHES[0], (16, 12)), within=0.1)
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in int8_linears(model).items())
    select_kernel.cache_clear()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.skipif(not multiplies_in_tiles(), reason="no AMX on this CPU, so no tiles to leave as they were")
def test_rows_that_are_left_over_leave_the_tiles_to_others(two_threads: None) -> None:
    """With these sizes, a thread multiplies the last 20 rows before it goes on with a whole block."""
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}
    model: Any = quantized(tiny(**sizes), Candidate("static"), BATCHES)
    fuse(model)
    model = model.bert
    ids = torch.randint(5, 200, (44, 127))
    with torch.inference_mode():
        expected = model(input_ids=ids).last_hidden_state
        found = hfq.compile(model)(input_ids=ids).last_hidden_state
    assert max(map(relative_error, found.flatten(0, 1), expected.flatten(0, 1))) < 0.1


@needs_compiler
def test_images_of_any_batch_are_answered_as_before_from_one_compilation(cache: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    net = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)).eval()
    images = [{"pixel_values": torch.randn(rows, 3, 32, 32)} for rows in (4, 7, 2)]
    images[1]["pixel_values"] = images[1]["pixel_values"].to(memory_format=torch.channels_last)
    model = quantized(net, Candidate("static"), images)
    answers_as_before(model, images)
    assert len(kept(cache)) == matmuls_are_compiled()
    with pytest.raises(ValueError, match="doesn't match model"):  # transformers' own error
        logits(model, [{"pixel_values": torch.randn(4, 3, 16, 16)}])
    with torch.inference_mode():
        (pixels,) = images[0].values()
        assert torch.equal(model(pixels).logits, model(pixel_values=pixels).logits)
        assert len(model(pixels, output_hidden_states=True).hidden_states) == 2, "it is run uncompiled for more"


@needs_compiler
def test_sounds_of_any_batch_are_answered_as_before_from_one_compilation(cache: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    convolutions = {"conv_dim": (32, 32), "conv_kernel": (8, 3), "conv_stride": (4, 2), "num_conv_pos_embeddings": 16}
    torch.manual_seed(0)
    config = Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embedding_groups=4, classifier_proj_size=16)
    sounds = [{"input_values": torch.randn(rows, 400)} for rows in (4, 3)]
    model = quantized(Wav2Vec2ForSequenceClassification(config).eval(), Candidate("static"), sounds)
    answers_as_before(model, sounds)
    assert len(kept(cache)) == matmuls_are_compiled()


class OwnModel(BertForSequenceClassification):
    """A class that is in no library."""

    def forward(self, **inputs: Any) -> Any:
        return super().forward(**inputs)


@needs_compiler
def test_a_class_of_the_users_own_is_compiled_in_each_process(cache: Path) -> None:
    model: Any = OwnModel(tiny(num_hidden_layers=0).config).eval()
    inputs = cut(BATCHES[0], (3, 7), (5, 9))
    before = [logits(model, [batch]) for batch in inputs]
    model = hfq.compile(model)
    for batch, expected in zip(inputs, before, strict=True):
        assert relative_error(logits(model, [batch]), expected) < 1e-3
    assert counters["stats"]["unique_graphs"] == 1
    assert not kept(cache)


@needs_compiler
@pytest.mark.skipif(not matmuls_are_compiled(), reason="no graph is compiled ahead here")
def test_a_graph_that_answers_otherwise_than_the_model_is_never_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes compile a class as its package has it, so what is changed here makes two of it."""
    forward = BertPooler.forward
    monkeypatch.setattr(BertPooler, "forward", lambda *args, **kwargs: -forward(*args, **kwargs))
    (batch,) = cut(BATCHES[0], (3, 7))
    for _ in range(2):  # in the first process, and in those that find what it kept
        model = with_large_head(quantized(tiny(num_hidden_layers=0), Candidate("static"), BATCHES))
        fuse(model)
        before = logits(model, [batch])
        model = hfq.compile(model)
        with pytest.warns(UserWarning, match="BertForSequenceClassification runs uncompiled.* differ") as said:
            assert torch.equal(logits(model, [batch, batch]), torch.cat([before, before]))
        assert len(said) == 1
    assert not kept(cache)
    assert len(list(cache.glob("*/*/wrong.txt"))) == 1
    assert not counters["stats"]


class Undecided(OwnModel):
    """What it computes depends on its numbers."""

    def forward(self, **inputs: Any) -> Any:
        return super().forward(**inputs) if inputs["input_ids"].sum() else None


@needs_compiler
def test_a_model_that_is_not_one_graph_is_left_as_it_is_and_says_so_once(cache: Path) -> None:
    model: Any = Undecided(tiny(num_hidden_layers=0).config).eval()
    (batch,) = cut(BATCHES[0], (3, 7))
    before = logits(model, [batch])
    model = hfq.compile(model)
    with pytest.warns(UserWarning, match="leaves Undecided as it is, which is no single graph.*[bB]ranch") as said:
        assert torch.equal(logits(model, [batch]), before)
    assert len(said) == 1


class Counting(OwnModel):
    """What it computes depends on how often it was called."""

    calls = 0

    def forward(self, **inputs: Any) -> Any:
        self.calls += 1
        answer = super().forward(**inputs)
        return type(answer)(logits=answer.logits * self.calls)


@needs_compiler
def test_a_model_that_its_forward_changes_is_left_as_it_is(cache: Path) -> None:
    """No guard would see that it has changed."""
    model: Any = Counting(tiny(num_hidden_layers=0).config).eval()
    (batch,) = cut(BATCHES[0], (3, 7))
    first = logits(model, [batch])
    model = hfq.compile(model)
    with pytest.warns(UserWarning, match="leaves Counting as it is.*changes the model") as said:
        assert torch.allclose(logits(model, [batch]), first * 2)
    assert (len(said), model.calls) == (1, 2)


class TwoFaced(OwnModel):
    """Compiled, it is another model."""

    def forward(self, **inputs: Any) -> Any:
        answer = super().forward(**inputs)
        return type(answer)(logits=-answer.logits) if torch.compiler.is_dynamo_compiling() else answer


@needs_compiler
def test_what_this_process_compiles_is_compared_with_the_model_too(cache: Path) -> None:
    model: Any = with_large_head(TwoFaced(tiny(num_hidden_layers=0).config).eval())
    (batch,) = cut(BATCHES[0], (3, 7))
    before = logits(model, [batch])
    model = hfq.compile(model)
    with pytest.warns(UserWarning, match="TwoFaced runs uncompiled.* differ") as said:
        found = logits(model, [batch, batch])  # of a graph of what is inside, which is another forward's
    torch.testing.assert_close(found, torch.cat([before, before]), atol=1e-5, rtol=1e-4)
    assert sum("differ" in str(warning.message) for warning in said) == 1


@needs_compiler
def test_what_is_inside_is_compiled_by_itself_and_what_is_not_compiled_is_said_once(cache: Path) -> None:
    model: Any = tiny(num_hidden_layers=1)
    ids = torch.randint(5, 200, (2, 9))
    labels = torch.zeros(2, dtype=torch.long)
    trained: Any = copy.deepcopy(model).requires_grad_()
    with torch.inference_mode():
        hidden = model.bert(ids).last_hidden_state
        loss = model(ids, labels=labels).loss
    model, trained = hfq.compile(model), hfq.compile(trained)
    with torch.inference_mode():
        found = model.bert(ids).last_hidden_state
        assert not torch.equal(found, hidden)
        assert relative_error(found, hidden) < 1e-3
        assert torch.allclose(model(ids, labels=labels).loss, loss, rtol=1e-3)
        assert len(kept(cache)) == 1, "the encoder's, which the classifier calls for a loss, too"
        with pytest.warns(UserWarning, match="BertModel runs uncompiled.*output_hidden_states") as said:
            for _ in range(2):
                assert torch.equal(model.bert(ids, output_hidden_states=True).hidden_states[-1], hidden)
        assert len(said) == 1
        handle = model.bert.encoder.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="BertForSequenceClassification runs uncompiled.*hook"):
            model(ids)
        handle.remove()
    trained(ids, labels=labels).loss.backward()
    assert trained.bert.embeddings.word_embeddings.weight.grad is not None
    assert len(kept(cache)) == 1
    assert "attention_mask" in inspect.signature(model.forward).parameters


def test_what_would_gain_nothing_is_said_at_once() -> None:
    config = transformers.T5Config(d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32, vocab_size=50)
    model = transformers.T5Model(config).eval()
    with pytest.warns(UserWarning, match="leaves T5Model as it is.*its decoder"):
        assert hfq.compile(model) is model


def test_without_a_compiler_the_model_is_returned_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setenv("CXX", NO_COMPILER)
    with pytest.warns(UserWarning, match=r"C\+\+ compiler"):
        assert hfq.compile(model) is model
    assert torch.equal(logits(model, BATCHES), logits(tiny(), BATCHES))


@needs_compiler
def test_a_mask_that_a_model_makes_of_its_padding_is_left_to_it() -> None:
    model = tiny("XLM", num_hidden_layers=1)
    inputs = [{"input_ids": batch["input_ids"]} for batch in BATCHES]
    assert any(bool(batch["input_ids"].eq(model.config.pad_token_id).any()) for batch in inputs)
    before = logits(model, inputs)
    assert relative_error(logits(hfq.compile(model), inputs), before) < 1e-4


@needs_compiler
def test_compiled_model_can_still_be_saved(tmp_path: Path) -> None:
    model = hfq.compile(tiny().bert)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.skipif(select_kernel().name != "onednn", reason="only with VNNI has oneDNN layouts to choose from")
@pytest.mark.parametrize("threads", [1, 2, 4, 8, 16, 64])
def test_a_weight_is_read_as_it_was_packed_whatever_the_threads(threads: int) -> None:
    before = torch.get_num_threads()
    layer = Int8Linear(64, 128, bias=False, activation="dynamic")
    layer.weight.copy_(torch.randint(-127, 128, (128, 64)))
    layer.weight_scale.fill_(1)
    plain = layer.weight.clone()
    torch.set_num_threads(threads)
    try:
        packed = layer.pack()
    finally:
        torch.set_num_threads(before)
    state = torch.get_rng_state()
    matmul = in_blocks(packed)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are drawn"
    if matmul is not None:  # else oneDNN multiplies
        assert torch.equal(matmul.weight.view(2, 16, 64, 4).transpose(1, 2).reshape(128, 64), plain)


def test_attention_is_not_compiled_where_onednn_is_told_of_another_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    assert not can_compile()
