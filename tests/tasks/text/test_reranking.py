"""Reranking, from strangers' rows to a published cross-encoder."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from support.command import CHECKPOINT, DEMO, copy_checkpoint, forkserver
from support.trained.sentences import write_beir, write_lines
from torchmetrics.functional.retrieval import retrieval_normalized_dcg
from transformers import AutoModelForSequenceClassification

from hfq.common.errors import DataError
from hfq.data.dataset import load_splits
from hfq.data.examples import load_task_data, told_apart
from hfq.recipe import Recipe
from hfq.source.checkpoint import pull
from hfq.tasks.base import Task
from hfq.tasks.registry import make_task
from hfq.tasks.text.reranking import Judged

CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
    "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"},
}


def read(rows: Dataset) -> tuple[Task, list[Any]]:
    """The task as it is for these rows, and its references."""
    task = make_task(CONFIG)
    rows = task.unfolded(rows)
    columns = task.columns(told_apart(rows), {})
    alignment = task.align([rows], columns)
    return task.informed(alignment), task.references(rows, columns, alignment)


def candidates(split: str, count: int) -> list[dict[str, Any]]:
    """A spam message and three that are none, for each query."""
    with (DEMO / "data" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    spam, ham = ([row["text"] for row in rows if row["label"] == label] for label in "10")
    return [{"query": f"advert {i}", "positive": spam[i], "negatives": ham[3 * i : 3 * i + 3]} for i in range(count)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder of the demo's classifier: its logit of spam less that of none."""
    to = copy_checkpoint(tmp_path_factory.mktemp("reranking") / "mini-reranker")
    model = AutoModelForSequenceClassification.from_pretrained(CHECKPOINT)
    weight, bias = model.classifier.weight.data, model.classifier.bias.data
    model.config.problem_type, model.config.id2label = None, {0: "LABEL_0"}
    model.classifier = torch.nn.Linear(weight.shape[1], 1)
    model.classifier.weight.data = weight[1:] - weight[:1]
    model.classifier.bias.data = bias[1:] - bias[:1]
    model.num_labels = 1
    model.save_pretrained(to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "sentence_transformers": CONFIG["sentence_transformers"]}))
    return to


def test_a_cross_encoder_is_found_by_its_config_or_its_card(tmp_path: Path) -> None:
    bare = {key: value for key, value in CONFIG.items() if key != "sentence_transformers"}
    assert make_task(CONFIG).name == "reranking"
    assert make_task({**bare, "sbert_ce_default_activation_function": "torch.nn.Identity"}).name == "reranking"
    assert make_task(bare, folder=tmp_path).name == "regression"
    assert make_task(bare, name="text-ranking").name == "reranking"
    (tmp_path / "README.md").write_text("---\npipeline_tag: text-ranking\n---\n")
    assert make_task(bare, folder=tmp_path).name == "reranking"
    assert make_task({**CONFIG, "id2label": {"0": "no", "1": "yes"}}, folder=tmp_path).name == "text-classification"


@pytest.mark.parametrize(
    "rows",
    [
        {"query": ["q", "q", "r"], "passage": ["a", "b", "c"], "label": [1, 0, 1]},
        {"question": ["q", "q", "r"], "answer": ["a", "b", "c"], "score": ["1", "0", "1"]},
    ],
)
def test_passages_are_read_with_their_query(rows: dict[str, Any]) -> None:
    task, references = read(Dataset.from_dict(rows))
    assert references == [Judged("q", 1.0), Judged("q", 0.0), Judged("r", 1.0)]
    assert next(iter(task.metrics)) == "ndcg_at_10"


@pytest.mark.parametrize("negatives", [[["b", "c"], ["d"]], ["b", "d"]])
def test_negatives_may_be_a_list_or_one_text(negatives: list[Any]) -> None:
    rows = Dataset.from_dict({"query": ["q", "r"], "positive": ["a", "c"], "negative": negatives})
    _, references = read(rows)
    count = 5 if isinstance(negatives[0], list) else 4
    assert [judged.query for judged in references] == ["q"] * (count - 2) + ["r"] * 2
    assert [judged.relevance for judged in references][:2] == [1.0, 0.0]


def test_retrieval_data_is_ranked_by_its_candidates(checkpoint: Path, tmp_path: Path) -> None:
    data = write_beir(tmp_path, documents=40, queries=3)
    found = load_task_data(
        pull(str(checkpoint)),
        Recipe(checkpoint=str(checkpoint), dataset=str(data)),
        task=make_task(CONFIG),
        recipes=tmp_path,
        token=None,
    )
    assert (found.metric, len(found.evaluation), len(found.calibration)) == ("ndcg_at_10", 60, 40)
    splits, _ = load_splits(str(data), None, token=None)
    task, references = read(splits["test"])
    assert next(iter(task.metrics)) == "ndcg_at_10"
    by_query = Counter(judged.query for judged in references)
    assert sorted(by_query.values()) == [20, 20, 20]
    assert sum(judged.relevance for judged in references) == 3
    assert len(task.unfolded(splits["corpus"])) == 40
    (data / "candidates.tsv").write_text("q0\td0\nq0\td1\nq1\td9\nq1\td1\nq2\td2\n")
    _, references = read(load_splits(str(data), None, token=None)[0]["test"])
    assert [judged.relevance for judged in references] == [1, 0, 0, 1, 1]
    (data / "candidates.tsv").write_text("q0 Q0 d77 1 0.5 bm25\n")
    with pytest.raises(DataError, match=r"1 of the ids are not in corpus \(the first: d77\)"):
        load_splits(str(data), None, token=None)


def test_pairs_of_which_few_share_a_query_are_judged_by_their_scores() -> None:
    pairs = {
        "sentence1": ["a", "b", "e", "a", "f"],
        "sentence2": ["c", "d", "g", "h", "i"],
        "score": [0.2, 4.5, 1, 2, 3],
    }
    assert list(read(Dataset.from_dict(pairs))[0].metrics) == ["spearman", "pearson"]
    task, references = read(Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [0.2, 4.5]}))
    assert list(task.metrics) == ["spearman", "pearson"]
    assert task.score("pearson", [torch.tensor([1.0]), torch.tensor([2.0])], references) == pytest.approx(1)
    first = [torch.tensor([value]) for value in (0.0, 0.01, 1.0, 2.0)]
    assert task.fidelity(first, [first[1], first[0], *first[2:]]) > 0.999  # two that are as good as equal change places


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"query": ["q", "r"], "positive": ["a", "b"], "negatives": [["c"], []]},
            r"Row 1 \(from 0\) .* in 'negatives'",
        ),
        ({"query": ["q", "q"], "passage": ["a", "b"], "label": [0, 0]}, "Every label of split 'given' is 0.0"),
        ({"query": ["q", "q"], "passage": ["a", "b"], "label": ["1", "bad"]}, "has 'bad' in column 'label'"),
        ({"query": ["q", "q"], "passage": ["a", "b"]}, "Which column says how relevant a passage is"),
        ({"one": ["q"], "two": ["a"], "three": ["b"]}, "Which columns hold query and passage is not clear"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(Dataset.from_dict(rows))


@pytest.mark.parametrize("labels", [[-1, -1, -1], [0, -1, 0]])
def test_a_split_in_which_nothing_is_relevant_has_no_labels(labels: list[int]) -> None:
    task = make_task(CONFIG)
    rows = Dataset.from_dict({"query": ["q"] * 3, "passage": ["a", "b", "c"], "label": [1, 0, 0]})
    columns = task.columns(told_apart(rows), {})
    alignment = task.align([rows], columns)
    other = Dataset.from_dict({**rows.to_dict(), "label": labels})
    assert task.references(other, columns, alignment) == [None] * 3


def test_a_ranking_is_judged_by_logits_and_ties_are_no_merit() -> None:
    task, references = read(
        Dataset.from_dict({"query": ["q"] * 4 + ["r"] * 2, "passage": list("abcdef"), "label": [3, 0, 1, 0, 0, 0]})
    )
    outputs = [torch.tensor([value]) for value in (17.5, 18.0, 17.0, 30.0, 1.0, 2.0)]  # after a sigmoid, all are 1
    expected = retrieval_normalized_dcg(torch.cat(outputs[:4]), torch.tensor([3, 0, 1, 0]), top_k=10)
    assert task.score("ndcg_at_10", outputs, references) == pytest.approx(expected.item())
    assert task.score("mrr_at_10", outputs, references) == pytest.approx(1 / 3)
    assert task.score("mrr_at_10", [torch.zeros(1)] * 6, references) == pytest.approx(1 / 3)
    assert task.fidelity(outputs, outputs) == 1
    assert task.fidelity(outputs, [-output for output in outputs]) == pytest.approx(0)
    other = [*outputs[:4], *outputs[:3:-1]]  # one of two queries, of two passages, the other way round
    (said,) = task.remarks(task.metrics["ndcg_at_10"], outputs, other, references)
    assert said == "Kendall's tau of a query's scores by both, on average over 2 queries: 0.0000."


def test_a_cross_encoder_is_quantized_and_keeps_its_activation(checkpoint: Path, tmp_path: Path) -> None:
    for split, count in {"train": 50, "validation": 50}.items():
        write_lines(tmp_path / "data" / f"{split}.jsonl", candidates(split, count))
    done = forkserver().hfq("quantize", checkpoint, "--dataset", tmp_path / "data", "--output", "out",
                            "--tolerable-loss", 0.05, "--json", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["metric"], report["dataset"]["examples"]) == ("reranking", "ndcg_at_10", 200)
    assert sum(trial["accuracy"] is not None for trial in report["trials"]) <= 5
    assert report["quantized"]["accuracy"] >= 0.95 * report["baseline"]["accuracy"] > 0.8
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for line in (
        "pipeline_tag: text-classification",
        "library_name: sentence-transformers",
        "CrossEncoder",
        "| nDCG&#64;10 (validation)",
    ):
        assert line in card
    found = CrossEncoder(str(tmp_path / "out"), device="cpu")
    assert type(found.activation_fn).__name__ == "Sigmoid"
