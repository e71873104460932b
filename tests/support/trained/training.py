"""Small checkpoints for other tasks than the demo's: its encoder and its messages, with a head trained in seconds."""

import csv
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from support.command import CHECKPOINT, DEMO, copy_checkpoint

Row = dict[str, Any]


def messages(split: str, count: int) -> list[str]:
    """The first texts of a split of the demo's data."""
    with (DEMO / "data" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)][:count]


def write_rows(folder: Path, rows: Callable[[str], Row], **counts: int) -> Path:
    """JSON lines of each split, what `rows` makes of a message: `write_rows(path, as_row, train=100, validation=50)`."""
    folder.mkdir(parents=True)
    for split, count in counts.items():
        lines = [json.dumps(rows(text)) for text in messages(split, count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def train(
    to: Path,
    auto_class: str,
    batch_of: Callable[[Any, Sequence[str]], dict[str, Any]],
    *,
    epochs: int = 2,
    by_length: bool = True,
    **config: Any,
) -> Path:
    """A checkpoint of the demo's encoder with the head of `auto_class`.

    `batch_of`: tensors of a tokenizer and texts. `by_length`: in batches of texts as long as each other, which have less
    than half of the tokens; no such batch teaches what depends on the length.
    """
    folder = copy_checkpoint(to)
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    model = getattr(transformers, auto_class).from_pretrained(CHECKPOINT, ignore_mismatched_sizes=True, **config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    texts = messages("train", 960)
    if by_length:
        texts.sort(key=len)
    starts = range(0, len(texts), 32)
    order = random.Random(0)
    model.train()
    for _ in range(epochs):
        for start in order.sample(starts, len(starts)):
            model(**batch_of(tokenizer, texts[start : start + 32])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return folder


def has_digits(word: str) -> bool:
    """Whether a word holds a digit."""
    return re.search(r"\d", word) is not None
