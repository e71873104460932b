"""Small sentence-transformers folders, of the demo's encoder as it is, and texts of known likeness to embed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from support.command import CHECKPOINT
from support.trained.training import messages

DIM = 128  # of the demo's encoder
POOLING = {"word_embedding_dimension": DIM, "pooling_mode_mean_tokens": True}


def write_sentence_model(
    to: Path,
    *,
    pooling: Mapping[str, Any] = POOLING,
    dense: int | None = None,
    auto_class: str = "AutoModel",
    **config: Any,
) -> Path:
    """A folder of transformer, pooling, a dense module of that many outputs and normalization. `config`: beside them."""
    write_encoder(to, auto_class)
    sparse = "pooling_strategy" in pooling
    modules = (
        [("MLMTransformer", ""), ("SpladePooling", "1_Pooling")]
        if sparse
        else [("Transformer", ""), ("Pooling", "1_Pooling")]
    )
    _write(to / "1_Pooling" / "config.json", dict(pooling))
    if dense:
        settings = {"in_features": DIM, "out_features": dense, "bias": True}
        _write(to / "2_Dense" / "config.json", {**settings, "activation_function": "torch.nn.modules.activation.Tanh"})
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(dense, DIM, generator=generator) / DIM**0.5
        save_file({"linear.weight": weight, "linear.bias": torch.zeros(dense)}, to / "2_Dense" / "model.safetensors")
        modules.append(("Dense", "2_Dense"))
    if not sparse:
        modules.append(("Normalize", "3_Normalize"))
    package = "sentence_transformers.sparse_encoder" if sparse else "sentence_transformers"
    _write(
        to / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"{package}.models.{name}"}
            for i, (name, path) in enumerate(modules)
        ],
    )
    if sparse:
        config = {"model_type": "SparseEncoder", **config}
    _write(to / "config_sentence_transformers.json", config)
    _write(to / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    return to


def write_encoder(to: Path, auto_class: str = "AutoModel", **config: Any) -> Path:
    """The demo's encoder without its head, or with another; its new weights are random."""
    torch.manual_seed(0)
    kind = getattr(transformers, auto_class)
    kind.from_pretrained(CHECKPOINT, ignore_mismatched_sizes=True, **config).save_pretrained(to)
    transformers.AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(to)
    return to


def shared_words(first: str, second: str) -> float:
    """Words that two texts share, of those of either."""
    a, b = ({word.lower() for word in text.split()} for text in (first, second))
    return len(a & b) / max(1, len(a | b))


def pairs(split: str, count: int) -> list[dict[str, Any]]:
    """Pairs with a score, from alike to not at all: each message with another, some of whose words are its own."""
    texts = messages(split, count)
    found = []
    for row, text in enumerate(texts):
        own, other = text.split(), texts[(row + 1) % count].split()
        kept = len(own) * (row % 5) // 4
        mixed = " ".join(own[:kept] + other[kept:]) or other[0]
        found.append({"sentence1": text, "sentence2": mixed, "score": round(5 * shared_words(text, mixed), 2)})
    return found


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_beir(folder: Path, *, documents: int = 60, queries: int = 20) -> Path:
    """The BEIR layout: messages, and the first words of some of them as queries."""
    texts = messages("test", documents)
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)])
    asked = [{"_id": f"q{i}", "text": " ".join(text.split()[:8])} for i, text in enumerate(texts[:queries])]
    write_lines(folder / "queries.jsonl", asked)
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(queries))]
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
