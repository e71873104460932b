"""A model whose residual stream is rotated computes what it did, and outliers cost it less in int8."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILIES, Family
from support.models import ROUNDING, relative_error
from torch import Tensor
from transformers import T5ForTokenClassification

from hfq.config import AccuracyCriterion, PostTrainingQuantConfig
from hfq.ptq.rotation import find_rotation
from hfq.quantization import fit
from hfq.runtime.loading.stock import stock_transformers

_DECODER = FAMILIES["llama"].config
_WIDE = {"hidden_size": 128, "intermediate_size": 256, "d_model": 128, "d_ff": 256, "num_hidden_layers": 4}
OUTLIERS = (3, 17)  # channels of the stream
EXACT = {
    "llama with a head": Family("LlamaForSequenceClassification", _DECODER),
    "qwen3 with a head": Family("Qwen3ForSequenceClassification", _DECODER),
    "t5 of tokens": FAMILIES["t5 of tokens"],
    "vit": FAMILIES["vit"],
}
OTHERS = ("bert", "dinov2", "gemma3", "llama, tied", "qwen3")


def with_outliers(family: Family, *, times: float) -> Any:
    """The family's model, wider, with norms that weigh channels, and two that are `times` as large where the stream begins."""
    config = {key: _WIDE.get(key, value) for key, value in family.config.items()}
    model = replace(family, config=config).make(widened=2)
    width = config.get("hidden_size") or config["d_model"]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() > 1 and parameter.shape[-1] == width and ("embed" in name or "shared" in name):
            parameter[..., OUTLIERS] *= times
    return model


@torch.inference_mode()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found.float()


@pytest.mark.parametrize("name", EXACT)
def test_a_rotated_model_computes_the_same(name: str) -> None:
    model, inputs = with_outliers(EXACT[name], times=20), EXACT[name].inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rotation = find_rotation(model, inputs)
    assert rotation is not None
    rotated = rotation.applied(model)
    assert relative_error(logits(rotated, inputs), logits(model, inputs)) < 1e-3
    assert rotation.was_applied(rotated, model)
    assert not rotation.was_applied(model, model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", OTHERS)
def test_what_would_compute_something_else_is_left_alone(name: str) -> None:
    """The norm comes last, the stream itself is what is returned, or a weight is read elsewhere too."""
    assert find_rotation(FAMILIES[name].make(), FAMILIES[name].inputs()) is None


def test_it_meets_a_goal_that_plain_candidates_miss(tmp_path: Path) -> None:
    """And to stock transformers the folder is as any other."""
    family = EXACT["t5 of tokens"]
    model, inputs = with_outliers(family, times=60), family.inputs()
    expected = logits(model, inputs)

    def closeness(candidate: Any) -> float:
        return 1 - relative_error(logits(candidate, inputs), expected)

    conf = PostTrainingQuantConfig(approach="static", accuracy_criterion=AccuracyCriterion(tolerable_loss=0.021))
    int8 = fit(model, conf, calib_dataloader=[inputs], eval_func=closeness)
    assert int8.trials[-1].name.endswith("rotated")
    assert not any(trial.accepted for trial in int8.trials[:-1])
    int8.save(tmp_path / "int8")
    found = logits(T5ForTokenClassification.from_pretrained(tmp_path / "int8").eval(), inputs)
    assert relative_error(found, logits(int8, inputs)) < ROUNDING
    with stock_transformers():
        stock = T5ForTokenClassification.from_pretrained(tmp_path / "int8").eval()
    assert relative_error(logits(stock, inputs), expected) < 0.03
