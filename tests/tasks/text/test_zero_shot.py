"""Classifiers of natural language inference, which their cards call zero-shot classifiers."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file, save_file
from support.command import DEMO, copy_checkpoint, forkserver

from hfq.common.errors import DataError, WrongDataError
from hfq.tasks.registry import make_task

NAMES = ("contradiction", "neutral", "entailment")
PAIR = {"hypothesis": ["b"] * 3, "premise": ["a"] * 3}


def config(names: Any) -> dict[str, Any]:
    ids = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return {"architectures": ["BertForSequenceClassification"], **ids}


def references(rows: Dataset, names: Any) -> list[Any]:
    task = make_task(config(names))
    columns = task.columns(rows.features, {})
    assert columns["text"] == ["premise", "hypothesis"]  # as models were trained, whatever the order in the data
    return task.references(rows, columns, task.align([rows], columns))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's classifier: what is spam is entailed, whatever the hypothesis."""
    folder = copy_checkpoint(tmp_path_factory.mktemp("nli") / "bert-mini-nli")
    weights = load_file(folder / "model.safetensors")
    (ham, spam), bias = weights["classifier.weight"], weights["classifier.bias"]
    weights["classifier.weight"] = torch.stack([ham, torch.zeros_like(ham), spam])
    weights["classifier.bias"] = torch.stack([bias[0], torch.tensor(-9.0), bias[1]])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), **config(NAMES)})
    )
    (folder / "README.md").write_text("---\npipeline_tag: zero-shot-classification\nlicense: apache-2.0\n---\n")
    return folder


def test_labels_may_be_in_another_order_than_the_models() -> None:
    classes = Features(
        {name: Value("string") for name in PAIR}
        | {"label": ClassLabel(names=["entailment", "neutral", "contradiction"])}
    )
    found = [
        Dataset.from_dict({**PAIR, "label": [0, 1, 2]}, features=classes),
        Dataset.from_dict({**PAIR, "label": ["entailment", "neutral", "contradiction"]}),
    ]
    assert [references(rows, NAMES) for rows in found] == [[2, 1, 0]] * 2
    assert [references(rows, ["Entailment", "not_entailment"]) for rows in found] == [[0, 1, 1]] * 2
    two = Dataset.from_dict({**PAIR, "label": ["not_entailment", "entailment", "entailment"]})
    assert references(two, ["entailment", "not_entailment"]) == [1, 0, 0]


def test_labels_that_are_not_of_inference_are_refused() -> None:
    rows = Dataset.from_dict({**PAIR, "label": ["neutral", "entailment", "true"]})
    with pytest.raises(DataError, match="do not fit the model's"):
        references(rows, ["entailment", "not_entailment"])
    with pytest.raises(DataError, match="do not fit the model's"):
        references(Dataset.from_dict({**PAIR, "label": ["not_entailment", "entailment", "entailment"]}), NAMES)


@pytest.mark.parametrize("premise", [[["a"]] * 3, [1, 2, 3]])
def test_half_a_pair_is_never_read_alone(premise: list[Any]) -> None:
    task = make_task(config(NAMES))
    rows = Dataset.from_dict({**PAIR, "premise": premise, "label": list(NAMES)})
    with pytest.raises(
        WrongDataError, match=r"Column 'premise' holds .*, and not texts, which belong to those in 'hypothesis'"
    ):
        task.columns(rows.features, {})
    assert task.columns(rows.features, {"text": ["hypothesis"]})["text"] == ["hypothesis"]
    rows = Dataset.from_dict({**PAIR, "premise": [None] * 3, "label": list(NAMES)})
    assert task.columns(rows.features, {})["text"] == ["hypothesis"]


def test_the_card_keeps_the_sources_name_of_the_task(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, count in {"train": 40, "validation": 60}.items():
        with (DEMO / "data" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            texts = list(csv.DictReader(file))[:count]
        rows = [
            {"hypothesis": "Buy it.", "premise": row["text"], "label": NAMES[2 * int(row["label"])]} for row in texts
        ]
        rows.append({**rows[0], "label": "-1"})  # as SNLI has them, where annotators did not agree
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["pipeline_tag"]) == ("text-classification", "zero-shot-classification")
    assert report["baseline"]["accuracy"] > report["trivial"]["score"]
    assert report["dataset"]["examples"] == 60 and "1 of the 61 examples of 'validation' have the label -1" in done.err
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: zero-shot-classification" in card
    for usage in card.split("```python\n")[1:3]:
        found: dict[str, Any] = {}
        exec(usage.split("```")[0].replace("path/to/this/folder", str(tmp_path / "out")), found)
        assert found["model"].task == "zero-shot-classification"
    again = forkserver().hfq(
        "eval", "out", "--dataset", data, "--task", "zero-shot-classification", "--json", cwd=tmp_path
    )
    assert json.loads(again.out)["accuracy"] == pytest.approx(report["quantized"]["accuracy"])
