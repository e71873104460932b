"""Sentence embedding, from strangers' folders and rows to a published model."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from scipy import stats
from sentence_transformers import SentenceTransformer
from support.command import forkserver
from support.trained.sentences import DIM, POOLING, pairs, write_beir, write_encoder, write_lines, write_sentence_model
from torch.nn.functional import normalize
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)
from transformers import T5Config, T5EncoderModel

from hfq.common.errors import DataError, SourceError, UnsupportedError, UsageError
from hfq.data.dataset import load_splits
from hfq.data.examples import load_task_data, told_apart
from hfq.recipe import Recipe
from hfq.source.checkpoint import pull
from hfq.source.model import load_model
from hfq.tasks.base import Task
from hfq.tasks.registry import make_task
from hfq.tasks.text.sentence_embedding import Document, Query

TEXTS = [
    "It is warm today.",
    "FREE entry in 2 a wkly comp to win, text WIN to 87121 now",
    "ok",
    "see you at home later",
]


def task_of(folder: Path, **settings: str) -> Task:
    checkpoint = pull(str(folder))
    return make_task(checkpoint.config, folder=checkpoint.path, settings=settings)


def vectors_of(folder: Path, rows: Dataset, columns: dict[str, list[str]], **settings: str) -> list[torch.Tensor]:
    """What the task puts out for rows of texts, in one batch."""
    checkpoint, task = pull(str(folder)), task_of(folder, **settings)
    processor = task.processor(checkpoint, max_length=None, trust_remote_code=False)
    batch = task.collate(task.encode(rows, columns, processor), processor)
    return task.outputs(load_model(checkpoint, task.auto_class, trust_remote_code=False), batch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentence_model(tmp_path_factory.mktemp("sentence") / "mini-embedding", prompts={"query": "find: "})


@pytest.mark.parametrize(
    ("pooling", "dense", "config"),
    [
        (POOLING, None, {}),
        ({"word_embedding_dimension": DIM, "pooling_mode_cls_token": True}, 32, {}),
        ({"embedding_dimension": DIM, "pooling_mode": "lasttoken"}, None, {"truncate_dim": 16}),
        ({"embedding_dimension": DIM, "pooling_mode": ["max", "mean"], "include_prompt": False}, None,
         {"prompts": {"say": "please say: "}, "default_prompt_name": "say"}),
    ],
)  # fmt: skip
def test_vectors_are_those_of_sentence_transformers(
    pooling: dict[str, Any], dense: int | None, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_sentence_model(tmp_path / "model", pooling=pooling, dense=dense, **config)
    stock = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    found = torch.stack(vectors_of(folder, Dataset.from_dict({"text": TEXTS}), {"text": ["text"]}))
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-5)


def test_queries_and_documents_have_prompts_of_their_own(model: Path, tmp_path: Path) -> None:
    rows = load_splits(str(write_beir(tmp_path / "data", documents=3, queries=2)), None, token=None)[0]["test"]
    columns = {"text": ["text"], "query": ["query_id"], "document": ["document_id"], "label": ["relevant"]}
    found = torch.stack(vectors_of(model, rows, columns))
    stock = SentenceTransformer(str(model), device="cpu")
    texts = rows["text"]
    expected = [
        stock.encode_document(texts[:3], convert_to_tensor=True),
        stock.encode_query(texts[3:], convert_to_tensor=True),
    ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_a_bare_encoder_needs_to_be_told_its_pooling(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "encoder")
    with pytest.raises(UsageError, match="--pooling mean, cls, max or lasttoken"):
        task_of(folder)
    assert (
        make_task(json.loads((folder / "config.json").read_text()), name="feature-extraction").name
        == "sentence-embedding"
    )
    (first,) = vectors_of(folder, Dataset.from_dict({"text": TEXTS[:1]}), {"text": ["text"]}, pooling="cls")
    stock = SentenceTransformer(str(folder), device="cpu")
    stock[1].pooling_mode = "cls"
    torch.testing.assert_close(first, stock.encode(TEXTS[0], convert_to_tensor=True), rtol=1e-4, atol=1e-5)


def test_a_pooler_that_nothing_reads_may_be_missing(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    weights = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows, columns = Dataset.from_dict({"text": TEXTS}), {"text": ["text"]}
    torch.testing.assert_close(vectors_of(folder, rows, columns), vectors_of(model, rows, columns))


def test_of_an_encoder_and_a_decoder_the_encoder_is_read(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "t5")
    config = T5Config(vocab_size=8000, d_model=DIM, d_kv=16, d_ff=64, num_layers=1, num_heads=2, pad_token_id=0)
    T5EncoderModel(config).save_pretrained(folder)
    stock = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    found = torch.stack(vectors_of(folder, Dataset.from_dict({"text": TEXTS}), {"text": ["text"]}))
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-5)


def test_settings_that_do_not_fit_are_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="--pooling cls: mini-embedding has modules of its own"):
        task_of(model, pooling="cls")
    with pytest.raises(UsageError, match="--prompt passage is no prompt of the model, which has query"):
        task_of(model, prompt="passage")
    with pytest.raises(UsageError, match="--pooling is nothing that regression reads, but sentence-embedding"):
        make_task({"architectures": ["BertForSequenceClassification"], "num_labels": 1}, settings={"pooling": "cls"})


def test_folders_that_cannot_be_run_are_refused(model: Path, tmp_path: Path) -> None:
    def damaged(name: str, content: object) -> Path:
        folder = write_sentence_model(tmp_path / name.replace("/", "-"), dense=8)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    modules = json.loads((model / "modules.json").read_text())
    with pytest.raises(UnsupportedError, match=r"names a module my_code\.Pooling, which hfq cannot run"):
        task_of(damaged("modules.json", [modules[0], {**modules[1], "type": "my_code.Pooling"}]))
    with pytest.raises(SourceError, match="default prompt 'ask', which is none of its prompts"):
        task_of(damaged("config_sentence_transformers.json", {"default_prompt_name": "ask"}))
    with pytest.raises(SourceError, match="similarity 'jaccard' is none of cosine, dot"):
        task_of(damaged("config_sentence_transformers.json", {"similarity_fn_name": "jaccard"}))
    for dim in ("many", True):
        with pytest.raises(SourceError, match=f"truncate_dim {dim!r} is no number of dimensions"):
            task_of(damaged("config_sentence_transformers.json", {"truncate_dim": dim}))
    with pytest.raises(SourceError, match="prompts are no names and texts"):
        task_of(damaged("config_sentence_transformers.json", {"prompts": {"query": 3}}))
    with pytest.raises(UnsupportedError, match=r"modules\.json names no Pooling or SpladePooling"):
        task_of(damaged("modules.json", modules[:1]))
    with pytest.raises(
        UnsupportedError, match="the transformer in the folder '0_Transformer', and hfq reads it beside"
    ):
        task_of(damaged("modules.json", [{**modules[0], "path": "0_Transformer"}, *modules[1:]]))
    with pytest.raises(SourceError, match="names the folder '7_Pooling' for Pooling, which is not there"):
        task_of(damaged("modules.json", [modules[0], {**modules[1], "path": "7_Pooling"}]))
    with pytest.raises(UnsupportedError, match="opened by sentence-transformers' MultiVectorEncoder"):
        task_of(damaged("config_sentence_transformers.json", {"model_type": "MultiVectorEncoder"}))
    with pytest.raises(SourceError, match=r"sentence-transformers cannot load .*2_Dense as Dense"):
        task_of(damaged("2_Dense/config.json", {"in_features": 8, "out_features": 8}))
    pickled = write_sentence_model(tmp_path / "pickled", dense=8)
    (pickled / "2_Dense/model.safetensors").rename(pickled / "2_Dense/pytorch_model.bin")
    with pytest.raises(SourceError, match="2_Dense has only pickle weights"):
        task_of(pickled)


def test_modules_that_make_no_vector_of_that_length_are_refused(model: Path, tmp_path: Path) -> None:
    rows, columns = Dataset.from_dict({"text": TEXTS}), {"text": ["text"]}
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"truncate_dim": DIM + 1}))
    with pytest.raises(SourceError, match="has the truncate_dim 129, and the model's vectors have 128 dimensions"):
        vectors_of(folder, rows, columns)
    folder = write_sentence_model(tmp_path / "narrow", dense=8)
    weight = load_file(folder / "2_Dense" / "model.safetensors")
    save_file(
        {**weight, "linear.weight": weight["linear.weight"][:, 1:].clone()}, folder / "2_Dense" / "model.safetensors"
    )
    settings = json.loads((folder / "2_Dense" / "config.json").read_text())
    (folder / "2_Dense" / "config.json").write_text(json.dumps({**settings, "in_features": DIM - 1}))
    with pytest.raises(SourceError, match=r"make no vector of what it puts out .*mat1 and mat2"):
        vectors_of(folder, rows, columns)


@pytest.mark.parametrize(
    ("rows", "kind", "read", "metric"),
    [
        ({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [1.0, 0.5]}, "scores", [1.0, 0.5], "spearman"),
        ({"a": ["x", "y"], "b": ["c", "d"], "similarity": ["4", "0"]}, "scores", [4.0, 0.0], "spearman"),
        ({"anchor": ["a"], "positive": ["b"], "negative": ["c"]}, "triplets", [("a", "b", "c")], "triplet_accuracy"),
        ({"query": ["a"], "answer": ["b"]}, "positives", [("a", "b")], "ndcg_at_10"),
    ],
)
def test_data_is_read_by_its_columns(
    model: Path, rows: dict[str, Any], kind: str, read: list[Any], metric: str
) -> None:
    task, found = task_of(model), Dataset.from_dict(rows)
    columns = task.columns(told_apart(found), {})
    alignment = task.align([found], columns)
    assert task.references(found, columns, alignment) == read
    assert next(iter(task.informed(alignment).metrics)) == metric


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"score": [0.5, 0.5, 0.5]}, "Every label of split 'given' is 0.5"),
        ({"score": ["0.5", "high", "1"]}, r"Row 1 \(from 0\) has 'high' in column 'score'"),
        ({"score": [0.1] * 20 + [0.2, 50.0]}, r"Row 21 \(from 0\) of split 'given' has the score 50 .* from 0 to 1"),
        ({"other": ["x", "y"]}, "Which columns hold the texts is not clear"),
        ({"id": [1, 2]}, "By what embeddings are to be judged is not clear"),
    ],
)
def test_rows_that_do_not_fit_are_refused(model: Path, rows: dict[str, Any], message: str) -> None:
    count = len(next(iter(rows.values())))
    found = Dataset.from_dict({"sentence1": ["a"] * count, "sentence2": ["b"] * count, **rows})
    if "other" in rows:
        found = found.rename_columns({"sentence1": "one", "sentence2": "two"})
    task = task_of(model)
    with pytest.raises(DataError, match=message):
        task.align([found], task.columns(told_apart(found), {}))


def test_triplets_have_no_column_of_labels_to_be_named(model: Path, tmp_path: Path) -> None:
    write_lines(
        tmp_path / "data" / "test.jsonl", [{"anchor": f"a{i}", "positive": "b", "negative": "c"} for i in range(9)]
    )
    recipe = Recipe(checkpoint=str(model), dataset=str(tmp_path / "data"), calibration_split="test")
    data = load_task_data(pull(str(model)), recipe, task=task_of(model), recipes=tmp_path, token=None)
    assert data.info.columns == {"text": ["anchor", "positive", "negative"]}


def test_neighbours_and_shorter_vectors_are_said(tmp_path: Path) -> None:
    task = task_of(write_sentence_model(tmp_path / "model", matryoshka_dims=[16, 4, 64]))
    generator = torch.Generator().manual_seed(0)
    outputs = list(torch.randn(30, 2, 16, generator=generator))
    right = torch.rand(30, generator=generator).tolist()
    neighbours, *cut = task.remarks(task.metrics["spearman"], outputs, outputs, right)
    assert neighbours == "Of the 10 texts that are nearest to each, 100.0% are the same."
    score = task.score("spearman", [output[:, :4] for output in outputs], right)
    assert cut == [f"Cut to 4 dimensions, the float model scores {score:.4f} and INT8 {score:.4f}."]
    assert "100.0%" not in task.remarks(task.metrics["spearman"], outputs, outputs[::-1], right)[0]
    card = '---\n---\n```json\n{\n    "loss": "x",\n    "matryoshka_dims": [\n        8,\n        2\n    ]\n}\n```\n'
    folder = write_sentence_model(tmp_path / "by its card")
    (folder / "README.md").write_text(card)
    assert len(task_of(folder).remarks(task.metrics["spearman"], outputs, outputs, right)) == 3


def write_pair(folder: Path, **files: str | None) -> str:
    lines = {
        "corpus.jsonl": '{"_id": 1, "text": "a"}',
        "queries.jsonl": '{"_id": "q", "text": "b"}',
        "qrels.tsv": "q\t1\t1",
    }
    folder.mkdir()
    for name, content in {**lines, **{key.replace("_", "."): text for key, text in files.items()}}.items():
        if content is not None:
            (folder / name).write_text(content, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"corpus_jsonl": ""}, "corpus.jsonl holds no text, so that there is nothing to find"),
        ({"corpus_jsonl": '{"_id": "1"}'}, "Line 1 of .*corpus.jsonl is .*expected"),
        ({"corpus_jsonl": "{"}, "Line 1 of .*corpus.jsonl is not JSON"),
        (
            {"queries_jsonl": '{"_id": "q", "text": "b"}\n{"_id": "q", "text": "c"}'},
            "Line 2 of .* has the id 'q' a second",
        ),
        ({"qrels_tsv": "q\t1\t1\nq\t2\t1"}, r"1 of the ids are not in corpus \(the first: 2\)"),
        ({"qrels_tsv": "query-id\tcorpus-id\tscore\np\t1\t1"}, r"1 of the ids are not in queries \(the first: p\)"),
        ({"qrels_tsv": "q\t1\t0"}, "no score is above 0"),
        ({"qrels_tsv": "q\t1\t1\nq\t1\thigh"}, "Line 2 of .*qrels.tsv"),
        (
            {"qrels_tsv": "q\t1\t1\nq\t1\t0"},
            "Line 2 of .* gives document 1 the score 0 for query q, and a line before it 1",
        ),
        ({"qrels_tsv": "q\t1"}, "Line 1 of .*qrels.tsv is .*; expected a query's id, a document's id and a number"),
        ({"queries_jsonl": None}, "has corpus and qrels, but no queries. Expected queries.jsonl"),
        ({"corpus_jsonl": None}, "has queries and qrels, but no corpus. Expected corpus.jsonl"),
        ({"qrels_tsv": None}, "has corpus and queries, but no qrels"),
    ],
)
def test_retrieval_data_that_does_not_fit_is_refused(
    files: dict[str, str | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_splits(write_pair(tmp_path / "data", **files), None, token=None)


def test_retrieval_data_may_be_subsets_of_a_dataset(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "texts" / "corpus.jsonl", [{"_id": "1", "title": "On", "text": "a"}, {"_id": "2", "text": "b"}]
    )
    write_lines(tmp_path / "texts" / "queries.jsonl", [{"_id": "q", "text": "c"}])
    write_lines(tmp_path / "judged" / "test.jsonl", [{"query-id": "q", "corpus-id": "1", "score": 2}])
    subsets = {
        "default": ("test", "judged/test"),
        "corpus": ("corpus", "texts/corpus"),
        "queries": ("queries", "texts/queries"),
    }
    lines = [
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {path}.jsonl\n"
        for name, (split, path) in subsets.items()
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n")
    splits, _ = load_splits(str(tmp_path), None, token=None)
    assert splits["test"]["text"] == ["On a", "b", "c"]
    assert splits["test"]["relevant"][2] == [{"document_id": "1", "score": 2.0}]
    assert splits["corpus"]["document_id"] == ["1", "2"]


@pytest.mark.parametrize(
    "qrels",
    [
        "q\t1\t1\n",
        "query-id\tcorpus-id\tscore\nq\t1\t1\n",
        "q 0 1 1\n",
        '{"query-id": "q", "corpus-id": "1", "score": 1}',
    ],
)
def test_qrels_are_read_in_each_form(model: Path, qrels: str, tmp_path: Path) -> None:
    queries = '{"_id": "q", "text": "b"}\n{"_id": "other", "text": "c"}'
    splits, _ = load_splits(write_pair(tmp_path / "data", qrels_tsv=qrels, queries_jsonl=queries), None, token=None)
    task, rows = task_of(model), splits["test"]
    columns = task.columns(rows.features, {})
    alignment = task.align([rows, splits["corpus"]], columns)
    assert task.references(rows, columns, alignment) == [Document("1"), Query("q", {"1": 1.0}), Query("other", {})]
    assert "1 queries without a relevant document do not count" in alignment.how


def test_rankings_are_judged_as_torchmetrics_judges_them(model: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = list(normalize(torch.randn(150, 8, generator=generator), dim=1))
    relevance = torch.randint(-8, 4, (30, 120), generator=generator).clamp(min=0)
    references: list[Any] = [Document(str(row)) for row in range(120)]
    references += [Query(str(i), {str(j): float(v) for j, v in enumerate(row) if v}) for i, row in enumerate(relevance)]
    task, scores = task_of(model), torch.stack(outputs[120:]) @ torch.stack(outputs[:120]).T
    for query, right in enumerate(relevance):
        given, hits = scores[query] + 2, right > 0  # torchmetrics takes no document that scores below zero
        found = hits & (given >= given.topk(100).values[-1])
        expected = {
            "ndcg_at_10": retrieval_normalized_dcg(given, right, top_k=10),
            "mrr_at_10": retrieval_reciprocal_rank(given, hits, top_k=10),
            "map": retrieval_average_precision(given, found) * found.sum() / hits.sum(),
            "recall_at_100": retrieval_recall(given, hits, top_k=100),
        }
        row = len(outputs) - 30 + query
        for name, value in expected.items():
            one = task.score(name, [*outputs[:120], outputs[row]], [*references[:120], references[row]])
            assert one == pytest.approx(value.item(), rel=1e-5), name


def test_pairs_are_judged_by_the_similarity_of_the_model(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = list(torch.randn(40, 2, 8, generator=generator))
    right = torch.rand(40, generator=generator).tolist()
    for name, values in {
        "cosine": [torch.cosine_similarity(a, b, 0) for a, b in outputs],
        "dot": [a @ b for a, b in outputs],
        "euclidean": [-(a - b).norm() for a, b in outputs],
    }.items():
        task = task_of(write_sentence_model(tmp_path / name, similarity_fn_name=name))
        assert task.score("spearman", outputs, right) == pytest.approx(stats.spearmanr(values, right).statistic)
    anchors = [torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), torch.tensor([[1.0, 0], [0, 1], [1, 0.1]])]
    assert task.score("triplet_accuracy", anchors, [("a", "b", "c")] * 2) == 0.5
    assert task.fidelity(outputs, outputs) == pytest.approx(1)
    sent: Task = pickle.loads(pickle.dumps(task))  # as to the processes of a strategy
    assert sent.score("spearman", outputs, right) == task.score("spearman", outputs, right)


def test_a_folder_is_quantized_and_its_card_says_how_it_is_opened(model: Path, tmp_path: Path) -> None:
    for split, count in {"train": 120, "validation": 150}.items():
        write_lines(tmp_path / "data" / f"{split}.jsonl", pairs(split, count))
    done = forkserver().hfq(
        "quantize", model, "--dataset", tmp_path / "data", "--output", "out", "--json", cwd=tmp_path
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["metric"], report["dataset"]["examples"]) == ("sentence-embedding", "spearman", 150)
    assert report["quantized"]["accuracy"] >= 0.99 * report["baseline"]["accuracy"] > 0.4
    assert report["stock_agreement"] >= 0.99
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for line in (
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "- sentence-transformers\n",
        "from sentence_transformers import SentenceTransformer\n",
        "| Spearman of cosine (validation) |",
    ):
        assert line in card
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    said = re.search(r"32 texts in a batch, .* padded to \d+ tokens have cosines of at least ([\d.]+)\.", card)
    assert said and float(said[1]) >= 0.9995


def test_a_folder_is_judged_by_what_queries_find(model: Path, tmp_path: Path) -> None:
    data = write_beir(tmp_path / "data")
    done = forkserver().hfq("quantize", model, "--dataset", data, "--output", "out", "--metric", "mrr_at_10",
                            "--tolerable-loss", 0.05, "--json", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["dataset"]["calibration_split"], report["dataset"]["split"]) == ("corpus", "test")
    assert report["baseline"]["accuracy"] > 0.4
    assert report["comparisons"][0]["interval"][0] <= report["comparisons"][0]["difference"]
    again = forkserver().hfq("eval", "out", "--dataset", data, "--json", cwd=tmp_path)
    assert json.loads(again.out)["metric"] == "ndcg_at_10"
