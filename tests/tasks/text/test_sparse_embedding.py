"""Sparse embedding: a SPLADE folder, its vectors, and its int8 version."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder
from support.command import forkserver
from support.trained.sentences import pairs, write_lines, write_sentence_model

from hfq.common.errors import SourceError, UsageError
from hfq.source.checkpoint import pull
from hfq.source.model import load_model
from hfq.tasks.registry import make_task

TEXTS = ["It is warm today.", "FREE entry in 2 a wkly comp to win", "ok"] * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "mini-splade"
    return write_sentence_model(folder, pooling={"pooling_strategy": "max"}, auto_class="AutoModelForMaskedLM")


def test_vectors_are_those_of_sentence_transformers(model: Path) -> None:
    checkpoint = pull(str(model))
    task = make_task(checkpoint.config, folder=checkpoint.path)
    assert task.name == "sparse-embedding"
    processor = task.processor(checkpoint, max_length=None, trust_remote_code=False)
    batch = task.collate(task.encode(Dataset.from_dict({"text": TEXTS}), {"text": ["text"]}, processor), processor)
    found = torch.stack(task.outputs(load_model(checkpoint, task.auto_class, trust_remote_code=False), batch))
    stock = SparseEncoder(str(model), device="cpu").encode(
        TEXTS, convert_to_sparse_tensor=False, convert_to_tensor=True
    )
    torch.testing.assert_close(found, stock, rtol=1e-3, atol=1e-4)


def test_active_dimensions_are_compared(model: Path) -> None:
    task = make_task(pull(str(model)).config, folder=model)
    first, second = [torch.tensor([1.0, 0, 2, 0])], [torch.tensor([0.5, 0.1, 3, 0])]
    assert task.fidelity(first, second) == pytest.approx(2 / 3)
    assert task.fidelity([torch.zeros(4)], [torch.zeros(4)]) == 1
    pairs_of_vectors = [torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[1.0, 0], [0, 1]])]
    assert task.score("spearman", pairs_of_vectors, [1, 0]) == pytest.approx(1, abs=1e-4)


def test_it_is_never_guessed(tmp_path: Path) -> None:
    config = {"architectures": ["BertForMaskedLM"], "vocab_size": 8}
    with pytest.raises(UsageError, match=r"has no modules\.json"):
        make_task(config, name="sparse-embedding", folder=tmp_path)


def test_how_logits_are_pooled_is_never_guessed(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("1_Pooling"))
    with pytest.raises(SourceError, match="names the folder '1_Pooling' for SpladePooling, which is not there"):
        make_task(pull(str(folder)).config, folder=folder)


def test_a_folder_is_quantized(model: Path, tmp_path: Path) -> None:
    for split, count in {"train": 60, "validation": 80}.items():
        write_lines(tmp_path / "data" / f"{split}.jsonl", pairs(split, count))
    done = forkserver().hfq("quantize", model, "--dataset", "data", "--output", "out", "--allow-loss", "--max-trials", 1,
                            "--json", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["task"], report["metric_label"]) == ("sparse-embedding", "Spearman of dot")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "from sentence_transformers import SparseEncoder\n" in card and "pipeline_tag: feature-extraction" in card
