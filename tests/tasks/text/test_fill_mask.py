"""Fill-mask, from plain text to a published model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.command import CHECKPOINT, forkserver
from support.trained.training import messages, train
from transformers import AutoModelForMaskedLM, pipeline

from hfq.common.errors import DataError, UsageError
from hfq.source.checkpoint import pull
from hfq.tasks.base import Processor
from hfq.tasks.text.fill_mask import IGNORED, FillMask

CONFIG = {"architectures": ["BertForMaskedLM"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def batch(tokenizer: Any, texts: Any) -> dict[str, Any]:
        tokens = tokenizer(texts, truncation=True, max_length=24, padding=True, return_tensors="pt")
        hidden = (torch.rand(tokens["input_ids"].shape) < 0.15) & (tokens["attention_mask"] == 1)
        labels = tokens["input_ids"].where(hidden, torch.tensor(IGNORED))
        return {
            **tokens,
            "input_ids": tokens["input_ids"].masked_fill(hidden, tokenizer.mask_token_id),
            "labels": labels,
        }

    return train(tmp_path_factory.mktemp("mask") / "bert-mini-mask", "AutoModelForMaskedLM", batch, epochs=1)


@pytest.fixture(scope="module")
def task() -> FillMask:
    return FillMask(CONFIG)


@pytest.fixture(scope="module")
def processor(task: FillMask) -> Processor:
    return task.processor(pull(str(CHECKPOINT)), max_length=None, trust_remote_code=False)


def test_the_same_tokens_of_a_text_are_hidden_wherever_it_stands(task: FillMask, processor: Processor) -> None:
    texts = messages("test", 20)
    rows, other = (Dataset.from_dict({"text": some}) for some in (texts, texts[::-1]))
    found = task.encode(rows, {"text": ["text"]}, processor)
    assert found == task.encode(other, {"text": ["text"]}, processor)[::-1]
    tokenizer = processor.tool
    for text, encoding in zip(texts, found, strict=True):
        ids = tokenizer(text, truncation=True, max_length=128)["input_ids"]
        hidden = [place for place, label in enumerate(encoding["labels"]) if label != IGNORED]
        assert len(hidden) == max(1, round(0.15 * (len(ids) - 2)))
        assert [encoding["labels"][place] for place in hidden] == [ids[place] for place in hidden]
        assert {encoding["input_ids"][place] for place in hidden} == {tokenizer.mask_token_id}
        assert tokenizer.cls_token_id not in encoding["labels"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_the_models_logits(
    checkpoint: Path, task: FillMask, processor: Processor, side: str
) -> None:
    model = AutoModelForMaskedLM.from_pretrained(checkpoint).eval()
    processor.tool.padding_side = side
    encodings = task.encode(Dataset.from_dict({"text": messages("test", 8)}), {"text": ["text"]}, processor)
    batch = task.collate(encodings, processor)
    with torch.inference_mode():
        outputs = task.outputs(model, batch)
        logits = model(**task.model_inputs(batch)).logits
    asked = batch["labels"] != IGNORED
    right = batch["labels"][asked]
    loss = torch.nn.functional.cross_entropy(logits[asked], right)
    five = (logits[asked].topk(5).indices == right[:, None]).any(1)
    assert task.score("pseudo_perplexity", outputs, [""] * 8) == pytest.approx(math.exp(loss), rel=1e-4)
    assert task.score("top1", outputs, [""] * 8) == pytest.approx(
        (logits[asked].argmax(1) == right).double().mean().item()
    )
    assert task.score("top5", outputs, [""] * 8) == pytest.approx(five.double().mean().item())
    assert not task.metrics["pseudo_perplexity"].higher_is_better
    other = [output.clone() for output in outputs]
    other[0][0, 2] += 0.5
    assert task.fidelity(outputs, outputs) == 1
    assert task.fidelity(outputs, other) == pytest.approx(1 - 1 / len(right))
    best = logits[asked].topk(2).values
    leads = (best[:, 0] - best[:, 1]).split(list(map(len, outputs)))
    assert task.margins(outputs, outputs).tolist() == pytest.approx([lead.min().item() for lead in leads], rel=1e-3)
    outputs[0] = outputs[0][:1]
    swapped = outputs[0].clone()
    swapped[:, 2:4] = outputs[0][:, [3, 2]]
    assert task.margins(outputs[:1], [swapped]).item() == pytest.approx(-leads[0][0].item(), rel=1e-3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a", None]}, "has None in column 'text', and not a text"),
        ({"a": ["x"], "b": ["y"]}, "Which column holds the text is not clear"),
        ({"text": ["", ""]}, "has no text of which a token could be hidden"),
    ],
)
def test_rows_that_do_not_fit_are_refused(task: FillMask, processor: Processor, rows: Any, message: str) -> None:
    given = Dataset.from_dict(rows)
    with pytest.raises(DataError, match=message):
        task.encode(given, task.columns(given.features, {}), processor)


def test_labels_are_nothing_that_it_reads(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("a b\n")
    done = forkserver().hfq("eval", checkpoint, "--dataset", "./data.txt", "--label-column", "text", cwd=tmp_path)
    assert done.code == UsageError.exit_code and "--label-column is nothing that fill-mask reads" in done.err


def test_a_checkpoint_is_quantized_and_opens_in_stock_transformers(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, count in {"train": 50, "validation": 60, "test": 40}.items():
        lines = [text.replace("\n", " ") for text in messages(split, count)]
        (data / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    done = forkserver().hfq(
        "quantize", checkpoint, "--dataset", data, "--output", "out", "--max-length", 32, "--json", cwd=tmp_path
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["metric"], report["goal"]["higher_is_better"]) == (
        "fill-mask",
        "pseudo_perplexity",
        False,
    )
    assert report["quantized"]["accuracy"] <= 1.01 * report["baseline"]["accuracy"]
    assert report["stock_agreement"] >= 0.9
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert 'pipeline("fill-mask"' in card and "| Pseudo-perplexity (test, held out) |" in card
    assert "Top-1 accuracy: FP32 " in card and "Top-5 accuracy: FP32 " in card
    answers = pipeline("fill-mask", model=str(tmp_path / "out"), device="cpu")("call me [MASK]")
    assert len(answers) == 5
