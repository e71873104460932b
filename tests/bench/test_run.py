"""What `hfq bench` measures of models that are no classifiers."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.trained.sentences import write_encoder, write_sentence_model
from support.trained.training import messages
from transformers import AutoModelForMultipleChoice, XLMConfig, XLMForSequenceClassification

from hfq.bench.run import Timing, bench, opening_request
from hfq.bench.table import markdown
from hfq.common.ui import Reporter
from hfq.config import PostTrainingQuantConfig
from hfq.quantization import fit
from hfq.source.checkpoint import pull

pytestmark = pytest.mark.usefixtures("forked_workers")


def test_a_choice_is_timed_and_compared(tmp_path: Path) -> None:
    source = write_encoder(tmp_path / "mini-choices", "AutoModelForMultipleChoice")
    model, ids = AutoModelForMultipleChoice.from_pretrained(source), torch.randint(5, 200, (2, 2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not tuned
        int8 = fit(model, PostTrainingQuantConfig(approach="dynamic"), calib_func=lambda model: model(input_ids=ids))
    int8.save(str(tmp_path / "int8"))
    checkpoints = [pull(str(folder)) for folder in (tmp_path / "int8", source)]
    engines = {"fp32": None, "hfq": None}
    found = bench(*checkpoints, names=engines, timing=Timing([(2, 8)], threads=1, rounds=1), ui=Reporter())
    assert [(engine.name, engine.failure) for engine in found.engines] == [(name, None) for name in engines]
    assert 0 < found.engines[1].error < 0.2


def test_vectors_are_compared_and_a_peer_may_have_an_interpreter_of_its_own(tmp_path: Path) -> None:
    source = write_sentence_model(tmp_path / "mini-embedding")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not tuned
        model = fit(SentenceTransformer(str(source), device="cpu"), PostTrainingQuantConfig(approach="dynamic"),
                    calib_func=lambda model: model.encode(messages("train", 8)))  # fmt: skip
    model.save(str(tmp_path / "int8"))
    checkpoints = [pull(str(folder)) for folder in (tmp_path / "int8", source)]
    engines = {"fp32": sys.executable, "hfq": None}
    found = bench(*checkpoints, names=engines, timing=Timing([(2, 8)], threads=1, rounds=1), ui=Reporter())
    assert [(engine.name, engine.failure) for engine in found.engines] == [(name, None) for name in engines]
    assert all(engine.agreement is not None and engine.agreement > 0.98 for engine in found.engines)
    assert 0 < found.engines[1].error < 0.2  # int8 did run
    assert list(found.setup["elsewhere"]) == ["fp32"]
    assert "| cosine to FP32 | vector error |" in markdown(found, [])


def test_a_vocabulary_may_be_called_otherwise(tmp_path: Path) -> None:
    """XLM's config.json has n_words, as on the Hub."""
    config = XLMConfig(n_words=300, emb_dim=16, n_layers=1, n_heads=2, num_labels=2)
    XLMForSequenceClassification(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["n_words"] = written.pop("vocab_size", written.get("n_words"))
    (tmp_path / "config.json").write_text(json.dumps(written))
    checkpoint = pull(str(tmp_path))
    assert opening_request(checkpoint, checkpoint, threads=1, folder=tmp_path)["vocabulary"] == 300
