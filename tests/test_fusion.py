"""Fusing makes int8 models faster and never changes what they answer."""

import copy
import pickle
from typing import Any

import pytest
import torch
from models import int8_linears, logits, quantized, relative_error, tiny, token_batches
from torch import Tensor, nn

from hfq.quantization.convert import int8_linear
from hfq.quantization.scheme import LinearScheme
from hfq.runtime.fusion import fuse
from hfq.runtime.modules import Int8Linear
from hfq.tuning.candidates import Candidate

FAMILIES = ["Bert", "DistilBert", "Roberta", "Electra", "MPNet"]
BATCHES = token_batches(2)


def layers_that_return_codes(model: nn.Module) -> list[str]:
    """Int8 layers whose output another int8 layer takes as it is."""
    seen: list[str] = []
    handles = [
        layer.register_forward_hook(lambda _, __, y, name=name: seen.append(name) if y.dtype == torch.uint8 else None)
        for name, layer in int8_linears(model).items()
    ]
    with torch.inference_mode():
        model(**getattr(model, "example", BATCHES[0]))
    for handle in handles:
        handle.remove()
    return seen


def fused_activations(model: nn.Module) -> list[str]:
    return [name for name, layer in int8_linears(model).items() if layer.post_op is not None]


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_model_answers_as_before(family: str, activation: str) -> None:
    name = "activation" if family == "DistilBert" else "hidden_act"
    model = quantized(tiny(family, **{name: activation}), Candidate("static"), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    after = logits(model, BATCHES)
    assert len(fused_activations(model)) == 2  # one in each transformer layer
    assert layers_that_return_codes(model) == fused_activations(model)
    assert relative_error(after, before) < 0.02
    assert (after.argmax(1) == before.argmax(1)).float().mean() >= 0.96


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_layers_fuse_the_activation_only(family: str) -> None:
    model = quantized(tiny(family), Candidate("dynamic"), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    assert len(fused_activations(model)) == 2
    assert layers_that_return_codes(model) == []
    assert relative_error(logits(model, BATCHES), before) < 0.02


def test_activation_without_a_kernel_stays_where_it_is() -> None:
    model = quantized(tiny(hidden_act="silu"), Candidate("static"), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    assert fused_activations(model) == layers_that_return_codes(model) == []
    assert torch.equal(logits(model, BATCHES), before)


def test_float_layer_gets_floats() -> None:
    kept = "bert.encoder.layer.0.output.dense"
    model = quantized(tiny(), Candidate("static", float_layers=(kept,)), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    assert layers_that_return_codes(model) == ["bert.encoder.layer.1.intermediate.dense"]
    assert relative_error(logits(model, BATCHES), before) < 0.02


def test_example_that_does_not_fit_the_model_only_means_less_fusing() -> None:
    small = token_batches(2, vocabulary=7)  # transformers' example has a token 7
    model = quantized(tiny(vocab_size=7), Candidate("static"), small)
    before = logits(model, small)
    fuse(model)
    assert len(fused_activations(model)) == 2
    assert relative_error(logits(model, small), before) < 1e-4


def test_fusing_twice_is_fusing_once() -> None:
    model = quantized(tiny(), Candidate("static"), BATCHES)
    fuse(model)
    once = logits(model, BATCHES)
    fuse(model)
    assert len(layers_that_return_codes(model)) == 2
    assert torch.equal(logits(model, BATCHES), once)


def test_copies_of_a_fused_model_stay_fused() -> None:
    model = quantized(tiny(), Candidate("static"), BATCHES)
    fuse(model)
    expected = logits(model, BATCHES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert layers_that_return_codes(twin) == layers_that_return_codes(model)
        assert torch.equal(logits(twin, BATCHES), expected)


def test_fused_weights_are_saved_as_they_were() -> None:
    model = quantized(tiny(), Candidate("static"), BATCHES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fuse(model)
    logits(model, BATCHES)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


class Block(nn.Module):
    """Two layers in a row. What else happens to the first one's answer is for subclasses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.example = self.dummy_inputs = {"x": torch.randn(5, 8)}

    def forward(self, x: Tensor) -> Any:
        return (self.down(self.up(x)),)


class AddsTheMean(Block):
    def forward(self, x: Tensor) -> Any:
        hidden = self.up(x)
        return (self.down(hidden) + hidden.mean(-1, keepdim=True),)


class ReadsItTwice(Block):
    def forward(self, x: Tensor) -> Any:
        hidden = self.up(x)
        return (self.down(hidden) + self.head(hidden),)


class ReadsALayerTwice(Block):
    def forward(self, x: Tensor) -> Any:
        return (self.down(self.up(x)) + self.head(self.up(-x)),)


class ChangesItInPlace(Block):
    def forward(self, x: Tensor) -> Any:
        hidden = self.up(x)
        hidden *= 0.5
        return (self.down(hidden),)


class ReturnsItToo(Block):
    def forward(self, x: Tensor) -> Any:
        hidden = self.up(x)
        return (self.down(hidden), hidden)


def int8_block(kind: type[Block]) -> Block:
    block = kind()
    for name in ("up", "down", "head"):
        setattr(block, name, int8_linear(getattr(block, name), LinearScheme.static((-3.0, 3.0))))
    return block.eval()


def test_layer_read_by_one_other_returns_codes() -> None:
    block = int8_block(Block)
    before = block(**block.example)[0]
    fuse(block)
    assert layers_that_return_codes(block) == ["up"]
    assert relative_error(block(**block.example)[0], before) < 0.02


@pytest.mark.parametrize(
    "kind",
    [
        AddsTheMean,
        ReadsItTwice,
        ReadsALayerTwice,
        ChangesItInPlace,
        ReturnsItToo,
    ],
)
def test_layer_whose_answer_is_read_elsewhere_returns_floats(kind: type[Block]) -> None:
    block = int8_block(kind)
    before = block(**block.example)
    fuse(block)
    assert layers_that_return_codes(block) == []
    assert all(torch.equal(x, y) for x, y in zip(block(**block.example), before, strict=True))


class Activated(nn.Module):
    """A layer and an activation function, called in `order`."""

    def __init__(self, *, linear_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = int8_linear(nn.Linear(8, 8), LinearScheme.static((-3.0, 3.0)))
        self.act = nn.ReLU()
        self.linear_first = linear_first

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x)) if self.linear_first else self.dense(self.act(x))


@pytest.mark.parametrize("linear_first", [True, False])
def test_only_an_activation_behind_the_layer_is_fused(linear_first: bool) -> None:
    model = Activated(linear_first=linear_first)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    before = model(x)
    fuse(model)
    assert isinstance(model.dense, Int8Linear)
    assert (model.dense.post_op == "relu") is linear_first
    assert torch.allclose(model(x), before, atol=1e-6)
