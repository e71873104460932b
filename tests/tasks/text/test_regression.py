"""Regression, from strangers' rows to a published model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from scipy import stats
from support.command import forkserver
from support.trained.training import train, write_rows

from hfq.common.errors import DataError, UnsupportedError
from hfq.tasks.registry import make_task
from hfq.tasks.text.regression import Regression

CONFIG = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


def number_of(text: str) -> float:
    return min(len(text), 150) / 50


def references(rows: Dataset) -> list[Any]:
    task = Regression(CONFIG)
    columns = task.columns(rows.features, {})
    return task.references(rows, columns, task.align([rows], columns))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def batch(tokenizer: Any, texts: Any) -> dict[str, Any]:
        labels = torch.tensor([[number_of(text)] for text in texts])
        return {**tokenizer(texts, truncation=True, padding=True, return_tensors="pt"), "labels": labels}

    to = tmp_path_factory.mktemp("regression") / "bert-mini-length"
    return train(
        to, "AutoModelForSequenceClassification", batch, by_length=False, num_labels=1, problem_type="regression"
    )


@pytest.mark.parametrize("values", [[0.5, 3, 2.25], ["0.5", "3", "2.25"]])
def test_numbers_are_read_as_they_are(values: list[Any]) -> None:
    column = values if isinstance(values[0], str) else [float(value) for value in values]
    assert references(Dataset.from_dict({"text": ["a", "b", "c"], "score": column})) == [0.5, 3.0, 2.25]


def test_a_split_of_nothing_but_minus_one_has_no_labels() -> None:
    assert references(Dataset.from_dict({"text": ["a", "b"], "label": [-1.0, -1.0]})) == [None, None]
    assert references(Dataset.from_dict({"text": ["a", "b"], "label": [-1.0, 2.0]})) == [-1.0, 2.0]


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match=r"Row 1 \(from 0\) has 'high' in column 'label'"):
        references(Dataset.from_dict({"text": ["a", "b"], "label": ["1", "high"]}))


def test_one_number_for_all_is_refused() -> None:
    with pytest.raises(DataError, match=r"Every label of split .given. is 3\.5 .*, and nothing is told apart"):
        references(Dataset.from_dict({"text": ["a", "b"], "label": [3.5, 3.5]}))


def test_metrics_are_those_of_the_field() -> None:
    task = make_task(CONFIG)
    right = [0.0, 1.0, 2.0, 4.0]
    given = [0.5, 0.25, 2.5, 3.0]
    outputs = [torch.tensor([value]) for value in given]
    assert list(task.metrics) == ["spearman", "pearson", "mean_squared_error"]
    assert task.score("spearman", outputs, right) == pytest.approx(stats.spearmanr(given, right).statistic)
    assert task.score("pearson", outputs, right) == pytest.approx(stats.pearsonr(given, right).statistic)
    assert task.score("mean_squared_error", outputs, right) == pytest.approx((0.25 + 0.5625 + 0.25 + 1) / 4)
    assert not task.metrics["mean_squared_error"].higher_is_better


def test_several_numbers_are_refused() -> None:
    config = {**CONFIG, "problem_type": "regression", "id2label": {"0": "x", "1": "y"}}
    with pytest.raises(UnsupportedError, match="puts out 2 numbers"):
        make_task(config)


def test_an_error_is_better_when_lower(checkpoint: Path, tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "data", lambda text: {"text": text, "score": number_of(text)}, train=200, validation=150, test=100
    )
    arguments = ("quantize", checkpoint, "--dataset", data, "--output", "out", "--metric", "mean_squared_error")
    done = forkserver().hfq(*arguments, "--criterion", "absolute", "--tolerable-loss", 0.05, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    baseline, quantized = report["baseline"]["accuracy"], report["quantized"]["accuracy"]
    assert (report["task"], report["goal"]["higher_is_better"]) == ("regression", False)
    assert baseline < report["trivial"]["score"] / 2
    assert quantized <= baseline + 0.05
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    code = card.split("nothing else changes\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "out"))
    scope: dict[str, Any] = {}
    exec(code.replace("\nmodel(", "\nanswer = model("), scope)
    tokens = scope["model"].tokenizer("The sun shines.", return_tensors="pt")
    logit = scope["model"].model(**tokens).logits.item()
    assert scope["answer"][0]["score"] == pytest.approx(logit, abs=1e-4)  # and not its sigmoid
    page = forkserver().hfq("report", "out", cwd=tmp_path)
    assert page.code == 0, page.err
    assert "The goal is at most" in (tmp_path / "report.html").read_text(encoding="utf-8")
    again = forkserver().hfq("eval", "out", "--dataset", data, "--split", "test", cwd=tmp_path)
    found = dict(line.split() for line in again.out.splitlines() if len(line.split()) == 2)
    assert (found["metric"], found["task"]) == ("spearman", "regression")
    assert float(found["Spearman"]) > 0.9 and "accuracy" not in found
