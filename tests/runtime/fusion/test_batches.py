"""A text is answered as it is alone in whatever batch it comes, however that is padded."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import load_dataset
from support.command import CHECKPOINT, DEMO
from support.models import quantized
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hfq.runtime.fusion import attention
from hfq.runtime.fusion.fuse import fuse
from hfq.tuning.candidates import Candidate

TEXTS = 24
LONGEST = 48


@pytest.fixture(params=["this CPU", "AMX"])
def cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """This one, and what torch tells of one with AMX: without it bfloat16 is slow, and rounded alike."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "AMX":
            found = {**torch.cpu.get_capabilities(), "avx512_bf16": True, "amx_bf16": True}
            patch.setattr(torch.cpu, "get_capabilities", lambda: found)
        patch.setenv("HFQ_FUSIONS", "all")
        attention.register()
        yield
    attention.register()


def answered(model: Any, texts: list[str], rows: int, **padding: Any) -> Tensor:
    """Logits, `rows` texts at a time."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    parts = [texts[start : start + rows] for start in range(0, len(texts), rows)]
    with torch.inference_mode():
        return torch.cat(
            [
                model(**tokenizer(part, truncation=True, max_length=LONGEST, return_tensors="pt", **padding)).logits
                for part in parts
            ]
        )


@pytest.mark.parametrize("approach", ["static", "dynamic"])
def test_a_text_is_answered_in_any_batch_as_alone(approach: str, cpu: None) -> None:
    texts = load_dataset(str(DEMO / "data"), split="test")["text"][:TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    batch = dict(tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))
    trained = AutoModelForSequenceClassification.from_pretrained(CHECKPOINT).eval()
    model = quantized(trained, Candidate(approach), [batch])
    fuse(model)
    alone = answered(model, texts, 1)
    for rows, padding in ((1, "max_length"), (3, "longest"), (TEXTS, "longest"), (16, "max_length")):
        found = answered(model, texts, rows, padding=padding)
        difference = (found - alone).abs().mean() / alone.std()
        assert torch.equal(found.argmax(1), alone.argmax(1))
        assert difference < 3e-4  # sums in another order
