"""Neural Compressor's vocabulary: what is accepted, what is refused and in which words, what the defaults are."""

from typing import Any

import pytest

from hfq.config import AccuracyCriterion, PostTrainingQuantConfig, TuningCriterion
from hfq.tuning.options import ALPHAS


def test_defaults_are_the_ones_users_know() -> None:
    conf = PostTrainingQuantConfig()
    assert (conf.approach, conf.backend, conf.device, conf.sampling_sizes) == ("static", "default", "cpu", [100])
    assert (conf.accuracy_criterion.tolerable_loss, conf.accuracy_criterion.criterion) == (0.01, "relative")
    assert (conf.tuning_criterion.max_trials, conf.tuning_criterion.timeout) == (600, 0)
    assert conf.accuracy_criterion.higher_is_better


@pytest.mark.parametrize(
    ("make", "keyword", "value"),
    [
        (PostTrainingQuantConfig, "approach", "weight_only"),
        (PostTrainingQuantConfig, "backend", "ipex"),
        (PostTrainingQuantConfig, "device", "gpu"),
        (PostTrainingQuantConfig, "domain", "recommendation_system"),
        (PostTrainingQuantConfig, "calibration_sampling_size", [0]),
        (PostTrainingQuantConfig, "calibration_sampling_size", []),
        (PostTrainingQuantConfig, "excluded_precisions", ["int8"]),
        (PostTrainingQuantConfig, "quant_level", 2),
        (PostTrainingQuantConfig, "recipes", {"layer_wise_quant": True}),
        (PostTrainingQuantConfig, "recipes", {"smooth_quant": True, "smooth_quant_args": {"alpha": 1.5}}),
        (PostTrainingQuantConfig, "recipes", {"smooth_quant": True, "smooth_quant_args": {"alpha": "max"}}),
        (PostTrainingQuantConfig, "recipes", {"smooth_quant_args": {"alpha": 0.5}}),
        (PostTrainingQuantConfig, "recipes", {"fast_bias": True}),
        (PostTrainingQuantConfig, "op_type_dict", {"Linear": {"weight": {"dtype": "int4"}}}),
        (PostTrainingQuantConfig, "op_type_dict", {"Linear": {"weight": {"scheme": "asym"}}}),
        (PostTrainingQuantConfig, "op_type_dict", {"Linear": {"output": {"dtype": "int8"}}}),
        (PostTrainingQuantConfig, "op_name_dict", {"layer.(": {"weight": {"dtype": "fp32"}}}),
        (PostTrainingQuantConfig, "op_name_dict", {"x": {"activation": {"algo": "median"}}}),
        (TuningCriterion, "strategy", "greedy"),
        (TuningCriterion, "strategy_kwargs", {"confidence_batches": 2}),
        (TuningCriterion, "timeout", -1),
        (TuningCriterion, "max_trials", 0),
        (TuningCriterion, "objective", "latency"),
        (TuningCriterion, "objective", {"objective": ["accuracy"], "weight": [1, 2]}),
        (TuningCriterion, "objective", []),
        (AccuracyCriterion, "criterion", "percent"),
        (AccuracyCriterion, "tolerable_loss", -0.1),
        (AccuracyCriterion, "tolerable_loss", float("nan")),
    ],
)
def test_value_out_of_range_is_named(make: type, keyword: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        make(**{keyword: value})
    assert keyword in str(error.value)


@pytest.mark.parametrize(
    ("make", "keyword", "value"),
    [
        (PostTrainingQuantConfig, "approach", 8),
        (PostTrainingQuantConfig, "calibration_sampling_size", "100"),
        (PostTrainingQuantConfig, "calibration_sampling_size", 2.5),
        (PostTrainingQuantConfig, "op_type_dict", ["Linear"]),
        (PostTrainingQuantConfig, "excluded_precisions", "bf16"),
        (PostTrainingQuantConfig, "reduce_range", "yes"),
        (PostTrainingQuantConfig, "recipes", {"smooth_quant": 1}),
        (PostTrainingQuantConfig, "accuracy_criterion", 0.01),
        (PostTrainingQuantConfig, "tuning_criterion", {"max_trials": 3}),
        (TuningCriterion, "strategy", None),
        (TuningCriterion, "max_trials", 2.0),
        (TuningCriterion, "max_trials", True),
        (TuningCriterion, "timeout", "60"),
        (TuningCriterion, "objective", 3),
        (AccuracyCriterion, "higher_is_better", "yes"),
        (AccuracyCriterion, "tolerable_loss", "1%"),
    ],
)
def test_value_of_the_wrong_type_is_named(make: type, keyword: str, value: Any) -> None:
    with pytest.raises(TypeError) as error:
        make(**{keyword: value})
    assert "expected" in str(error.value) or "not iterable" in str(error.value)


def test_unknown_keyword_is_refused() -> None:
    with pytest.raises(TypeError, match="quant_format"):
        PostTrainingQuantConfig(quant_format="QDQ")  # type: ignore[call-arg]


def test_objectives_are_weighted() -> None:
    both = TuningCriterion(objective={"objective": ["performance", "accuracy"], "weight": [3, 1]})
    assert both.weights() == {"performance": 0.75, "accuracy": 0.25}
    assert TuningCriterion(objective=["modelsize", "footprint"]).weights() == {"modelsize": 0.5, "footprint": 0.5}


@pytest.mark.parametrize(
    ("arguments", "alphas"),
    [
        ({}, ALPHAS),
        ({"domain": "cv"}, ()),
        ({"domain": "nlp"}, ALPHAS),
        ({"recipes": {"smooth_quant": False}}, ()),
        ({"domain": "cv", "recipes": {"smooth_quant": True}}, ALPHAS),
        ({"recipes": {"smooth_quant": True, "smooth_quant_args": {"alpha": 0.4}}}, [0.4]),
        ({"recipes": {"smooth_quant": True, "smooth_quant_args": {"alpha": [0.2, "auto"]}}}, [0.2, "auto"]),
    ],
)
def test_which_alphas_are_tried(arguments: dict[str, Any], alphas: Any) -> None:
    assert PostTrainingQuantConfig(**arguments).options().alphas == alphas
