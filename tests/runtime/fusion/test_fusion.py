"""Fusing makes int8 models faster and never changes what they answer."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import families
from support.models import ROUNDING, int8_linears, logits, quantized, relative_error, tiny, token_batches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification, ViTConfig, ViTForImageClassification
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.distilbert.modeling_distilbert import TransformerBlock

from hfq.ptq.convert import int8_linear
from hfq.ptq.scheme import LayerScheme
from hfq.runtime.fusion.encoder_layer import EncoderLayer
from hfq.runtime.fusion.fuse import fuse
from hfq.runtime.fusion.residual import NormalizedSum
from hfq.runtime.int8.linear import Int8Linear
from hfq.runtime.kernels.cpu import multiplies_in_tiles
from hfq.runtime.kernels.selection import select_kernel
from hfq.tuning.candidates import Candidate

FAMILIES = ["Bert", "DistilBert", "Roberta", "Electra", "MPNet"]
BATCHES = token_batches(2)


def layers_that_return_codes(model: nn.Module) -> list[str]:
    """Int8 layers whose output another int8 layer takes as it is."""
    return [name for name, layer in int8_linears(model).items() if layer.returns_codes]


def fused_activations(model: nn.Module) -> list[str]:
    """Layers of the encoder with one: Electra's head has another."""
    layers = int8_linears(model).items()
    return [name for name, layer in layers if layer.post_op is not None and not name.startswith("classifier.")]


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
    assert relative_error(after, before) < ROUNDING
    assert (after.argmax(1) == before.argmax(1)).float().mean() >= 0.96


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_layers_fuse_the_activation_only(family: str) -> None:
    model = quantized(tiny(family), Candidate("dynamic"), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    assert len(fused_activations(model)) == 2
    assert layers_that_return_codes(model) == []
    assert relative_error(logits(model, BATCHES), before) < ROUNDING


@pytest.mark.parametrize("activation", ["silu", "relu6", "gelu_10"])  # the last two clip, far out
def test_activation_without_a_kernel_stays_where_it_is(activation: str) -> None:
    model = quantized(tiny(hidden_act=activation), Candidate("static"), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    assert fused_activations(model) == layers_that_return_codes(model) == []
    assert relative_error(logits(model, BATCHES), before) <= (ROUNDING if multiplies_in_tiles() else 0)


def test_float_layer_gets_floats() -> None:
    kept = "bert.encoder.layer.0.output.dense"
    model = quantized(tiny(), Candidate("static", float_layers=(kept,)), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    assert layers_that_return_codes(model) == ["bert.encoder.layer.1.intermediate.dense"]
    assert relative_error(logits(model, BATCHES), before) < ROUNDING


def test_example_that_does_not_fit_the_model_only_means_less_fusing() -> None:
    small = token_batches(2, vocabulary=7)  # transformers' example has a token 7
    model = quantized(tiny(vocab_size=7), Candidate("static"), small)
    before = logits(model, small)
    fuse(model)
    assert len(fused_activations(model)) == 2
    assert relative_error(logits(model, small), before) < (ROUNDING if multiplies_in_tiles() else 1e-4)


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
        setattr(block, name, int8_linear(getattr(block, name), LayerScheme.static((-3.0, 3.0))))
    return block.eval()


def test_layer_read_by_one_other_returns_codes() -> None:
    block = int8_block(Block)
    before = block(**block.example)[0]
    fuse(block)
    assert layers_that_return_codes(block) == ["up"]
    assert relative_error(block(**block.example)[0], before) < ROUNDING


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

    def __init__(self, *, linear_first: bool, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = int8_linear(nn.Linear(8, 8), LayerScheme.static((-3.0, 3.0)))
        self.act = nn.ReLU(inplace)
        self.linear_first = linear_first

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x)) if self.linear_first else self.dense(self.act(x))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("linear_first", [True, False])
def test_only_an_activation_behind_the_layer_is_fused(linear_first: bool, inplace: bool) -> None:
    model = Activated(linear_first=linear_first, inplace=inplace)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    before = model(x.clone())
    fuse(model)
    assert isinstance(model.dense, Int8Linear)
    assert (model.dense.post_op == "relu") is linear_first
    assert torch.allclose(model(x.clone()), before, atol=1e-6)


def test_parents_of_one_class_are_told_apart() -> None:
    model = nn.Sequential(
        *(Activated(linear_first=first, inplace=False) for first in (False, True, True)),
        Activated(linear_first=True, inplace=False),
    )
    model[2].act = nn.Tanh()
    model[3].register_forward_hook(lambda block, _, y: y + block.act(y - 1))  # needs the function once more
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    before = model(x.clone())
    fuse(model)
    assert fused_activations(model) == ["1.dense"]
    assert torch.allclose(model(x.clone()), before, atol=1e-6)


class Normalized(nn.Module):
    """A layer, an activation function and a norm of float32 weights, which takes no float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = int8_linear(nn.Linear(8, 8), LayerScheme.static((-3.0, 3.0)))
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.dense(x)))


def test_an_activation_before_float_weights_is_fused() -> None:
    model = Normalized()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    before = model(x)
    fuse(model)
    assert fused_activations(model) == ["dense"]
    assert torch.allclose(model(x), before, atol=1e-5)


def layers_that_share_a_matmul(model: nn.Module) -> list[str]:
    return [name for name, layer in int8_linears(model).items() if layer.shared_matmul is not None]


@pytest.mark.parametrize("approach", ["static", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_query_key_and_value_are_one_matmul(family: str, approach: Any) -> None:
    model = quantized(tiny(family), Candidate(approach), BATCHES)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model, BATCHES)
    fuse(model)
    assert len(layers_that_share_a_matmul(model)) == 6  # three in each of two transformer layers
    assert relative_error(logits(model, BATCHES), before) < ROUNDING
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Branches(nn.Module):
    """Three layers that read the same tensor. How is for subclasses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("q", "k", "v"):
            setattr(self, name, int8_linear(nn.Linear(8, 8, bias=name != "k"), LayerScheme.static((-3.0, 3.0))))
        self.example = self.dummy_inputs = {"x": torch.randn(5, 8)}

    def forward(self, x: Tensor) -> Any:
        return self.q(x), self.k(x), self.v(x)


class OtherScale(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.v.input_scale *= 2


class NeedsContiguousOutput(Branches):
    def forward(self, x: Tensor) -> Any:
        return self.q(x).view(-1), self.k(x).view(-1), self.v(x).view(-1)


class ChangesTheInputBetween(Branches):
    def forward(self, x: Tensor) -> Any:
        x = x.clone()
        q, k = self.q(x), self.k(x)
        x *= 0.5
        return q, k, self.v(x)


@pytest.mark.parametrize(
    ("kind", "sharing"),
    [
        (Branches, ["q", "k", "v"]),
        (OtherScale, ["q", "k"]),
        (NeedsContiguousOutput, []),
        (ChangesTheInputBetween, []),
    ],
)
def test_layers_share_a_matmul_only_where_nothing_changes(kind: type[Branches], sharing: list[str]) -> None:
    model = kind()
    before = model(**model.example)
    fuse(model)
    assert layers_that_share_a_matmul(model) == sharing
    assert all(torch.equal(x, y) for x, y in zip(model(**model.example), before, strict=True))


def test_layer_that_shares_a_matmul_can_be_called_alone_and_from_many_threads() -> None:
    model = Branches()
    alone = Branches()
    fuse(model)
    inputs = [torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(64)]
    assert torch.equal(model.k(inputs[0]), alone.k(inputs[0]))
    assert torch.equal(model.k(inputs[0]), alone.k(inputs[0]))  # twice: nobody else has taken the first answer
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(model, inputs))
    for x, answers in zip(inputs, found, strict=True):
        assert all(torch.equal(y, z) for y, z in zip(answers, alone(x), strict=True))


def blocks_that_add_in_the_matmul(model: nn.Module) -> int:
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    return sum(isinstance(getattr(forward, "forward", forward), NormalizedSum) for forward in forwards)


@pytest.mark.parametrize("approach", ["static", "dynamic"])
@pytest.mark.parametrize(("family", "blocks"), [("Bert", 4), ("Roberta", 4), ("Electra", 4), ("DistilBert", 0)])
def test_residual_sums_are_part_of_the_matmul_where_a_block_only_adds_and_normalizes(
    family: str, blocks: int, approach: Any
) -> None:
    model = quantized(tiny(family), Candidate(approach), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    assert blocks_that_add_in_the_matmul(model) == blocks
    assert relative_error(logits(model, BATCHES), before) < ROUNDING


class Residual(nn.Module):
    """A block as in BERT, with another sum for each kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.norm, self.kind = (
            int8_linear(nn.Linear(8, 8), LayerScheme.static((-3.0, 3.0))),
            nn.LayerNorm(8),
            kind,
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.dense(x)
        sums = {"added": hidden + y, "halved": hidden + 0.5 * y, "ignored": hidden, "swapped": hidden * y}
        return self.norm(sums[self.kind])


@pytest.mark.parametrize("kind", ["added", "halved", "ignored", "swapped"])
def test_only_a_plain_sum_is_fused_and_what_is_added_stays_as_it_was(kind: str) -> None:
    block = Residual(kind)
    x, y = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    kept = y.clone()
    before = block(x, y)
    fuse(block)
    assert blocks_that_add_in_the_matmul(block) == (kind == "added")
    assert torch.allclose(block(x, y), before, atol=1e-5)
    assert torch.equal(block(x, y=y), block(x, y)) and torch.equal(block(y=y, x=x), block(x, y))
    assert torch.equal(y, kept)


class Scaled(Residual):
    """One that takes more than is added."""

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x, y) * scale


def test_a_sum_with_more_arguments_is_left_as_it_is() -> None:
    block = Scaled("added")
    fuse(block)
    assert torch.equal(block(torch.ones(3, 8), torch.ones(3, 8), 2.0), 2 * block(torch.ones(3, 8), torch.ones(3, 8)))


class Overwritten(TorchDispatchMode):
    """Counts the matmuls that add to a tensor where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tensors += "sum" in args
        return func(*args, **(kwargs or {}))


def overwritten(model: nn.Module, **how: Any) -> int:
    with torch.inference_mode():
        model(**BATCHES[0])  # which packs
        with Overwritten() as seen:
            model(**BATCHES[0], **how)
    return seen.tensors


def as_of_transformers(kind: type[nn.Module]) -> type[nn.Module]:
    """Its forward counts as code that does nothing but answer, as transformers' is known to."""
    kind.forward.__module__ = BertLayer.forward.__module__
    return kind


@as_of_transformers
class ReadAgain(BertLayer):
    """One that adds what it is given once more, at its end."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, *args, **kwargs) + 0.5 * hidden_states


@pytest.mark.skipif(select_kernel().name != "onednn", reason="other kernels add in memory of their own")
def test_a_sum_takes_the_memory_of_what_nobody_reads_again() -> None:
    net = tiny("Bert")
    net.bert.encoder.layer[1].__class__ = ReadAgain
    model = quantized(net, Candidate("static"), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    assert relative_error(logits(model, BATCHES), before) < ROUNDING
    assert overwritten(model) == 3
    assert overwritten(model, output_hidden_states=True) == 0
    with torch.enable_grad():
        assert torch.allclose(model(**BATCHES[0]).logits, before[: len(BATCHES[0]["input_ids"])], atol=0.02)


@pytest.mark.parametrize("looks", ["hook", "forward", "hidden states"])
def test_who_looks_at_a_residual_afterwards_sees_what_was_added(looks: str) -> None:
    model = quantized(tiny("Bert", num_hidden_layers=3), Candidate("static"), BATCHES)
    fuse(model)
    layer = model.bert.encoder.layer[1]
    seen: list[Tensor] = []
    with torch.inference_mode():
        expected = model(**BATCHES[0], output_hidden_states=True).hidden_states[1]
        if looks == "hook":
            layer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        elif looks == "forward":
            forward = layer.forward
            layer.forward = lambda hidden, *args, **kwargs: (seen.append(hidden), forward(hidden, *args, **kwargs))[1]
        else:
            model.config.output_hidden_states = True
        seen += model(**BATCHES[0]).get("hidden_states", ())[1:2]
    assert relative_error(seen[0], expected) < ROUNDING


def layers_that_run_directly(model: nn.Module) -> int:
    return sum(isinstance(module.__dict__.get("forward"), EncoderLayer) for module in model.modules())


@pytest.mark.parametrize("approach", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("family", "layers"), [("Bert", 2), ("Roberta", 2), ("Electra", 2), ("DistilBert", 2), ("MPNet", 2)]
)
def test_encoder_layers_run_their_steps_directly(family: str, layers: int, approach: Any) -> None:
    model = quantized(tiny(family), Candidate(approach), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    assert layers_that_run_directly(model) == layers
    assert relative_error(logits(model, BATCHES), before) < ROUNDING
    assert torch.equal(logits(copy.deepcopy(model), BATCHES), logits(model, BATCHES))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), BATCHES), logits(model, BATCHES))
    unpadded = {"input_ids": BATCHES[0]["input_ids"]}
    with torch.inference_mode():
        expected = model(**unpadded, output_hidden_states=True).logits  # which the layers' own forwards compute
    assert relative_error(logits(model, [unpadded]), expected) < ROUNDING


@as_of_transformers
class Halved(BertLayer):
    """One that does something more at its end."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **how: Any) -> Any:
        return 0.5 * super().forward(hidden_states, attention_mask, *others, **how)


@as_of_transformers
class Unmasked(BertLayer):
    """One that does not look at padding."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **how: Any) -> Any:
        return super().forward(hidden_states, None, *others, **how)


class Swapped(BertLayer):
    """One that takes what is called key for the query."""

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)
        attention = self.attention.self
        attention.query, attention.key = attention.key, attention.query


class Remembers(BertLayer):
    """One of somebody's own, that keeps what it is given."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **how: Any) -> Any:
        self.given = hidden_states
        return super().forward(hidden_states, attention_mask, *others, **how)


def test_code_of_the_users_own_runs_and_keeps_what_it_is_given() -> None:
    net = tiny("Bert", num_hidden_layers=3)
    net.bert.encoder.layer[1].__class__ = Remembers
    model = quantized(net, Candidate("static"), BATCHES)
    fuse(model)
    logits(model, BATCHES)
    with torch.inference_mode():
        model(**BATCHES[0])
        given = model.bert.encoder.layer[1].given
        assert torch.equal(given, model(**BATCHES[0], output_hidden_states=True).hidden_states[1])


class InAnObject(BertForSequenceClassification):
    """Answers in an object of its own."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        embedded = self.bert.embeddings(input_ids)
        mask = (
            None
            if attention_mask is None
            else attention_mask[:, None, None].bool().expand(-1, 1, len(input_ids[0]), -1)
        )
        hidden = self.bert.encoder(embedded, mask).last_hidden_state
        return SimpleNamespace(logits=self.classifier(self.bert.pooler(hidden)), embedded=embedded)


def test_what_a_model_returns_in_an_object_of_its_own_is_not_written_over() -> None:
    as_of_transformers(InAnObject)
    net = InAnObject(tiny("Bert").config).eval().requires_grad_(False)
    model = quantized(net, Candidate("static"), BATCHES)
    fuse(model)
    logits(model, BATCHES)
    with torch.inference_mode():
        assert torch.equal(model(**BATCHES[0]).embedded, model.bert.embeddings(BATCHES[0]["input_ids"]))


@pytest.mark.parametrize("change", ["weight", "class", "dropout"])
def test_a_layer_that_runs_directly_is_what_it_was_changed_to(change: str) -> None:
    model = quantized(tiny("Bert"), Candidate("static"), BATCHES)
    other = quantized(tiny("Bert", seed=1), Candidate("static"), BATCHES)
    fuse(model)
    before = logits(model, BATCHES)
    attention = model.bert.encoder.layer[0].attention.self
    if change == "weight":
        attention.query.load_state_dict(other.bert.encoder.layer[0].attention.self.query.state_dict())
    elif change == "class":
        attention.__class__ = type("Doubled", (type(attention),), {"forward": doubled})
    else:
        attention.train()
    found = logits(model, BATCHES)
    assert relative_error(found, before) > 0.001
    if change != "dropout":
        assert relative_error(found, logits(copy.deepcopy(model), BATCHES)) < 1e-6


def doubled(self: nn.Module, hidden: Tensor, *others: Any, **how: Any) -> Any:
    return type(self).__mro__[1].forward(self, 2 * hidden, *others, **how)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kind", "layers"), [(Halved, 1), (Unmasked, 1), (Swapped, 2), (Remembers, 1)])
def test_layers_of_other_steps_run_as_they_are(kind: type[BertLayer], layers: int) -> None:
    net = tiny("Bert", num_hidden_layers=1)
    net.bert.encoder.layer.append(kind(net.config, layer_idx=1).eval().requires_grad_(False))
    net.bert.encoder.layer[1].load_state_dict(tiny("Bert", seed=1).bert.encoder.layer[1].state_dict())
    model = quantized(net, Candidate("static"), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    assert layers_that_run_directly(model) == layers
    assert relative_error(logits(model, BATCHES), before) < ROUNDING


@as_of_transformers
class AddsACopy(TransformerBlock):
    """One that leaves what it is given to whoever has it."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask)
        attended = self.sa_layer_norm(attended + hidden_states.clone())
        normed: Tensor = self.output_layer_norm(self.ffn(attended) + attended)
        return normed


def test_a_layer_that_adds_a_copy_does_not_write_over_what_it_is_given() -> None:
    net = tiny("DistilBert")
    net.distilbert.transformer.layer[1].__class__ = AddsACopy
    model = quantized(net, Candidate("static"), BATCHES)
    before = logits(model, BATCHES)
    fuse(model)
    assert layers_that_run_directly(model) == 1
    assert relative_error(logits(model, BATCHES), before) < ROUNDING


def test_layers_that_run_directly_still_call_hooks_and_take_another_attention() -> None:
    model = quantized(tiny("Bert"), Candidate("static"), BATCHES)
    fuse(model)
    expected = logits(model, BATCHES)
    seen: list[str] = []
    for name, module in model.bert.encoder.layer[0].named_modules():
        module.register_forward_hook(lambda *call, name=name: seen.append(name))
    assert relative_error(logits(model, BATCHES), expected) < ROUNDING
    assert {"attention.self.query", "attention.output", "intermediate.dense", "output.LayerNorm"} <= set(seen)
    again = quantized(tiny("Bert"), Candidate("static"), BATCHES)
    fuse(again)
    again.set_attn_implementation("eager")
    assert relative_error(logits(again, BATCHES), expected) < ROUNDING


def test_fusing_runs_no_matmul_and_the_first_forward_packs() -> None:
    model = quantized(tiny(), Candidate("static"), BATCHES)
    fuse(model)
    assert not any(layer._packed for layer in int8_linears(model).values())
    logits(model, BATCHES)
    assert all(layer._packed for layer in int8_linears(model).values())


def test_a_vision_transformer_is_fused_too() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    config = ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)
    images = [{"pixel_values": torch.randn(4, 3, 32, 32)} for _ in range(2)]
    model = quantized(ViTForImageClassification(config).eval(), Candidate("static"), images)
    before = logits(model, images)
    fuse(model)
    layers = int8_linears(model).values()
    assert sum(layer.shared_matmul is not None for layer in layers) == 6
    assert sum(layer.returns_codes for layer in layers) == sum(layer.post_op is not None for layer in layers) == 2
    assert relative_error(logits(model, images), before) < ROUNDING


_WHISPER = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 16, "max_source_positions": 50},
    **{"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
HEARERS = {
    "wav2vec2": families.FAMILIES["wav2vec2"],
    "whisper": families.Family(
        "WhisperForAudioClassification",
        _WHISPER,
        lambda: {"input_features": torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(1))},
    ),
}


@pytest.mark.parametrize("name", HEARERS)
def test_encoders_of_sound_are_fused_as_those_of_text(name: str) -> None:
    """Beside int8 convolutions, and with dropout between two layers, as a function that does nothing."""
    family = HEARERS[name]
    int8 = quantized(family.make(), Candidate("static"), [family.inputs()])
    with torch.inference_mode():
        before = int8(**family.inputs()).logits
        fuse(int8)
        after = int8(**family.inputs()).logits
    assert relative_error(after, before) < ROUNDING
    layers = int8_linears(int8).values()
    encoder = [layer for layer in layers if layer.returns_codes]
    assert encoder and all(layer.post_op == "gelu" for layer in encoder)
    assert sum(layer.shared_matmul is not None for layer in layers) == 3 * len(encoder)
