"""A model is evaluated in this process, or by Lightning where another engine is asked for, alike."""

from typing import Any

import pytest
import torch
from support.command import CHECKPOINT
from support.models import token_batches
from transformers import AutoModelForSequenceClassification

from hfq.common.errors import HfqError, UsageError
from hfq.measure.evaluate import Engine, Evaluation, evaluate
from hfq.measure.timing import timed_batches
from hfq.tasks.registry import make_task


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(CHECKPOINT).eval()


def evaluated(model: Any, engine: Engine) -> Evaluation:
    batches = token_batches(3, rows=4, length=9)
    task = make_task(model.config.to_dict())
    return evaluate(model, batches, [0, 1, 0, 1] * 3, task=task, metric="accuracy", engine=engine)


def test_lightning_finds_what_this_process_finds(model: Any) -> None:
    here, there = evaluated(model, Engine()), evaluated(model, Engine(accelerator="auto"))
    assert len(here.outputs) == 12
    assert all(map(torch.equal, here.outputs, there.outputs))
    assert here.score == there.score
    assert here.duration_s > 0
    assert there.duration_s > 0


def test_an_engine_that_lightning_refuses_is_named(model: Any) -> None:
    with pytest.raises(UsageError, match="no-such-device"):
        evaluated(model, Engine(accelerator="no-such-device"))


@pytest.mark.parametrize("engine", [Engine(), Engine(accelerator="auto")])
def test_numbers_that_are_none_are_refused(engine: Engine) -> None:
    broken = AutoModelForSequenceClassification.from_pretrained(CHECKPOINT).eval()
    torch.nn.init.constant_(broken.classifier.bias, float("nan"))
    with pytest.raises(HfqError, match="NaN or infinity"):
        evaluated(broken, engine)


def test_full_batches_are_timed_and_not_the_rest_of_a_split() -> None:
    batches = [*token_batches(20, rows=32), *token_batches(1, rows=2)]
    assert [len(batch["input_ids"]) for batch in timed_batches(batches)] == [32, 32]
    assert len(timed_batches(batches[-2:])) == 2  # so few are all timed
