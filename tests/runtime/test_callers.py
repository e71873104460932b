"""What people call models with: each gets the model's own outputs, once and when a shape comes again."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.command import CHECKPOINT
from support.models import make_space, relative_error
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline

import hfq  # noqa: F401 - opens int8 checkpoints
from hfq.export.checkpoint import export
from hfq.ptq.convert import quantize_model
from hfq.runtime.fusion.planning import SEEN
from hfq.source.checkpoint import pull
from hfq.tuning.candidates import Candidate

TEXTS = ["Free entry in a weekly draw, text WIN to 80082", "I will be home by seven, see you there"]
OF_TOKENS = {"token-classification": "AutoModelForTokenClassification", "feature-extraction": "AutoModel"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo classifier in int8."""
    folder = tmp_path_factory.mktemp("callers") / "int8"
    model = AutoModelForSequenceClassification.from_pretrained(CHECKPOINT).eval()
    inputs = [dict(AutoTokenizer.from_pretrained(CHECKPOINT)(TEXTS, padding=True, return_tensors="pt"))]
    plan = make_space(model, inputs).plan(Candidate("static"))
    export(quantize_model(model, plan, ()), plan, pull(str(CHECKPOINT)), folder=folder)
    return folder


def unfused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setenv("HFQ_FUSIONS", "none")
        return AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()


def test_a_pipeline_classifies_as_the_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    classify = pipeline("text-classification", model=str(checkpoint), tokenizer=tokenizer, device="cpu")
    model = unfused(checkpoint, monkeypatch)
    for text in TEXTS:
        with torch.inference_mode():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        for _ in range(SEEN + 3):
            (found,) = classify(text)
            label = model.config.label2id[found["label"]]
            assert label == int(expected.argmax())
            assert found["score"] == pytest.approx(float(expected[label]), abs=0.05)
    assert len(classify.model.forward.plans)


@pytest.mark.parametrize("task", OF_TOKENS)
def test_a_pipeline_of_tokens_answers_the_same_when_a_shape_comes_again(task: str, checkpoint: Path) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, OF_TOKENS[task]).from_pretrained(checkpoint).eval()  # heads are random
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    run = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
    first = run(TEXTS[1])
    for _ in range(SEEN + 3):
        again = run(TEXTS[1])
        assert len(again) == len(first)
    if task == "feature-extraction":
        assert relative_error(torch.tensor(again), torch.tensor(first)) < 1e-3
    else:
        assert [one["score"] for one in again] == pytest.approx([one["score"] for one in first], abs=1e-3)


def test_a_trainer_predicts_as_the_model(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    rows = [{"labels": 0, **tokenizer(text, padding="max_length", max_length=24)} for text in TEXTS * 6]
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    found = torch.from_numpy(Trainer(model, arguments).predict(rows).predictions)
    inputs = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        expected = unfused(checkpoint, monkeypatch)(**inputs).logits
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 0.05
