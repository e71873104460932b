"""`fit`: any torch module in, an int8 model of the same class out, and every keyword does what it says."""

import copy
import json
import pickle
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
import transformers
from support.command import stock_python
from support.families import FAMILIES
from support.models import relative_error, tiny, token_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hfq
from hfq.common.errors import ExportError, GoalNotMetError, SourceError, UnsupportedError, UsageError
from hfq.common.memory import checkpoint_files
from hfq.config import AccuracyCriterion, PostTrainingQuantConfig, TuningCriterion
from hfq.hub.local import LocalHub
from hfq.quantization import fit
from hfq.runtime.int8.conv import Int8Conv
from hfq.runtime.int8.embedding import Int8Embedding
from hfq.runtime.int8.linear import Int8Linear

ANY_LOSS = AccuracyCriterion(tolerable_loss=1.0)
pytestmark = pytest.mark.filterwarnings("ignore:Neither eval_func:UserWarning")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 48), nn.Linear(48, 48), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.fc, self.head = nn.Conv2d(8, 16, 3, stride=2), nn.Linear(144, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x)))))
        return self.head(torch.relu(self.fc(x.flatten(1))))


class Sequence1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(6, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean(-1))


class LSTMHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(30, 16), nn.LSTM(16, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0][:, -1])


class Normed(nn.Module):
    """With the `weight_norm` whose weight is a tensor that has a gradient's history, which Python cannot copy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.weight_norm(nn.Conv1d(6, 16, 3, padding=1))
        self.hidden, self.head = nn.Linear(16, 48), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(self.conv(x)).mean(-1))))


class Listed(nn.Module):
    """It calls its layers from a plain list, as Mask2Former's heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4)]
        for i, layer in enumerate(self.layers):
            self.add_module(str(i), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


MODELS: dict[str, tuple[type[nn.Module], Callable[[], Tensor], set[str]]] = {
    "mlp": (MLP, lambda: torch.randn(96, 12), {"first", "second"}),
    "cnn": (CNN, lambda: torch.randn(48, 3, 8, 8), {"conv1", "conv2", "fc"}),
    "conv1d": (Sequence1d, lambda: torch.randn(48, 6, 10), {"conv"}),
    "weight_norm": (Normed, lambda: torch.randn(48, 6, 10), {"hidden"}),
    "listed": (Listed, lambda: torch.randn(96, 12), {"0", "2"}),
    "lstm": (LSTMHead, lambda: torch.randint(0, 30, (48, 7)), {"embedding", "head"}),
}


def make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A module, inputs, and the labels that it gives them itself."""
    torch.manual_seed(0)
    kind, data, _ = MODELS[name]
    model = kind().eval()
    x = data()
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def loader(x: Tensor, y: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=16)


def accuracy(x: Tensor, y: Tensor) -> Callable[[nn.Module], float]:
    return lambda model: (model(x).argmax(1) == y).double().mean().item()


def int8_names(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, Int8Linear | Int8Conv | Int8Embedding)}


def quantized_mlp(**settings: Any) -> Any:
    model, x, y = make("mlp")
    return fit(model, PostTrainingQuantConfig(accuracy_criterion=ANY_LOSS, **settings), loader(x, y))


@pytest.mark.parametrize("name", MODELS)
def test_plain_module_goes_through_fit_save_and_load(name: str, tmp_path: Path) -> None:
    model, x, y = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    conf = PostTrainingQuantConfig(accuracy_criterion=AccuracyCriterion(tolerable_loss=0.1))
    int8 = fit(model, conf, loader(x, y), eval_func=accuracy(x, y))
    assert isinstance(int8, type(model))
    assert int8_names(int8) == MODELS[name][2]
    assert relative_error(int8(x).detach(), model(x).detach()) < 0.05
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    int8.save(tmp_path / "saved")
    loaded = hfq.load(tmp_path / "saved", model=type(model)())
    assert torch.equal(loaded(x), int8(x))
    assert loaded.state_dict().keys() == int8.state_dict().keys()
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert size < sum(value.numel() * 4 for value in before.values())


def test_report_names_every_layer_and_why_it_is_float() -> None:
    model, x, y = make("cnn")
    report = fit(model, PostTrainingQuantConfig(), loader(x, y)).report()
    assert report.layers.static == ["conv1", "conv2", "fc"]
    assert report.layers.float_layers == {"head": "makes the answer"}
    assert report.layers.other == {"norm": "BatchNorm2d"}
    assert not report.tuned
    assert report.met is report.quantized.accuracy is None
    assert report.quantized.size_mib < 0.5 * report.baseline.size_mib


def test_what_makes_the_logits_is_int8_where_it_is_much_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1000))
    x = torch.randn(8, 128)
    report = fit(model, PostTrainingQuantConfig(), loader(x, torch.zeros(8, dtype=torch.long))).report()
    assert report.layers.float_layers == {}
    assert report.quantized.size_mib < 0.3 * report.baseline.size_mib


def test_without_evaluation_it_says_that_nothing_was_tuned() -> None:
    model, x, y = make("mlp")
    with pytest.warns(UserWarning, match="without tuning"):
        int8 = fit(model, PostTrainingQuantConfig(), loader(x, y))
    assert int8.trials == []


def test_eval_func_is_given_int8_models_that_run() -> None:
    model, x, y = make("mlp")
    seen: list[nn.Module] = []

    def evaluate(candidate: nn.Module) -> float:
        seen.append(candidate)
        return accuracy(x, y)(candidate)

    int8 = fit(model, PostTrainingQuantConfig(accuracy_criterion=ANY_LOSS), loader(x, y), eval_func=evaluate)
    assert seen[0] is model
    assert all(int8_names(candidate) == {"first", "second"} for candidate in seen[1:])
    assert [trial.accuracy for trial in int8.trials] == [accuracy(x, y)(candidate) for candidate in seen[1:]]


def test_goal_that_is_missed_is_an_error_with_the_trials() -> None:
    model, x, y = make("mlp")
    scores = iter([1.0])  # the float model's; the int8 ones get 0.5
    conf = PostTrainingQuantConfig(tuning_criterion=TuningCriterion(max_trials=2))
    with pytest.raises(GoalNotMetError, match=r"at most 0\.01 relative loss from 1\.0000") as error:
        fit(model, conf, loader(x, y), eval_func=lambda _: next(scores, 0.5))
    assert len(error.value.details["trials"]) == 2


def test_lower_is_better() -> None:
    model, x, y = make("mlp")
    criterion = AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=0.5)
    conf = PostTrainingQuantConfig(accuracy_criterion=criterion)
    losses = iter([1.0, 1.6, 1.4])
    int8 = fit(model, conf, loader(x, y), eval_func=lambda _: next(losses))
    assert [trial.accepted for trial in int8.trials] == [False, True]


@pytest.mark.parametrize(
    "batches",
    [
        lambda x, y: [x],
        lambda x, y: [(x, y)],
        lambda x, y: [[x, y]],
        lambda x, y: [(x,)],
        lambda x, y: [{"x": x}],
        lambda x, y: [{"x": x, "labels": y, "id": y}],
        lambda x, y: [({"x": x}, y)],
        lambda x, y: [transformers.BatchEncoding({"x": x, "label": y})],
    ],
)
def test_batches_of_any_shape_calibrate_alike(batches: Any) -> None:
    model, x, y = make("mlp")
    expected = fit(model, PostTrainingQuantConfig(), [x])
    assert torch.equal(fit(model, PostTrainingQuantConfig(), batches(x, y))(x), expected(x))


def test_several_inputs_and_a_label() -> None:
    class Two(MLP):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return super().forward(a + b)

    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 12)
    for batch in ((a, b), (a, b, torch.zeros(32)), {"a": a, "b": b}):
        assert int8_names(fit(Two(), PostTrainingQuantConfig(), [batch])) == {"first", "second"}
    with pytest.raises(TypeError, match="does not say which"):
        fit(Two(), PostTrainingQuantConfig(), [(a, b, a, b)])
    with pytest.raises(TypeError, match="b is missing"):
        fit(Two(), PostTrainingQuantConfig(), [{"a": a}])


def test_calibration_function_runs_the_model() -> None:
    model, x, y = make("mlp")
    expected = fit(model, PostTrainingQuantConfig(calibration_sampling_size=32), loader(x, y))

    def calibrate(given: nn.Module) -> None:
        for inputs, _ in loader(x, y):
            given(inputs)

    found = fit(model, PostTrainingQuantConfig(calibration_sampling_size=32), calib_func=calibrate)
    assert torch.equal(found(x), expected(x))


def test_metric_and_dataloader_evaluate() -> None:
    model, x, y = make("mlp")
    conf = PostTrainingQuantConfig(accuracy_criterion=ANY_LOSS)
    data = loader(x, y)
    by_name = fit(model, conf, data, eval_dataloader=data, eval_metric="accuracy")
    metric = torchmetrics.Accuracy(task="multiclass", num_classes=4)
    by_metric = fit(model, conf, data, eval_dataloader=data, eval_metric=metric)
    assert by_name.trials[0].accuracy == pytest.approx(accuracy(x, y)(by_name))
    assert by_metric.trials[0].accuracy == pytest.approx(by_name.trials[0].accuracy)
    assert by_name.report().baseline.accuracy == 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "bert"}, TypeError, "model is 'bert'"),
        ({"conf": {"approach": "static"}}, TypeError, "conf is {'approach': 'static'}"),
        ({"calib_dataloader": 5}, TypeError, "calib_dataloader is 5"),
        ({"calib_dataloader": []}, ValueError, "yields no batch"),
        ({"calib_dataloader": ["text"]}, TypeError, "'text'"),
        ({"calib_dataloader": [{"y": torch.ones(2, 12)}]}, TypeError, "x is missing"),
        ({"calib_dataloader": None}, ValueError, "'static' needs calibration"),
        ({"calib_func": len}, ValueError, "calib_dataloader and calib_func"),
        ({"calib_dataloader": None, "calib_func": 3}, TypeError, "calib_func is 3"),
        ({"calib_dataloader": None, "calib_func": lambda model: None}, ValueError, "did not call the model"),
        ({"eval_func": 0.9}, TypeError, "eval_func is 0.9"),
        ({"eval_func": lambda model: "good"}, TypeError, "eval_func returned 'good'"),
        ({"eval_func": lambda model: None}, TypeError, "eval_func returned None"),
        ({"eval_dataloader": [1]}, ValueError, "eval_metric"),
        ({"eval_metric": "accuracy"}, ValueError, "eval_dataloader"),
        ({"eval_dataloader": [1], "eval_metric": "bleu"}, TypeError, "eval_metric is 'bleu'"),
        ({"eval_func": len, "eval_metric": "accuracy"}, ValueError, "eval_func"),
    ],
)
def test_wrong_argument_is_named(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    model, x, y = make("mlp")
    given = {"model": model, "conf": PostTrainingQuantConfig(), "calib_dataloader": loader(x, y), **arguments}
    with pytest.raises(error) as found:
        fit(**given)
    assert words in str(found.value)


def test_dynamic_needs_no_data() -> None:
    model, x, _ = make("mlp")
    int8 = fit(model, PostTrainingQuantConfig(approach="dynamic"))
    assert int8.report().layers.dynamic == ["first", "second"]
    assert relative_error(int8(x).detach(), model(x).detach()) < 0.05


def test_example_inputs_say_which_layers_take_part() -> None:
    class Branching(MLP):
        def forward(self, x: Tensor, deep: bool = True) -> Tensor:
            hidden = torch.relu(self.first(x))
            return self.head(torch.relu(self.second(hidden)) if deep else hidden)

    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
    shallow = PostTrainingQuantConfig(approach="dynamic", example_inputs={"x": x, "deep": False})
    layers = fit(Branching(), shallow).report().layers
    assert layers.dynamic == ["first"]
    assert layers.float_layers["second"] == "not used by the forward pass"
    deep = PostTrainingQuantConfig(example_inputs=x)
    assert fit(Branching(), deep, [x]).report().layers.static == ["first", "second"]


def test_excluded_float_keeps_no_layer_float() -> None:
    model, x, y = make("mlp")
    scores = iter([1.0])
    conf = PostTrainingQuantConfig(excluded_precisions=["fp32"], tuning_criterion=TuningCriterion(max_trials=50))
    with pytest.raises(GoalNotMetError) as error:
        fit(model, conf, loader(x, y), eval_func=lambda _: next(scores, 0.5))
    assert not [trial for trial in error.value.details["trials"] if "float" in trial["name"]]


@pytest.mark.parametrize(
    ("settings", "static", "weight_only", "dynamic"),
    [
        ({}, ["first", "second"], [], []),
        ({"op_type_dict": {"Linear": {"weight": {"dtype": "int8"}, "activation": {"dtype": "fp32"}}}}, [], ["first", "second", "head"], []),
        ({"op_name_dict": {"first": {"weight": {"dtype": "fp32"}, "activation": {"dtype": "fp32"}}}}, ["second"], [], []),
        ({"op_name_dict": {".*t": {"activation": {"dtype": "fp32"}}}}, ["second"], [], []),
        ({"op_name_dict": {"second": {"activation": {"granularity": "per_token"}}}}, ["first"], [], ["second"]),
        ({"op_name_dict": {"head": {"weight": {"dtype": ["int8"]}}}}, ["first", "second", "head"], [], []),
        ({"recipes": {"last_conv_or_matmul_quantization": True}}, ["first", "second", "head"], [], []),
        ({"recipes": {"first_conv_or_matmul_quantization": False}}, ["second"], [], []),
    ],
)  # fmt: skip
def test_configuration_says_which_layers_are_int8(
    settings: dict[str, Any], static: list[str], weight_only: list[str], dynamic: list[str]
) -> None:
    layers = quantized_mlp(**settings).report().layers
    assert (layers.static, layers.weight_only, layers.dynamic) == (static, weight_only, dynamic)


def test_activation_scheme_algorithm_and_range_are_what_was_asked() -> None:
    plain = quantized_mlp(recipes={"smooth_quant": False})
    symmetric = quantized_mlp(
        recipes={"smooth_quant": False}, op_type_dict={"Linear": {"activation": {"scheme": "sym", "algo": "minmax"}}}
    )
    fewer = quantized_mlp(
        recipes={"smooth_quant": False}, reduce_range=True, op_type_dict={"Linear": {"activation": {"algo": "minmax"}}}
    )
    full = quantized_mlp(recipes={"smooth_quant": False}, op_type_dict={"Linear": {"activation": {"algo": "minmax"}}})
    per_tensor = quantized_mlp(op_type_dict={"Linear": {"weight": {"granularity": "per_tensor"}}})
    assert symmetric.second.input_zero_point.item() == 0 != plain.second.input_zero_point.item()
    assert fewer.second.input_scale.item() == pytest.approx(full.second.input_scale.item() * 255 / 127)
    assert len(per_tensor.first.weight_scale.unique()) == 1 < len(plain.first.weight_scale.unique())


def test_smoothquant_is_used_where_it_is_asked_for() -> None:
    asked = quantized_mlp(recipes={"smooth_quant": True, "smooth_quant_args": {"alpha": 0.4}}).report()
    auto = quantized_mlp(recipes={"smooth_quant": True, "smooth_quant_args": {"alpha": "auto"}}).report()
    assert "smoothquant-0.4" in asked.chosen
    assert "smoothquant-auto" in auto.chosen
    assert "smoothquant" not in " ".join(quantized_mlp(recipes={"smooth_quant": False}).report().ranking)


@pytest.mark.parametrize("recipe", ["fast_bias_correction", "weight_correction"])
def test_corrections_change_what_they_name(recipe: str) -> None:
    same = {"smooth_quant": False}  # or another candidate may be the better one
    plain, corrected = quantized_mlp(recipes=same), quantized_mlp(recipes={recipe: True, **same})
    assert not torch.equal(plain.second.bias, corrected.second.bias)
    scales = torch.equal(plain.second.weight_scale, corrected.second.weight_scale)
    assert scales is (recipe == "fast_bias_correction")


def test_gptq_is_a_candidate_where_it_is_asked_for() -> None:
    assert any("gptq" in name for name in quantized_mlp(recipes={"gptq": True}).report().ranking)
    assert not any("gptq" in name for name in quantized_mlp().report().ranking)


STRATEGIES = ["basic", "mse", "bayesian", "tpe", "random", "exhaustive", "conservative"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:GPSampler is experimental")
def test_every_strategy_finds_a_model_that_meets_the_goal(strategy: str) -> None:
    model, x, y = make("mlp")
    tuning = TuningCriterion(strategy=strategy, strategy_kwargs={"seed": 1}, max_trials=40)
    conf = PostTrainingQuantConfig(approach="auto", tuning_criterion=tuning)
    calls = 0

    def evaluate(candidate: nn.Module) -> float:  # the float model and, later, any model without static layers
        nonlocal calls
        calls += 1
        static = any(getattr(module, "activation", "") == "static" for module in candidate.modules())
        return 0.5 if static and strategy != "conservative" else 1.0

    int8 = fit(model, conf, loader(x, y), eval_func=evaluate)
    assert int8.trials[-1].accepted
    if strategy == "conservative":  # from half the layers in float to none
        assert [len(trial.name.split("float")) for trial in int8.trials][-1] == 1
        assert "float" in int8.trials[0].name
    else:
        assert int8.report().approach == "dynamic"


def test_quant_level_0_is_the_conservative_strategy() -> None:
    model, x, y = make("mlp")
    conf = PostTrainingQuantConfig(quant_level=0)
    assert "float" in fit(model, conf, loader(x, y), eval_func=lambda _: 1.0).trials[0].name


def test_same_seed_same_order_other_seed_another() -> None:
    model, x, y = make("mlp")

    def order(seed: int) -> list[str]:
        tuning = TuningCriterion(strategy="random", strategy_kwargs={"seed": seed}, max_trials=8)
        scores = iter([1.0])
        with pytest.raises(GoalNotMetError) as error:
            fit(
                model,
                PostTrainingQuantConfig(tuning_criterion=tuning),
                loader(x, y),
                eval_func=lambda _: next(scores, 0.5),
            )
        return [trial["name"] for trial in error.value.details["trials"]]

    assert order(1) == order(1) != order(2)


def test_objective_decides_between_trials_that_meet_the_goal() -> None:
    model, x, y = make("mlp")
    scores = {"static": 0.991, "dynamic": 0.999}

    def evaluate(candidate: nn.Module) -> float:
        kinds = {getattr(module, "activation", None) for module in candidate.modules()}
        return next((score for kind, score in scores.items() if kind in kinds), 1.0)

    def chosen(objective: Any) -> str:
        conf = PostTrainingQuantConfig(approach="auto", tuning_criterion=TuningCriterion(objective=objective))
        return fit(model, conf, loader(x, y), eval_func=evaluate).report().chosen

    assert chosen("performance").startswith("static")
    assert chosen("accuracy") == "dynamic"
    assert "float" not in chosen("modelsize")


def test_next_calibration_size_is_tried_when_the_goal_is_missed() -> None:
    model, x, y = make("mlp")
    seen: list[float] = []

    def evaluate(candidate: nn.Module) -> float:
        if not int8_names(candidate):
            return 1.0
        seen.append(candidate.second.input_scale.item() if hasattr(candidate.second, "input_scale") else 0.0)
        return 1.0 if seen[-1] > seen[0] > 0 else 0.5  # more examples, a wider range

    conf = PostTrainingQuantConfig(
        calibration_sampling_size=[4, 96],
        recipes={"smooth_quant": False},
        op_type_dict={"Linear": {"activation": {"algo": "minmax"}}},
        tuning_criterion=TuningCriterion(max_trials=1),
    )
    assert fit(model, conf, loader(x, y), eval_func=evaluate).trials[0].accepted


def test_result_behaves_as_the_model_did() -> None:
    model, x, y = make("cnn")
    int8 = fit(model.train(), PostTrainingQuantConfig(), loader(x, y))
    assert model.training  # as it was given
    assert not int8.training
    for other in (copy.deepcopy(int8), pickle.loads(pickle.dumps(int8))):
        assert torch.equal(other(x), int8(x))
        assert other.report() == int8.report()
    assert {name.split(".")[0] for name in int8.state_dict()} == {"conv1", "norm", "conv2", "fc", "head"}
    assert int8.fc.weight.dtype == torch.int8


class Tied(nn.Module):
    """A layer that runs twice, under two names, and words that are multiplied by the rows they are looked up in."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup, self.unused = nn.Embedding(30, 16), nn.Embedding(30, 16)
        self.first = self.second = nn.Linear(16, 16)
        self.words = nn.Linear(16, 30, bias=False)
        self.unused.weight = self.words.weight = self.lookup.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(torch.relu(self.second(torch.relu(self.first(self.lookup(ids))))))


def test_weights_that_modules_share_are_one_int8_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.randint(0, 30, (8, 6))
    int8 = fit(model, PostTrainingQuantConfig(), [ids])
    assert int8_names(int8) == {"lookup", "unused", "first", "words"}
    assert int8.second is int8.first
    assert int8.report().layers.float_layers == {}
    assert relative_error(int8(ids).detach(), model(ids).detach()) < 0.05
    int8.save(tmp_path / "saved")
    loaded = hfq.load(tmp_path / "saved", model=Tied())
    assert loaded.second is loaded.first
    assert torch.equal(loaded(ids), int8(ids))


def test_weight_that_two_matmuls_share_stays_float_and_says_so() -> None:
    class Two(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(48, 48)
            self.third.weight = self.second.weight

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.head(self.third(torch.relu(self.first(x))))

    float_layers = fit(Two(), PostTrainingQuantConfig(), [torch.randn(8, 12)]).report().layers.float_layers
    assert float_layers["second"] == "shares its weight with third"
    assert float_layers["third"] == "shares its weight with second"


def test_module_that_was_saved_needs_a_skeleton_that_fits(tmp_path: Path) -> None:
    quantized_mlp().save(tmp_path / "mlp")
    with pytest.raises(UsageError, match=r"model=MLP\(…\)"):
        hfq.load(tmp_path / "mlp")
    with pytest.raises(SourceError, match="does not fit model, a CNN"):
        hfq.load(tmp_path / "mlp", model=CNN())


def test_save_replaces_its_own_folder_and_no_other(tmp_path: Path) -> None:
    int8 = quantized_mlp()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="was not written by hfq"):
        int8.save(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    int8.save(tmp_path / "out")
    int8.save(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
    assert json.loads((tmp_path / "out" / "hfq.json").read_text())["checkpoint"]["id"] == "MLP"


def test_push_publishes_what_save_writes(hub: LocalHub) -> None:
    int8 = quantized_mlp()
    url = int8.push_to_hub("fit-mlp", token=hub.token)
    assert url.startswith(hub.url)
    loaded = hfq.load(url.removeprefix(f"{hub.url}/"), model=MLP(), token=hub.token)
    assert torch.equal(loaded(torch.ones(1, 12)), int8(torch.ones(1, 12)))


STOCK = """
import sys, torch
from transformers import AutoModelForSequenceClassification
answers, *folders = sys.argv[1:]
inputs, expected = torch.load(answers)
for folder in folders:
    found = AutoModelForSequenceClassification.from_pretrained(folder)(**inputs).logits
    print(((found - expected).norm() / expected.norm()).item())
assert "hfq" not in sys.modules
"""


@pytest.fixture(params=["Bert", "GPT2"])
def transformer(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, list[dict[str, Tensor]]]]:
    """An encoder of Linear layers, and one of Conv1D layers."""
    if request.param == "Bert":
        yield tiny(), token_batches(2)
        return
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "num_labels": 3}
    config = transformers.GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    yield transformers.GPT2ForSequenceClassification(config).eval(), [{"input_ids": torch.randint(3, 100, (16, 9))}]


def test_transformers_model_opens_in_stock_transformers(
    transformer: tuple[nn.Module, list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    model, batches = transformer
    int8 = fit(model, PostTrainingQuantConfig(), batches)
    int8.save(tmp_path / "saved")
    with torch.inference_mode():
        expected = int8(**batches[0]).logits.clone()
        assert relative_error(expected, model(**batches[0]).logits) < 0.1
    torch.save((batches[0], expected), tmp_path / "answers.pt")
    loaded = hfq.load(tmp_path / "saved")
    with torch.inference_mode():
        assert relative_error(loaded(**batches[0]).logits, expected) < 0.02  # fused: a code may round the other way
    loaded.save_pretrained(tmp_path / "again")
    child = subprocess.run(
        [stock_python(), "-c", STOCK, tmp_path / "answers.pt", tmp_path / "saved", tmp_path / "again"],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    errors = [float(line) for line in child.stdout.split()]
    assert len(errors) == 2 and max(errors) < 0.05


def test_training_one_model_does_not_move_the_other(tmp_path: Path) -> None:
    tiny(vocab_size=8192).save_pretrained(tmp_path / "float")  # its embedding is large enough to stay in the file
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "float").eval()
    batches = token_batches(2)
    floats = {"weight": {"dtype": "fp32"}}
    int8 = fit(model, PostTrainingQuantConfig(op_type_dict={"Embedding": floats}), batches)
    embedding = int8.get_input_embeddings().weight
    with torch.inference_mode():
        before = int8(**batches[0]).logits.clone()
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(int8(**batches[0]).logits, before)
        assert any(embedding.data_ptr() in file for file in checkpoint_files()) or not checkpoint_files()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama, tied", "t5", "vit", "wav2vec2"])
def test_models_in_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = FAMILIES[name].make().to(dtype), FAMILIES[name].inputs()
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    int8 = fit(model, PostTrainingQuantConfig(recipes={"smooth_quant": False}), [inputs])
    with torch.inference_mode():
        answer, expected = int8(**inputs)[0], model(**inputs)[0]
    assert relative_error(answer, expected) < 0.1
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    int8.save(tmp_path / "saved")
    inputs = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}
    with torch.inference_mode():
        assert relative_error(type(model).from_pretrained(tmp_path / "saved")(**inputs)[0], answer) < 0.02


def test_torch_transformer_layers_run_by_their_modules(tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 4)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])

    torch.manual_seed(0)
    model = Encoder().eval()
    inputs = {"x": torch.randn(4, 7, 16), "padding": torch.arange(7) > torch.tensor([6, 6, 4, 3])[:, None]}
    int8 = fit(model, PostTrainingQuantConfig(), [inputs])
    assert {f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)} <= int8_names(int8)
    int8.save(tmp_path / "saved")
    loaded = hfq.load(tmp_path / "saved", model=Encoder())
    with torch.inference_mode():
        assert relative_error(int8(**inputs), model(**inputs)) < 0.05
        assert torch.equal(loaded(**inputs), int8(**inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_saved_in_whatever_mode_and_dtype_a_trainer_left_it(dtype: torch.dtype, tmp_path: Path) -> None:
    batches = token_batches(1)
    int8 = fit(tiny(), PostTrainingQuantConfig(approach="dynamic"), calib_dataloader=batches).train().to(dtype)
    int8.save(tmp_path / "saved")
    assert all(module.training for module in int8.modules())
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.inference_mode():
        assert relative_error(int8.eval()(**batches[0]).logits.float(), loaded(**batches[0]).logits) < 0.05


def test_what_stock_transformers_would_open_otherwise_is_not_saved(tmp_path: Path) -> None:
    int8 = fit(tiny(), PostTrainingQuantConfig(), token_batches(1))
    int8.bert.pooler.dense.forward = lambda x: x * 3  # which no folder holds
    with pytest.raises(ExportError, match="another model where hfq is not installed: its answer differs by"):
        int8.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_rounding_of_inputs_alone_makes_no_other_model(tmp_path: Path) -> None:
    """Stock transformers opens it widened, and rounds no inputs: what rounding does to an answer is no difference."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    int8 = fit(model, PostTrainingQuantConfig(recipes={"smooth_quant": False}), [inputs])
    for module in int8.modules():
        if isinstance(module, Int8Conv):
            module.input_scale.data.mul_(0.02)  # nearly everything is out of range
    with torch.inference_mode():
        answer = int8(**inputs).logits
        assert relative_error(answer, model(**inputs).logits) > 0.5
        int8.save(tmp_path / "saved")
        assert relative_error(hfq.load(tmp_path / "saved")(**inputs).logits, answer) < 0.02


def test_convolutions_beside_buffers_that_are_called_weights_stay_float() -> None:
    """As those of classes in Mask2Former's loss: stock transformers could not open what it had to widen."""
    sizes = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32], "num_attention_heads": 2}
    model = transformers.MobileViTForImageClassification(transformers.MobileViTConfig(**sizes, image_size=32)).eval()
    model.register_buffer("empty_weight", torch.ones(3))
    conf = PostTrainingQuantConfig(approach="dynamic")
    report = fit(model, conf, [{"pixel_values": torch.randn(2, 3, 32, 32)}]).report()
    assert "buffers that are called weights" in report.layers.float_layers["mobilevit.conv_stem.convolution"]
    assert report.layers.dynamic


def test_an_architecture_that_stock_transformers_cannot_open_is_not_saved(tmp_path: Path) -> None:
    family = FAMILIES["dinov2"]
    model = replace(family, config={**family.config, "use_swiglu_ffn": False}).make()
    int8 = fit(model, PostTrainingQuantConfig(), [family.inputs()])
    with pytest.raises(
        UnsupportedError, match="opens no compressed-tensors checkpoint of Dinov2ForImageClassification"
    ):
        int8.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_changes_its_weights_is_refused_and_answers_as_before() -> None:
    """RWKV's first forward scales them down, so that 16 bits hold what they make."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    model = transformers.RwkvModel(transformers.RwkvConfig(**sizes, rescale_every=1)).eval()
    tokens = {"input_ids": torch.arange(2, 42).view(4, 10)}
    with torch.no_grad():
        before = copy.deepcopy(model)(**tokens).last_hidden_state
    with pytest.raises(UnsupportedError, match="RwkvModel changes its own weights"):
        fit(model, PostTrainingQuantConfig(), calib_dataloader=[tokens])
    with torch.no_grad():
        assert torch.equal(model(**tokens).last_hidden_state, before)


def test_a_model_that_has_changed_its_weights_is_not_saved(tmp_path: Path) -> None:
    """One that is loaded would do so again, and its weights are int8."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes, rescale_every=1)).eval()
    tokens = {"input_ids": torch.arange(2, 42).view(4, 10)}
    with torch.no_grad():
        model(**tokens)
    int8 = fit(model, PostTrainingQuantConfig(), calib_dataloader=[tokens])
    with pytest.raises(UnsupportedError, match="RwkvForCausalLM changes its own weights"):
        int8.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
