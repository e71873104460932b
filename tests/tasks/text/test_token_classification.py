"""Token classification, from strangers' rows to a published model."""

import json
from pathlib import Path
from typing import Any

import pytest
import seqeval.metrics
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from support.command import CHECKPOINT, forkserver
from support.trained.training import has_digits, messages, train, write_rows
from transformers import AutoModelForTokenClassification, AutoTokenizer

from hfq.common.errors import DataError
from hfq.source.checkpoint import pull
from hfq.tasks.registry import make_task
from hfq.tasks.text.token_classification import TokenClassification, span_names

NAMES = ("O", "B-NUM", "I-NUM")
SCHEMES = {
    "IOB2": (["O", "B-P", "I-P", "B-L", "I-L"], ["B-P", "I-P", "O", "B-L", "B-L"]),
    "IOB1": (["O", "I-P", "B-P", "I-L", "B-L"], ["I-P", "I-P", "O", "I-L", "B-L"]),
    "IOBES": (["O", "B-P", "I-P", "E-P", "S-L"], ["B-P", "E-P", "O", "S-L", "S-L"]),
    "BILOU": (["O", "B-P", "I-P", "L-P", "U-L"], ["B-P", "L-P", "O", "U-L", "U-L"]),
    "suffixes": (["O", "P-B", "P-I", "L-B", "L-I"], ["P-B", "P-I", "O", "L-B", "L-B"]),
}


def config(names: Any) -> dict[str, Any]:
    return {"architectures": ["BertForTokenClassification"], "id2label": dict(enumerate(names))}


def outputs_of(tags: list[int], count: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tags), count).float()


def tags_of(text: str) -> tuple[list[str], list[str]]:
    words, tags = text.split(), []
    for word in words:
        inside = bool(tags) and tags[-1] != "O"
        tags.append(("I-NUM" if inside else "B-NUM") if has_digits(word) else "O")
    return words, tags


def references(rows: Dataset, names: Any = NAMES) -> list[Any]:
    task = TokenClassification(config(names))
    columns = task.columns(rows.features, {})
    return task.references(rows, columns, task.align([rows], columns))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def batch(tokenizer: Any, texts: Any) -> dict[str, Any]:
        rows = [tags_of(text) for text in texts]
        encoded = tokenizer(
            [words for words, _ in rows], is_split_into_words=True, truncation=True, padding=True, return_tensors="pt"
        )
        labels = torch.full_like(encoded["input_ids"], -100)
        for row, (_, tags) in enumerate(rows):
            for place, word in enumerate(encoded.word_ids(row)):
                if word is not None:
                    labels[row, place] = NAMES.index(tags[word])
        return {**encoded, "labels": labels}

    ids = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    to = tmp_path_factory.mktemp("tokens") / "bert-mini-numbers"
    return train(to, "AutoModelForTokenClassification", batch, epochs=2, **ids)


def test_tags_may_be_names_ids_or_classes() -> None:
    words = [["call", "0800", "123"], ["hi"]]
    other = Features(
        {"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=["I-NUM", "B-NUM", "O"]))}
    )
    found = [
        Dataset.from_dict({"tokens": words, "ner_tags": [["O", "B-NUM", "I-NUM"], ["O"]]}),
        Dataset.from_dict({"words": words, "tags": [[0, 1, 2], [0]]}),
        Dataset.from_dict({"tokens": words, "ner_tags": [[2, 1, 0], [2]]}, features=other),  # in another order
    ]
    assert [references(rows) for rows in found] == [[[0, 1, 2], [0]]] * 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"tokens": [["a", "b"], ["c"]], "ner_tags": [["O"], ["B-NUM"]]}, r"Row 0 \(from 0\) has 2 words and 1 tags"),
        ({"tokens": [["a", "b"]] * 2, "ner_tags": [["O", "O"]] * 2}, "Every label of split 'given' is 'O'"),
        ({"tokens": [[], []], "ner_tags": [[], []]}, "No example has a label, and the model's are 0=O, 1=B-NUM"),
        ({"tokens": [["a", "b"]], "ner_tags": [["O", "B-X"]]}, "do not fit the model's"),
        ({"tokens": ["a b"], "ner_tags": [["O", "O"]]}, "holds words is not clear"),
        (
            {"tokens": [["a"]], "ner_tags": [[["O"]]]},
            r"holds \['O'\] where a label is expected. Expected a list of tags",
        ),
        ({"tokens": [["a"]], "ner_tags": [[{"tag": "O"}]]}, "holds {'tag': 'O'} where a label is expected"),
        (
            {"tokens": [["a", "b"], None], "ner_tags": [["O", "B-NUM"], ["O"]]},
            r"Row 1 \(from 0\) has 'None' in column 'tokens'",
        ),
        ({"tokens": [["a"]], "label": ["O"]}, "holds tags is not clear"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        references(Dataset.from_dict(rows))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_entities_are_the_same_in_every_scheme(scheme: str) -> None:
    names, right = SCHEMES[scheme]
    task = make_task(config(names))
    tags = [names.index(tag) for tag in right]
    given = [*tags[:4], names.index("O")]  # one of three entities is missed
    assert list(task.metrics) == ["f1", "precision", "recall", "accuracy"]
    outputs = [outputs_of(given, len(names))]
    assert task.score("f1", outputs, [tags]) == pytest.approx(2 * 2 / (2 + 3))
    assert task.score("precision", outputs, [tags]) == 1
    assert task.score("recall", outputs, [tags]) == pytest.approx(2 / 3)
    assert task.score("accuracy", outputs, [tags]) == pytest.approx(4 / 5)


def test_entities_are_counted_as_seqeval_counts_them() -> None:
    names = ["O", "B-P", "I-P", "B-L", "I-L"]
    generator = torch.Generator().manual_seed(0)
    right, given = (torch.randint(5, (40, 9), generator=generator).tolist() for _ in range(2))
    task = make_task(config(names))
    spelled = [[[names[tag] for tag in row] for row in rows] for rows in (right, given)]
    outputs = [outputs_of(row, 5) for row in given]
    assert task.score("f1", outputs, right) == pytest.approx(seqeval.metrics.f1_score(*spelled))
    assert task.score("precision", outputs, right) == pytest.approx(seqeval.metrics.precision_score(*spelled))


def test_plain_tags_are_entities_and_parts_of_speech_are_not() -> None:
    assert span_names(["O", "PER", "LOC"]) == ["O", "I-PER", "I-LOC"]
    assert span_names(["NOUN", "VERB", "PUNCT"]) is None
    assert list(make_task(config(["NOUN", "VERB", "PUNCT"])).metrics) == ["accuracy"]


def test_a_word_has_the_tag_of_its_first_token() -> None:
    task, processor = make_task(config(NAMES)), AutoTokenizer.from_pretrained(CHECKPOINT)
    rows = Dataset.from_dict({"tokens": [["unbelievable", "", "0800"], ["hi"]], "ner_tags": [[0, 0, 1], [0]]})
    found = task.processor(pull(str(CHECKPOINT)), max_length=None, trust_remote_code=False)
    encodings = task.encode(rows, task.columns(rows.features, {}), found)
    batch = task.collate(encodings, found)
    tokens = processor(["unbelievable", "", "0800"], is_split_into_words=True)
    starts = [tokens.word_ids().index(word) for word in (0, 2)]
    assert len(processor.tokenize("unbelievable")) > 1
    assert [(batch["labels"][0] == word).nonzero().flatten().tolist() for word in (0, 1, 2)] == [
        starts[:1],
        [],
        starts[1:],
    ]


def test_a_checkpoint_is_quantized_and_opens_in_stock_transformers(checkpoint: Path, tmp_path: Path) -> None:
    def row(text: str) -> dict[str, Any]:
        words, tags = tags_of(text)
        return {"tokens": words, "ner_tags": tags}

    data = write_rows(tmp_path / "data", row, train=200, validation=150, test=100)
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["metric"]) == ("token-classification", "f1")
    assert report["baseline"]["accuracy"] > 0.4
    assert report["quantized"]["accuracy"] >= 0.99 * report["baseline"]["accuracy"]
    assert report["stock_agreement"] >= 0.99
    assert report["comparisons"][0]["p_value"] is not None
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert 'pipeline("token-classification"' in card and "| Entity F1 (validation) |" in card
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(messages("test", 1), return_tensors="pt")
    assert model(**tokens).logits.shape[-1] == len(NAMES)
