"""`hfq warm`: whoever loads the checkpoint then runs its graphs at once, here and where `--export` was brought."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.command import forkserver, until
from support.models import logits, make_space, relative_error, tiny, token_batches
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import hfq
from hfq.common.errors import UsageError
from hfq.export.checkpoint import export
from hfq.ptq.convert import quantize_model
from hfq.runtime.compiling.compile import has_compiler
from hfq.source.checkpoint import pull
from hfq.tuning.candidates import Candidate

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")
BATCHES = token_batches(2)


@dataclass(frozen=True)
class Warmed:
    """A checkpoint, where its graph is kept, where it was exported to, and what the model puts out uncompiled."""

    checkpoint: Path
    cache: Path
    graphs: Path
    uncompiled: Tensor


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> Warmed:
    work = tmp_path_factory.mktemp("warming")
    model = tiny(num_hidden_layers=1)
    model.save_pretrained(work / "float")
    plan = make_space(model, BATCHES).plan(Candidate("static"))
    export(quantize_model(model, plan, ()), plan, pull(str(work / "float")), folder=work / "int8")
    uncompiled = logits(hfq.load(work / "int8"), BATCHES)
    done = forkserver().hfq(
        "warm", work / "int8", "--shapes", "3x12", "--threads", 1, "--export", work / "graphs",
        cwd=work, env={"TORCHINDUCTOR_CACHE_DIR": str(work / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.code == 0, done.err
    return Warmed(work / "int8", work / "cache", work / "graphs", uncompiled)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an empty cache, and without a compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")


def loaded(checkpoint: Path) -> nn.Module:
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    return model


def assert_compiled(model: nn.Module, warmed: Warmed) -> Tensor:
    """See that `model` puts out what it does, and not as if it were uncompiled."""
    found = logits(model, BATCHES)
    assert relative_error(found, warmed.uncompiled) < 0.1
    assert not torch.equal(found, warmed.uncompiled)
    return found


def test_what_is_kept_is_used_by_whoever_loads_the_checkpoint(warmed: Warmed, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(logits(loaded(warmed.checkpoint), BATCHES), warmed.uncompiled), "nothing is kept here"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(warmed.cache))
    model = loaded(warmed.checkpoint)
    twin = copy.deepcopy(model)
    found = assert_compiled(model, warmed)
    for other in (twin, copy.deepcopy(model), hfq.load(warmed.checkpoint), hfq.compile(hfq.load(warmed.checkpoint))):
        assert torch.equal(logits(other, BATCHES), found)
    single = [{name: value[:1] for name, value in BATCHES[0].items()}]
    assert relative_error(logits(model, single), warmed.uncompiled[:1]) < 0.1, "that has no graph"
    monkeypatch.setenv("HFQ_COMPILE", "off")
    assert torch.equal(logits(loaded(warmed.checkpoint), BATCHES), warmed.uncompiled)
    monkeypatch.setenv("HFQ_COMPILE", "perhaps")
    with pytest.raises(UsageError, match="HFQ_COMPILE is 'perhaps'; expected kept, off, background"):
        hfq.load(warmed.checkpoint)


def test_in_the_background_a_model_computes_until_its_graph_is_there(
    warmed: Warmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(warmed.cache))
    monkeypatch.setenv("HFQ_COMPILE", "background")
    model = loaded(warmed.checkpoint)
    assert torch.equal(logits(model, BATCHES[:1]), warmed.uncompiled[:16])
    until(lambda: not torch.equal(logits(model, BATCHES), warmed.uncompiled))
    assert_compiled(model, warmed)


def test_what_is_exported_is_used_where_it_is_brought(
    warmed: Warmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFQ_GRAPHS", str(tmp_path / "graphs"))
    with pytest.warns(UserWarning, match="has no graph for BertForSequenceClassification: it holds no graphs"):
        hfq.load(warmed.checkpoint)
    shutil.copytree(warmed.graphs, tmp_path / "graphs")
    assert_compiled(loaded(warmed.checkpoint), warmed)

    (library,) = (tmp_path / "graphs").glob("*/*/graph.so")
    for path in (library, library.parent, library.parents[1]):  # others may write there
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        assert torch.equal(logits(loaded(warmed.checkpoint), BATCHES), warmed.uncompiled)
        path.chmod(mode)
    content = library.read_bytes()
    library.unlink()  # this process runs the file that was there
    library.write_bytes(content[:-1] + b"?")
    assert torch.equal(logits(loaded(warmed.checkpoint), BATCHES), warmed.uncompiled)
    library.unlink()
    library.write_bytes(content)
    assert_compiled(loaded(warmed.checkpoint), warmed)


def test_what_was_made_elsewhere_is_not_used_and_that_is_said(
    warmed: Warmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFQ_GRAPHS", str(tmp_path / "graphs"))
    shutil.copytree(warmed.graphs, tmp_path / "graphs")
    (graph,) = (path for path in (tmp_path / "graphs").iterdir() if path.is_dir())
    graph.rename(tmp_path / "graphs" / "another")
    facts = tmp_path / "graphs" / "made-with.json"
    with pytest.warns(UserWarning, match="none of them is of this model"):
        hfq.load(warmed.checkpoint)
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "transformers": "5.0.0"}))
    with pytest.warns(UserWarning, match=r"another transformers \(5\.0\.0, here"):
        model = hfq.load(warmed.checkpoint)
    assert torch.equal(logits(model, BATCHES), warmed.uncompiled)


def test_quantize_says_before_it_begins_that_it_cannot_compile(warmed: Warmed, tmp_path: Path) -> None:
    source = warmed.checkpoint.parent / "float"
    done = forkserver().hfq(
        "quantize", source, "--compile", "--output", tmp_path / "out", cwd=tmp_path, env={"CXX": "no-such"}
    )
    assert done.code == 2
    assert "--compile needs a C++ compiler" in done.err
    assert not (tmp_path / "out").exists()
