"""SmoothQuant never changes the float model, and helps int8 where channels differ a lot."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from support.models import VOCABULARY, logits, make_space, quantized, relative_error, tiny, token_batches
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from hfq.ptq.convert import quantize_model
from hfq.ptq.graph import Fold, find_folds, fold_into
from hfq.ptq.layers import find_quantizable
from hfq.ptq.smoothquant import smoothed
from hfq.tuning.candidates import Candidate

BATCHES = token_batches(2)
PRE_NORM = "RobertaPreLayerNorm"


def find(model: nn.Module, *, without: str = "") -> list[Fold]:
    linears = find_quantizable(model, BATCHES[0]).layers
    return find_folds(model, BATCHES[0], tuple(name for name in linears if name != without))


@cache
def folds_of(family: str) -> dict[str, tuple[str, ...]]:
    """Consumers by producer."""
    return {fold.producer: fold.consumers for fold in find(tiny(family))}


def fold_at_random(model: nn.Module, folds: list[Fold]) -> None:
    generator = torch.Generator().manual_seed(3)
    widths = {fold.producer: len(model.get_submodule(fold.producer).weight) for fold in folds}
    fold_into(model, folds, {name: torch.rand(n, generator=generator) * 4 + 0.1 for name, n in widths.items()})


def test_bert_folds_values_into_the_attention_output() -> None:
    layers = [f"bert.encoder.layer.{i}.attention" for i in range(2)]
    assert folds_of("Bert") == {f"{layer}.self.value": (f"{layer}.output.dense",) for layer in layers}


def test_pre_norm_model_folds_its_layer_norms_into_query_key_and_value() -> None:
    folds = folds_of(PRE_NORM)
    for layer in (f"roberta_prelayernorm.encoder.layer.{i}" for i in range(2)):
        query_key_value = tuple(f"{layer}.attention.self.{name}" for name in ("query", "key", "value"))
        assert set(folds[f"{layer}.attention.LayerNorm"]) == set(query_key_value)
        assert folds[f"{layer}.intermediate.LayerNorm"] == (f"{layer}.intermediate.dense",)


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Roberta", "Electra"])
def test_layer_norm_that_also_feeds_a_residual_is_never_folded(family: str) -> None:
    folds = folds_of(family)
    assert folds  # values are
    assert not [name for name in folds if name.lower().endswith("norm") and "layer." in name]


def test_fold_needs_all_its_consumers_in_int8() -> None:
    kept = "bert.encoder.layer.1.attention.output.dense"
    assert [fold.producer for fold in find(tiny(), without=kept)] == ["bert.encoder.layer.0.attention.self.value"]


def test_layers_that_run_twice_are_not_folded() -> None:
    folds = find(tiny("Albert", embedding_size=32))
    assert [fold.producer for fold in folds] == ["albert.embeddings.LayerNorm"]


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Roberta", "Electra", PRE_NORM])
def test_folding_leaves_the_float_answers_as_they_were(family: str) -> None:
    model = tiny(family)
    before = logits(model, BATCHES)
    folds = [Fold(producer, consumers) for producer, consumers in folds_of(family).items()]
    weights = {fold.producer: model.get_submodule(fold.producer).weight.clone() for fold in folds}
    fold_at_random(model, folds)
    assert weights
    assert not [n for n, weight in weights.items() if torch.equal(weight, model.get_submodule(n).weight)]
    assert torch.allclose(logits(model, BATCHES), before, atol=1e-4)


def test_making_an_int8_model_leaves_the_float_model_alone() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized(model, Candidate("static", alpha=0.5), BATCHES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_model_that_cannot_be_exported_has_no_folds_and_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(self.norm(x))
            return x if x.sum() > 0 else -x  # what to do depends on the data

    model, batch = Chooses(), {"x": torch.randn(2, 8)}
    assert model(**batch).shape == (2, 8)
    assert find_folds(model, batch, ("fc",)) == []
    assert "".join(capfd.readouterr()) == ""  # torch.export writes the whole graph


class Moves(nn.Module):
    """`norm` feeds `first`, which feeds `second`; `between` is what happens to channels on the way."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(self.norm(x))))


class ReadsAWeight(Moves):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.first.weight.sum()


class NormsTwice(Moves):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(self.norm(x))))


def heads(x: Tensor) -> Tensor:
    return x.view(2, 8, 2, 4).transpose(1, 2)


def attend(x: Tensor) -> Tensor:
    query = torch.ones(2, 2, 8, 4)
    return F.scaled_dot_product_attention(query, query, heads(x)).transpose(1, 2).reshape(2, 8, 8)


def mask(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*[torch.linspace(-2, 2, 128).view(2, 8, 8)] * 3, attn_mask=x)


@pytest.mark.parametrize(
    ("model", "folds"),
    [
        pytest.param(Moves(lambda x: heads(x).transpose(1, 2).reshape(2, 8, 8)), 2, id="heads"),
        pytest.param(Moves(attend), 2, id="attention"),
        pytest.param(Moves(lambda x: x + x.mean(-1, keepdim=True)), 1, id="added up"),
        pytest.param(Moves(F.gelu), 1, id="function"),
        pytest.param(Moves(lambda x: x * x.sigmoid()), 1, id="read twice"),
        pytest.param(NormsTwice(F.relu), 0, id="shared norm"),
        pytest.param(Moves(lambda x: x.transpose(1, 2)), 1, id="exchanged with tokens"),
        pytest.param(Moves(lambda x: heads(x).permute(0, 2, 3, 1).reshape(2, 8, 8)), 1, id="reordered"),
        pytest.param(Moves(mask), 1, id="attention mask"),
        pytest.param(Moves(lambda x: x * torch.linspace(0.1, 2, 8)), 2, id="gate"),
        pytest.param(Moves(lambda x: x * x), 1, id="squared"),
        pytest.param(ReadsAWeight(lambda x: x), 0, id="weight read elsewhere"),
    ],
)
def test_whatever_happens_to_the_channels_folding_changes_nothing(model: nn.Module, folds: int) -> None:
    model = model.eval().requires_grad_(False)
    x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))
    before = model(x)
    found = find_folds(model, {"x": x}, ("first", "second"))
    fold_at_random(model, found)
    assert torch.allclose(model(x), before, atol=1e-4)
    assert len(found) == folds


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_smoothing_lowers_the_error_of_outlier_channels(family: str) -> None:
    model = with_outliers(tiny(family))
    float_logits = logits(model, BATCHES)
    space = make_space(model, BATCHES, smooth=True)

    def error(candidate: Candidate) -> float:
        return relative_error(logits(quantize_model(model, space.plan(candidate), space.folds), BATCHES), float_logits)

    plain = error(Candidate("static"))
    assert min(error(Candidate("static", alpha=alpha)) for alpha in (0.3, 0.5, 0.7)) < 0.5 * plain


def test_outliers_of_norms_without_a_mean_and_of_gates_are_smoothed_away() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=VOCABULARY)).eval().requires_grad_(False)
    for layer in model.layers:
        layer.input_layernorm.weight[:3] *= 100
        for reader in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            reader.weight[:, :3] /= 100
        layer.mlp.up_proj.weight[:3] *= 100
        layer.mlp.down_proj.weight[:, :3] /= 100
    space = make_space(model, BATCHES, smooth=True)
    expected = model(**BATCHES[0]).last_hidden_state

    def error(candidate: Candidate) -> float:
        int8 = quantize_model(model, space.plan(candidate), space.folds)
        return relative_error(int8(**BATCHES[0]).last_hidden_state, expected)

    assert len(space.folds) == 8  # of each layer two norms, values, and the other side of the gate
    assert error(Candidate("static", alpha=0.5)) < 0.3 * min(error(Candidate("static")), error(Candidate("dynamic")))


def test_smoothed_statistics_are_those_of_the_smoothed_model() -> None:
    model = with_outliers(tiny())
    space = make_space(model, BATCHES, smooth=True)
    consumer = "bert.encoder.layer.0.attention.output.dense"
    before = space.statistics[consumer]
    factor = torch.linspace(0.5, 3, len(before.channel_min))
    (fold,) = [fold for fold in space.folds if consumer in fold.consumers]
    fold_into(model, [fold], {fold.producer: factor})
    after = make_space(model, BATCHES, smooth=True).statistics[consumer]
    predicted = smoothed(before, factor)
    assert torch.allclose(predicted.channel_min, after.channel_min, atol=1e-4)
    assert torch.allclose(predicted.channel_max, after.channel_max, atol=1e-4)


def with_outliers(model: nn.Module) -> nn.Module:
    """Three value channels grow a hundredfold and the next layer takes it back: the same model, hard to quantize."""
    attentions = [module for module in model.modules() if hasattr(module, "self") and hasattr(module, "output")]
    for attention in attentions:
        value, output = attention.self.value, attention.output.dense
        for parameter in (value.weight, value.bias):
            parameter[:3] *= 100
        output.weight[:, :3] /= 100
    return model
