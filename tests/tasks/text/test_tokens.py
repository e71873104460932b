"""Texts of strangers' files, which may hold something else in a row."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.command import CHECKPOINT
from transformers import AutoTokenizer

from hfq.common.errors import DataError
from hfq.data.dataset import load_splits
from hfq.tasks.base import Processor
from hfq.tasks.registry import make_task

SEQUENCE = {"architectures": ["BertForSequenceClassification"]}


@pytest.mark.parametrize(
    ("config", "row", "column"),
    [
        ({**SEQUENCE, "num_labels": 3}, {"premise": "a", "hypothesis": "b", "label": 0}, "hypothesis"),
        (
            {**SEQUENCE, "num_labels": 1, "sentence_transformers": {}},
            {"query": "a", "passage": "b", "label": 0},
            "passage",
        ),
        (
            {"architectures": ["BertModel"], "vocab_size": 8000},
            {"sentence1": "a", "sentence2": "b", "score": 1},
            "sentence2",
        ),
        (
            {"architectures": ["BertForMultipleChoice"]},
            {"sent1": "a", "sent2": "b", "ending0": "b", "ending1": "c", "label": 0},
            "ending1",
        ),
    ],
    ids=["classes", "passages", "vectors", "choices"],
)
def test_a_row_that_is_no_text_is_named(
    config: dict[str, Any], row: dict[str, Any], column: str, tmp_path: Path
) -> None:
    """And its column is not passed over: the other one alone would be another example."""
    rows = [row, {**row, column: 7}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    splits, _ = load_splits(str(tmp_path / "data.jsonl"), None, token=None)
    task, read = make_task(config), splits["train"]
    columns = task.columns(read.features, {})
    assert column in [name for names in columns.values() for name in names]
    with pytest.raises(DataError, match=rf"Row 1 \(from 0\) .* has 7 in column '{column}', and not a text"):
        task.encode(read, columns, Processor(AutoTokenizer.from_pretrained(CHECKPOINT), 32))
