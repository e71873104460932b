"""Multiple choice, from strangers' rows to a published model."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features
from safetensors.torch import load_file, save_file
from support.command import CHECKPOINT, DEMO, copy_checkpoint, forkserver
from transformers import AutoModelForMultipleChoice, AutoTokenizer

from hfq.common.errors import DataError
from hfq.source.checkpoint import pull
from hfq.tasks.text.multiple_choice import MultipleChoice

CONFIG = {"architectures": ["BertForMultipleChoice"]}
RIGHT = [1, 0]
TEXTS = {"question": ["a", "b"], "choices": [["x", "y"], ["z", "w"]]}


def write_questions(folder: Path, *, labelled: bool = True, **counts: int) -> Path:
    """Which of two messages is spam."""
    folder.mkdir()
    for split, count in counts.items():
        with (DEMO / "data" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            found = [(row["text"], row["label"]) for row in csv.DictReader(file)]
        spam, ham = ([text for text, label in found if label == kind][:count] for kind in ("1", "0"))
        rows = [
            {"question": "Which is spam?", "choices": [ham, spam][:: 1 if i % 3 else -1], "label": int(i % 3 > 0)}
            for i, (spam, ham) in enumerate(zip(spam, ham, strict=False))
        ]
        for row in rows if not labelled else ():
            del row["label"]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


def references(rows: Dataset) -> list[Any]:
    task = MultipleChoice(CONFIG)
    columns = task.columns(rows.features, {})
    found = task.references(rows, columns, task.align([rows], columns))
    if None not in found:
        task.encode(rows, columns, task.processor(pull(str(CHECKPOINT)), max_length=None, trust_remote_code=False))
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's classifier, which gives a choice the more the more it is spam."""
    folder = copy_checkpoint(tmp_path_factory.mktemp("choices") / "bert-mini-choices")
    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][1:] - weights[name][:1]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **CONFIG}))
    return folder


def test_rows_may_have_the_forms_of_the_fields_datasets() -> None:
    classes = Features({**Dataset.from_dict(TEXTS).features, "label": ClassLabel(names=["0", "1"])})
    swag = {"sent1": ["a", "b"], "sent2": ["He", "She"], "ending0": ["x", "y"], "ending1": ["z", "w"]}
    found = [
        Dataset.from_dict({**swag, "label": RIGHT}),
        Dataset.from_dict({**TEXTS, "label": RIGHT}, features=classes),
        Dataset.from_dict({**TEXTS, "answer": ["B", "A"]}),
        Dataset.from_dict({"sentence": ["a", "b"], "option1": ["x", "y"], "option2": ["z", "w"], "answer": ["2", "1"]}),
        Dataset.from_dict({"goal": ["a", "b"], "sol1": ["x", "y"], "sol2": ["z", "w"], "label": RIGHT}),
        Dataset.from_dict({"ctx": ["a", "b"], "endings": [["x", "y"], ["z", "w"]], "label": ["1", "0"]}),
        Dataset.from_list(
            [
                {"question": "a", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
                {"question": "b", "choices": {"label": ["A", "B"], "text": ["z", "w"]}, "answerKey": "A"},
            ]
        ),
    ]
    assert [references(rows) for rows in found] == [RIGHT] * len(found)
    assert references(Dataset.from_dict({**TEXTS, "label": ["1", ""]})) == [1, None]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({**TEXTS, "choices": [["x", "y"], ["z", "w", "v"]], "label": RIGHT}, r"Row 1 \(from 0\) has 3 choices"),
        ({**TEXTS, "choices": [["x"], ["z"]], "label": [0, 0]}, "expected a list of two or more texts"),
        ({**TEXTS, "label": [0, 7]}, "there are 2 choices. Expected the place"),
        ({**TEXTS, "label": ["y", "z"]}, "there are 2 choices. Expected the place"),
        ({**TEXTS, "label": [[1], [0]]}, r"holds \['\[0\]', '\[1\]'\], and there are 2 choices. Expected the place"),
        ({"question": ["a"], "label": [0]}, "Which columns hold the choices is not clear"),
        ({"choices": [["x", "y"]], "label": [0]}, "Which columns hold the text before the choices is not clear"),
        ({**TEXTS, "right": RIGHT}, "Which column holds the label is not clear"),
        ({**TEXTS, "question": ["a", None], "label": RIGHT}, "has None in column 'question', and not a text"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        references(Dataset.from_dict(rows))


def test_the_second_text_begins_each_choice() -> None:
    rows = Dataset.from_dict(
        {"sent1": ["A man sits."], "sent2": ["He"], "ending0": ["sings."], "ending1": ["is gone."]}
    )
    task = MultipleChoice(CONFIG)
    processor = task.processor(pull(str(CHECKPOINT)), max_length=None, trust_remote_code=False)
    (encoding,) = task.encode(rows, task.inputs(rows.features, {}), processor)
    tokenizer = processor.tool
    expected = tokenizer(["A man sits."] * 2, ["He sings.", "He is gone."])
    assert encoding["input_ids"] == expected["input_ids"]
    batch = task.collate([encoding, encoding], processor)
    assert batch["input_ids"].shape == (2, 2, max(map(len, expected["input_ids"])))


def test_a_checkpoint_is_quantized_and_opens_in_stock_transformers(checkpoint: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data", train=30, validation=60, test=40)
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["pipeline_tag"], report["metric"]) == (
        "multiple-choice",
        "multiple-choice",
        "accuracy",
    )
    assert report["baseline"]["accuracy"] > report["trivial"]["score"] + 0.1
    assert report["quantized"]["accuracy"] >= 0.99 * report["baseline"]["accuracy"]
    assert report["stock_agreement"] >= 0.9
    assert report["dataset"]["alignment"] == "places from 0, of 2 choices"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    usage = card.split("import hfq  # before the model is loaded; nothing else changes\n")[1].split("```")[0]
    exec(usage.replace("path/to/this/folder", str(tmp_path / "out")), {})
    model = AutoModelForMultipleChoice.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer(["call 0800 123 now"] * 2, ["a", "b"], padding=True, return_tensors="pt")
    assert model(**{name: rows[None] for name, rows in tokens.items()}).logits.shape == (1, 2)
    plain = write_questions(tmp_path / "plain", labelled=False, test=40)
    asked = ("--dataset", plain, "--baseline", checkpoint, "--json")
    found = forkserver().hfq("eval", "out", *asked, cwd=tmp_path)
    assert found.code == 0, found.err
    assert json.loads(found.out)["metric"] == "fidelity"
    assert json.loads(found.out)["accuracy"] >= 0.9
