"""A task that hfq has not: one file beside the others, and every stage has it."""

import json
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.command import library_python
from support.trained.training import messages, train

import hfq
import hfq.tasks
from hfq.common.errors import DataError, HfqError
from hfq.hub.local.card import problems
from hfq.tasks.base import find_column
from hfq.tasks.registry import tasks

FILE = '''
from hfq.tasks.classification import Classification
from hfq.tasks.text.sequence import SequenceTask


class NextSentence(Classification, SequenceTask):
    """Whether the second text goes on where the first ends."""

    name = "next-sentence-prediction"
    auto_class = "AutoModelForNextSentencePrediction"
'''


def halves(texts: list[str]) -> list[dict[str, Any]]:
    """Every other message beside the second half of another one."""
    cut = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    return [
        {"text": first, "text_pair": cut[(i + 1) % len(cut)][1] if i % 2 else second, "label": i % 2}
        for i, (first, second) in enumerate(cut)
    ]


@pytest.mark.parametrize(
    ("text", "said"), [("import torchmetric", "ModuleNotFoundError"), ("class Mine(:", "SyntaxError")]
)
def test_a_task_file_that_fails_is_named(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr(hfq.tasks, "__path__", [*hfq.tasks.__path__, str(tmp_path)])
    tasks.cache_clear()
    try:
        with pytest.raises(HfqError, match=f"hfq/tasks/mine.py cannot be imported: {said}"):
            tasks()
    finally:
        tasks.cache_clear()


def test_a_new_task_is_one_file(tmp_path: Path) -> None:
    """In a copy of hfq, since this one must not have it. What shares the Hub's name with it stays what it was."""
    here = Path(hfq.__file__).parents[1]
    for part in ("hfq", "model_cards", "pipelines"):
        shutil.copytree(here / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "hfq" / "tasks" / "text" / "next_sentence.py").write_text(FILE)

    def batch(tokenizer: Any, texts: Any) -> dict[str, Any]:
        rows = halves(list(texts))
        pairs = [row["text"] for row in rows], [row["text_pair"] for row in rows]
        encoded = tokenizer(*pairs, truncation=True, padding=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor([row["label"] for row in rows])}

    checkpoint = train(tmp_path / "bert-mini-nsp", "AutoModelForNextSentencePrediction", batch, epochs=1)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        lines = map(json.dumps, halves(messages(split, 100)))
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))

    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from hfq.cli import main; main()"
    flags = ["--dataset", "data", "--approach", "dynamic", "--max-trials", "1", "--allow-loss", "--output", "out"]
    command = [library_python(), "-c", code, str(tmp_path), "quantize", str(checkpoint), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "hfq.json").read_text())
    assert (report["task"], report["metric"]) == ("next-sentence-prediction", "accuracy")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Accuracy" in card
    ran: dict[str, Any] = {}  # transformers' pipeline of its tag would load another class, with a head at random
    exec(card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "out")), ran)
    assert type(ran["model"]).__name__ == "BertForNextSentencePrediction"
    assert ran["model"](**ran["processor"]("I am", "here", return_tensors="pt")).logits.shape == (1, 2)

    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
    asked = [(config, None), (config, "text-classification"), ({"architectures": ["Own"]}, "text-classification")]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from hfq.tasks.registry import find_task\n"
        f"print({{find_task(config, name=name).name for config, name in {asked}}})"
    )
    found = subprocess.run([library_python(), "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert found.stdout.strip() == "{'text-classification'}", found.stderr


def test_the_hub_takes_the_tags_of_every_task() -> None:
    """Else a card is refused after hours, when all is measured."""
    tags = {tag for task in tasks().values() for tag in (task.pipeline_tag, *task.other_tags)}
    assert not [tag for tag in tags if problems(f"---\npipeline_tag: {tag}\n---\n", "model")]


def test_every_task_is_whole() -> None:
    """Else the first checkpoint says so, or any checkpoint: all tasks are asked whether it is theirs."""
    lacking = {name: sorted(task.__abstractmethods__) for name, task in tasks().items() if task.__abstractmethods__}
    assert not lacking
    for task in tasks().values():
        assert hasattr(transformers, task.auto_class), f"{task.name}: {task.auto_class}"
        assert task.text_role in task.roles, f"{task.name}: --text-column names no column of it"


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        (["nope"], r"^--column map= 'nope' is not a column of the dataset\. Columns: image, near, far\.$"),
        (["near", "far"], r"^2 columns were given for the depth: near, far\. Name one with --column map=\.$"),
        ([], r"^Which column holds the depth is not clear\. Columns: image, near, far; that could be it: near, far\. "),
    ],
)
def test_the_column_of_a_role_is_found_or_asked_for(requested: list[str], message: str) -> None:
    features = dict.fromkeys(("image", "near", "far"))
    find = partial(find_column, features, held=["near", "far"], what="the depth", flag="--column map=")
    with pytest.raises(DataError, match=message):
        find(requested, known=["depth"])
    assert find([], known=["depth", "far", "near"]) == find(["far"], known=[]) == ["far"]
