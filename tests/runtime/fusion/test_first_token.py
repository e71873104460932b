"""A classifier's last layer computes no more than the head reads of it, and the answers stay."""

import copy
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import ROUNDING, int8_linears, logits, quantized, relative_error, tiny, token_batches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)

import hfq
from hfq.ptq.convert import int8_linear
from hfq.ptq.scheme import LayerScheme
from hfq.runtime.compiling.inductor.compiler import Rebuilt, trace
from hfq.runtime.compiling.skeleton import take_apart
from hfq.runtime.fusion.flow import read_for_first_token
from hfq.runtime.fusion.flow import trace as flow_of
from hfq.runtime.fusion.fuse import EXACT, fuse
from hfq.runtime.kernels.selection import select_kernel
from hfq.tuning.candidates import Candidate

BATCHES = token_batches(2)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel that multiplies each number once. On CPUs without VNNI, the usual one computes some anew."""
    if select_kernel().name == "onednn-checked":
        monkeypatch.setenv("HFQ_ISA", "portable")
        select_kernel.cache_clear()
    yield
    select_kernel.cache_clear()


class Multiplied(TorchDispatchMode):
    """Counts the numbers that matmuls with weights answer with."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "linear") or "qlinear_pointwise" in name:
            self.numbers += y.numel()
        return y


def multiplied(model: nn.Module, batch: dict[str, Tensor]) -> int:
    with torch.inference_mode():
        model(**batch)  # which packs
        with Multiplied() as seen:
            model(**batch)
    return seen.numbers


def with_and_without(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The model fused, and fused but for this."""
    whole = copy.deepcopy(model)
    monkeypatch.setenv("HFQ_FUSIONS", ",".join(name for name in EXACT if name != "first-token"))
    fuse(whole)
    monkeypatch.setenv("HFQ_FUSIONS", "exact")
    fuse(model)
    return model, whole


@pytest.mark.parametrize("activation", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Roberta", "Electra", "MPNet"])
def test_last_layer_leaves_out_what_the_head_does_not_read(
    family: str, activation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = with_and_without(quantized(tiny(family), Candidate(activation), BATCHES), monkeypatch)
    even = {"input_ids": BATCHES[0]["input_ids"]}
    left_out = 16 * 11 * (64 + 128 + 64)  # rows x tokens x columns of three of six layers
    assert multiplied(whole, even) - multiplied(model, even) == left_out
    assert relative_error(logits(model, BATCHES), logits(whole, BATCHES)) < ROUNDING


def test_tokens_that_are_taken_together_are_all_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_hash_buckets": 64, "num_hash_functions": 4, "local_transformer_stride": 8, "downsampling_rate": 4}
    net = tiny("Canine", max_position_embeddings=128, type_vocab_size=2, **sizes)
    model, whole = with_and_without(quantized(net, Candidate("static"), BATCHES), monkeypatch)
    assert relative_error(logits(model, BATCHES), logits(whole, BATCHES)) < ROUNDING


def test_images_are_classified_by_their_first_token_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    net = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=3, **sizes)).eval()
    images = {"pixel_values": torch.randn(4, 3, 32, 32)}
    net = quantized(net.requires_grad_(False), Candidate("static"), [images])
    model, whole = with_and_without(net, monkeypatch)
    assert multiplied(whole, images) - multiplied(model, images) == 4 * 16 * (64 + 128 + 64)
    assert relative_error(logits(model, [images]), logits(whole, [images])) < ROUNDING


class ByContent(BertForSequenceClassification):
    """Reads the token with the highest number."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        outputs = super().forward(input_ids[:, :2])
        outputs["logits"] = self.classifier(hidden[torch.arange(len(hidden)), input_ids.argmax(1)])
        return outputs


@pytest.mark.parametrize("kind", [BertForTokenClassification, ByContent])
def test_a_model_that_reads_others_computes_them(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = kind(tiny().config).eval().requires_grad_(False)
    model, whole = with_and_without(quantized(net, Candidate("static"), BATCHES), monkeypatch)
    assert multiplied(model, BATCHES[0]) == multiplied(whole, BATCHES[0])
    assert torch.equal(logits(model, BATCHES), logits(whole, BATCHES))


def mean_of_tokens() -> nn.Module:
    """A pooler that reads every token."""
    return nn.Sequential(nn.AdaptiveAvgPool2d((1, 64)), nn.Flatten())


def test_who_looks_at_other_tokens_afterwards_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = with_and_without(quantized(tiny(), Candidate("static"), BATCHES), monkeypatch)
    logits(model, BATCHES)
    with torch.inference_mode():
        for batch in BATCHES:
            expected = whole(**batch, output_hidden_states=True).hidden_states[-1]
            assert torch.equal(model(**batch, output_hidden_states=True).hidden_states[-1], expected)
            assert torch.equal(model.bert(**batch).last_hidden_state, expected)
            seen: list[Tensor] = []
            handle = model.bert.encoder.layer[1].register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
            model(**batch)
            handle.remove()
            assert relative_error(seen[0], expected) < ROUNDING
            model.config.output_hidden_states = True
            assert torch.equal(model(**batch).hidden_states[-1], expected)
            model.config.output_hidden_states = False
    assert multiplied(model, BATCHES[0]) < multiplied(whole, BATCHES[0]), "nobody looks any more"
    model.bert.pooler = whole.bert.pooler = mean_of_tokens()
    assert torch.equal(logits(model, BATCHES), logits(whole, BATCHES))


def as_compiled(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the process that compiles `model` takes its first answer to be."""
    parts = take_apart(model)
    assert parts is not None
    with torch.inference_mode():
        answer: Tensor = Rebuilt(parts[0], list(batch))(torch.stack(list(batch.values())), parts[1])[0]
    return answer


def test_what_is_compiled_reads_no_more_and_not_less(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = with_and_without(quantized(tiny(), Candidate("static"), BATCHES), monkeypatch)
    expected = logits(model, BATCHES[:1])
    assert relative_error(as_compiled(model, BATCHES[0]), expected) < 1e-5
    monkeypatch.setenv("CXX", "no-such-compiler")
    model.bert.pooler = whole.bert.pooler = mean_of_tokens()
    with pytest.warns(UserWarning, match=r"C\+\+ compiler"):
        model = hfq.compile(model)
    assert relative_error(as_compiled(model, BATCHES[0]), logits(whole, BATCHES[:1])) < 1e-5


def test_an_encoder_that_is_compiled_alone_answers_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = with_and_without(quantized(tiny(), Candidate("static"), BATCHES), monkeypatch)
    with torch.inference_mode():
        expected = model.bert(**BATCHES[0]).last_hidden_state
    assert relative_error(as_compiled(model.bert, BATCHES[0]), expected) < 1e-5


def test_copies_compute_no_more_either(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = with_and_without(quantized(tiny(), Candidate("static"), BATCHES), monkeypatch)
    expected = logits(model, BATCHES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert multiplied(twin, BATCHES[0]) == multiplied(model, BATCHES[0])
        assert torch.equal(logits(twin, BATCHES), expected)
        layer = int8_linears(twin)["bert.encoder.layer.1.output.dense"]
        assert layer.first_token is not int8_linears(model)["bert.encoder.layer.1.output.dense"].first_token
        twin.bert.pooler = mean_of_tokens()
        assert not torch.equal(logits(twin, BATCHES), expected)
    assert torch.equal(logits(model, BATCHES), expected)


def test_what_is_compiled_of_a_large_batch_is_for_any_size() -> None:
    model = quantized(tiny(max_position_embeddings=1200), Candidate("static"), BATCHES)
    fuse(model)
    logits(model, BATCHES)
    parts = take_apart(model)
    assert parts is not None
    inputs = torch.ones(2, 16, 1100, dtype=torch.int64)  # a million numbers in each layer
    program = trace(Rebuilt(parts[0], ["attention_mask", "input_ids"]), inputs, parts[1])
    assert not any(re.search(r"size\(\)\[1\]", guard) for guard in program._guards_code)


def test_one_image_shows_nothing_of_the_next_where_tokens_come_first() -> None:
    """As in Mask2Former's decoder, whose second dimension is the batch's."""

    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = int8_linear(nn.Linear(8, 8), LayerScheme("dynamic"))

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.linear(pixel_values.transpose(0, 1)).transpose(0, 1)

    model, example = TokensFirst(), {"pixel_values": torch.zeros(1, 5, 8)}
    flow = flow_of(model, example)
    assert flow is not None
    assert read_for_first_token(model, example, flow) == []
