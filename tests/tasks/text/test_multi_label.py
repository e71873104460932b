"""Multi-label classification, from strangers' rows to a published model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from support.command import forkserver
from support.trained.training import has_digits, train, write_rows
from transformers import AutoModelForSequenceClassification

from hfq.common.errors import DataError
from hfq.tasks.registry import make_task
from hfq.tasks.text.multi_label_classification import MultiLabelClassification

NAMES = ("number", "question", "long")
CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "problem_type": "multi_label_classification",
    "id2label": dict(enumerate(NAMES)),
}
RIGHT = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def labels_of(text: str) -> list[str]:
    holds = (has_digits(text), "?" in text, len(text) > 80)
    return [name for name, is_there in zip(NAMES, holds, strict=True) if is_there]


def references(rows: Dataset, **requested: list[str]) -> list[Any]:
    task = MultiLabelClassification(CONFIG)
    columns = task.columns(rows.features, requested)
    return task.references(rows, columns, task.align([rows], columns))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def batch(tokenizer: Any, texts: Any) -> dict[str, Any]:
        labels = [[float(name in labels_of(text)) for name in NAMES] for text in texts]
        return {**tokenizer(texts, truncation=True, padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}

    ids = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    to = tmp_path_factory.mktemp("multi-label") / "bert-mini-labels"
    problem = "multi_label_classification"
    return train(to, "AutoModelForSequenceClassification", batch, problem_type=problem, **ids)


def test_labels_may_be_written_in_many_ways() -> None:
    text = ["a", "b", "c"]
    lists = [["number", "long"], [], ["question"]]
    ids = [[0, 2], [], [1]]
    named = Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=["long", "number", "question"]))})
    found = [
        Dataset.from_dict({"text": text, "labels": lists}),
        Dataset.from_dict({"text": text, "labels": ids}),
        Dataset.from_dict({"text": text, "labels": RIGHT}),
        Dataset.from_dict({"text": text, "labels": [[float(x) for x in row] for row in RIGHT]}),
        Dataset.from_dict({"text": text, "labels": [[1, 0], [], [2]]}, features=named),  # in another order
        Dataset.from_dict(
            {"text": text, "long": ["1", "0", "0"], "Number": ["1", "0", "0"], "question": ["0", "0", "1"]}
        ),
        Dataset.from_dict(
            {"text": text, "question": [False, False, True], "number": [True, False, False], "long": [1, 0, 0]}
        ),
    ]
    assert [references(rows) for rows in found] == [RIGHT] * len(found)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"labels": ["number", "long"]}, "gives any number of labels. Expected lists of labels"),
        (
            {"labels": [[["number"]], [["long"]]]},
            r"holds \['number'\] where a label is expected. Expected lists of labels",
        ),
        ({"labels": [["number"], ["loud"]]}, "do not fit the model's"),
        ({"labels": [[0, 3], [1]]}, "do not fit the model's"),
        ({"labels": [["long"], ["long"]]}, r"Every label of split 'given' is \('long',\)"),
        (
            {"labels": [[0, 1], [1, 1]]},
            r"holds \[1, 1\], in which a label is there twice; .* a number for each of 3 labels",
        ),
        (
            {"number": ["1", "2"], "question": ["0", "1"], "long": ["0", "0"]},
            "'number' has the value '2'; expected 0 or 1",
        ),
        ({"other": [1, 2]}, "Which column holds the label is not clear"),
    ],
)
def test_labels_that_do_not_fit_are_refused(rows: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        references(Dataset.from_dict({"text": ["a", "b"], **rows}))


def test_metrics_are_those_of_the_field() -> None:
    task = make_task(CONFIG)
    outputs = [torch.tensor(row) for row in ([2.0, -1.0, -3.0], [-1.0, 0.5, -1.0], [-2.0, 1.0, -0.5])]
    assert list(task.metrics) == ["micro_f1", "macro_f1", "mean_average_precision"]
    assert task.score("micro_f1", outputs, RIGHT) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert task.score("macro_f1", outputs, RIGHT) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert task.score("mean_average_precision", outputs, RIGHT) == pytest.approx((1 + 1 + 1 / 3) / 3)
    right = task.per_example(outputs, RIGHT)
    assert right is not None and right.tolist() == [False, False, True]


def test_a_checkpoint_is_quantized_and_its_card_says_how_it_was_judged(checkpoint: Path, tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "data", lambda text: {"text": text, "labels": labels_of(text)}, train=200, validation=150, test=120
    )
    done = forkserver().hfq(
        "quantize", checkpoint, "--dataset", data, "--output", "out", "--tolerable-loss", 0.02, "--json", cwd=tmp_path
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["metric"], report["pipeline_tag"]) == (
        "multi-label-classification", "micro_f1", "text-classification",
    )  # fmt: skip
    assert report["baseline"]["accuracy"] > report["trivial"]["score"] + 0.1
    assert report["quantized"]["accuracy"] >= 0.98 * report["baseline"]["accuracy"]
    assert report["stock_agreement"] >= 0.98
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| Micro F1 (test, held out) |" in card and "pipeline_tag: text-classification" in card
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == "multi_label_classification"
