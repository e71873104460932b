"""Which splits are evaluated, and how a large one is looked at."""

from pathlib import Path

import pytest
from support.command import CHECKPOINT, DEMO, write_slice

from hfq.common.errors import DataError
from hfq.common.ui import Reporter
from hfq.data.session import open_session
from hfq.data.splits import evaluation_splits, holdout_split
from hfq.recipe import Recipe

SPLITS = {"train": [1], "validation": [1, 2], "test": [1]}


def test_several_splits_are_asked_for_with_commas() -> None:
    assert evaluation_splits(SPLITS, "validation, test,validation") == ["validation", "test"]
    assert evaluation_splits(SPLITS, None) == ["validation"]
    with pytest.raises(DataError, match="--split 'dev' is not a split"):
        evaluation_splits(SPLITS, "validation,dev")
    assert holdout_split(SPLITS, {"validation", "test", "train"}, lambda _: True) is None


def test_splits_that_are_evaluated_together_are_one(tmp_path: Path) -> None:
    data = write_slice(tmp_path / "data", train=20, validation=400, test=400)
    recipe = Recipe(checkpoint=str(CHECKPOINT), dataset=str(data), split="validation,test")
    session = open_session(recipe, recipes=DEMO, ui=Reporter(), token=None)
    evaluation = session.data.evaluation
    assert session.data.info.split == "validation,test"
    assert session.data.info.examples == len(evaluation) == 800
    assert session.data.info.holdout_split is None
    assert list(evaluation.looks) == [512, 800]
    assert sorted(evaluation.rows) == list(range(800))
    assert len(set(evaluation.rows[:512]) & set(range(400))) in range(200, 312)  # of both, by chance
    lengths = [len(encoding["input_ids"]) for encoding in evaluation.encodings]
    assert lengths[:512] == sorted(lengths[:512])
