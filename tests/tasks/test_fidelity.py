"""Data without labels: INT8 is judged by its agreement with FP32, and everything that is said says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Sequence, Value
from safetensors.torch import load_file, save_file
from support.command import CHECKPOINT, DEMO, Done, copy_checkpoint, forkserver
from support.trained.training import messages

from hfq.common.errors import DataError
from hfq.data.dataset import load_splits
from hfq.tasks.base import FIDELITY
from hfq.tasks.registry import make_task
from hfq.tasks.text.token_classification import TokenClassification

TAGGER = {"architectures": ["BertForTokenClassification"], "id2label": {"0": "O", "1": "B-X"}}
CLASSIFIER = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "ham", "1": "spam"}}
LOUD = "has no labels (columns: text). The score is agreement with FP32 (--metric fidelity), and not accuracy."


def write_texts(folder: Path, **counts: int) -> Path:
    folder.mkdir()
    for split, count in counts.items():
        lines = [text.replace("\n", " ") for text in messages(split, count)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def evaluate(cwd: Path, *args: object) -> Done:
    return forkserver().hfq("eval", *args, "--json", cwd=cwd)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "data", train=60, validation=60, test=40)


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    cwd = tmp_path_factory.mktemp("fidelity")
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", texts, "--output", "out", "--json", cwd=cwd)
    assert done.code == 0, done.err
    return cwd / "out", done


def test_plain_text_is_enough_and_the_goal_is_agreement(run: tuple[Path, Done]) -> None:
    report = json.loads(run[1].out)
    assert (report["metric"], report["metric_label"]) == (FIDELITY, "Agreement with FP32")
    assert (report["goal"]["baseline"], report["baseline"]["accuracy"], report["baseline"]["holdout_accuracy"]) == (
        1,
        1,
        1,
    )
    assert 0.99 <= report["quantized"]["accuracy"] <= 1
    assert report["trivial"] is None
    assert [row["p_value"] for row in report["comparisons"]] == [None, None]
    assert (report["dataset"]["columns"], report["dataset"]["alignment"]) == ({"text": ["text"]}, "none are read")
    assert report["stock_agreement"] >= 0.99


def test_everything_that_is_said_says_that_it_is_not_accuracy(run: tuple[Path, Done], tmp_path: Path) -> None:
    folder, done = run
    assert LOUD in done.err
    assert "Agreement with FP32 (test, held out)" in done.err
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "**This is agreement, and not accuracy:** no labels were read" in card
    assert "McNemar" not in card and "    - type: fidelity\n" in card and "      name: Agreement with FP32\n" in card
    assert forkserver().hfq("report", folder, cwd=tmp_path).code == 0
    assert "This is agreement, and not accuracy" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_eval_compares_with_the_float_checkpoint(run: tuple[Path, Done], texts: Path, tmp_path: Path) -> None:
    refused = evaluate(tmp_path, run[0], "--dataset", texts)
    assert refused.code == 2 and "Name that with --baseline, or a dataset with labels." in refused.err
    found = json.loads(evaluate(tmp_path, run[0], "--dataset", texts, "--baseline", CHECKPOINT).out)
    assert (found["metric"], found["metric_label"]) == (FIDELITY, "Agreement with FP32")
    assert 0.99 <= found["accuracy"] <= 1
    other = copy_checkpoint(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["classifier.bias"] += torch.tensor([0.0, 100.0])  # everything is spam
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert json.loads(evaluate(tmp_path, run[0], "--dataset", texts, "--baseline", other).out)["accuracy"] < 0.5
    itself = evaluate(tmp_path, run[0], "--dataset", texts, "--baseline", run[0])
    assert itself.code == 2 and "is quantized. Expected the float checkpoint." in itself.err
    labelled = evaluate(tmp_path, run[0], "--dataset", DEMO / "data", "--baseline", CHECKPOINT)
    assert labelled.code == 2 and "accuracy compares with labels" in labelled.err


def test_an_interrupted_run_goes_on(texts: Path, tmp_path: Path) -> None:
    arguments = ("quantize", CHECKPOINT, "--dataset", texts, "--output", "out")
    killed = forkserver().hfq(*arguments, cwd=tmp_path, kill_at="▸ Export")
    assert killed.code != 0
    done = forkserver().hfq(*arguments, "--resume", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["metric"] == FIDELITY


def test_it_may_be_asked_for_beside_labels(tmp_path: Path) -> None:
    arguments = ("--dataset", DEMO / "data", "--metric", FIDELITY)
    found = evaluate(tmp_path, CHECKPOINT, *arguments)
    assert found.code == 0, found.err
    assert json.loads(found.out)["accuracy"] == 1  # with itself
    assert LOUD not in found.err


@pytest.mark.parametrize(
    ("config", "row", "columns"),
    [
        (CLASSIFIER, {"premise": ["a"], "hypothesis": ["b"]}, {"text": ["premise", "hypothesis"]}),
        (CLASSIFIER, {"text": ["a"], "label": [0]}, None),
        (CLASSIFIER, {"text": ["a"], "topic": ["b"]}, None),  # who knows what that is
        (CLASSIFIER, {"text": ["a"], "id": [7]}, None),
        (TAGGER, {"text": ["a b"]}, {"tokens": ["text"]}),
        (TAGGER, {"tokens": [["a", "b"]]}, {"tokens": ["tokens"]}),
        (TAGGER, {"tokens": [["a", "b"]], "tags": [["O", "O"]]}, None),
    ],
)
def test_it_is_chosen_where_nothing_could_be_a_label(config: Any, row: Any, columns: Any) -> None:
    task, features = make_task(config), Dataset.from_dict(row).features
    assert task.lacks_labels(features, {}) is (columns is not None)
    if columns:
        assert task.inputs(features, {}) == columns
        assert not task.lacks_labels(features, {task.label_role: ["label"]})


def test_what_is_not_clear_is_refused_with_both_ways_out() -> None:
    features = Dataset.from_dict({"text": ["a"], "topic": ["b"]}).features
    with pytest.raises(DataError, match="Name it with --label-column; where there is none, --metric fidelity asks"):
        make_task(CLASSIFIER).columns(features, {})
    lists = {"tokens": Sequence(Value("string"))}
    with pytest.raises(DataError, match="Name it with --label-column; where there is none, --metric fidelity asks"):
        TokenClassification(TAGGER).columns(lists, {})


def test_plain_text_has_one_example_a_line(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes('\ufeffhi, "you"\r\n\r\n  \r\ntext\tlabel\nlast'.encode())
    splits, _ = load_splits(str(file), None, token=None)
    assert splits["train"].to_dict() == {"text": ['hi, "you"', "text\tlabel", "last"]}
    file.write_bytes("hé".encode("latin-1"))
    with pytest.raises(DataError, match="line 1 is not UTF-8"):
        load_splits(str(file), None, token=None)
    file.write_bytes(b"\n \n")
    done = forkserver().hfq("eval", CHECKPOINT, "--dataset", file, cwd=tmp_path)
    assert done.code == 1 and "is empty" in done.err
