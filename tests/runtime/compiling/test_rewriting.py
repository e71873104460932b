"""Attention, layer norms and quantization as compiled code of our own: found in any model, equal to torch's."""

import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import pieces
from support.command import forkserver
from support.families import FAMILIES
from support.models import quantized, relative_error, tiny, token_batches
from torch import Tensor, fx

from hfq.ptq.inputs import Batch
from hfq.ptq.scheme import Approach
from hfq.runtime.compiling import compile as compiling
from hfq.runtime.compiling.blocked import gelu, lay_out
from hfq.runtime.compiling.graphs import Graph
from hfq.runtime.compiling.skeleton import take_apart
from hfq.runtime.fusion.fuse import fuse
from hfq.runtime.int8.packed import pack_all
from hfq.runtime.kernels.cpu import can_compile, compiles_to_bfloat16
from hfq.runtime.kernels.selection import select_kernel
from hfq.tuning.candidates import Candidate

BATCHES = token_batches(2)

needs_templates = pytest.mark.skipif(not can_compile(), reason="C++ of our own is for x86 with AVX2 or AVX-512")


def multiplies_itself() -> bool:
    """Whether compiled code multiplies int8 here, rather than oneDNN."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" or select_kernel().name != "onednn"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    if not compiling.has_compiler():
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("pieces")
    words = [forkserver().programs / "python", "-m", pieces.__name__, folder]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Graph(folder, pieces.make_tensors())


def answers(graph: Graph, tokens: Tensor, seen: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What compiled code answers, and what torch does."""
    inputs = torch.stack([tokens, seen])
    assert graph.fits(inputs)
    with torch.inference_mode():
        return graph(inputs), pieces.Pieces()(inputs, pieces.make_tensors())


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(2, 200, (batch, length), generator=torch.Generator().manual_seed(length))


@needs_templates
@pytest.mark.parametrize(("batch", "length"), [(2, 2), (3, 33), (4, 64), (2, 200)])
def test_the_pieces_of_an_encoder_are_equal_to_torchs(compiled: Graph, batch: int, length: int) -> None:
    seen = (torch.arange(length) < length - torch.arange(batch)[:, None] * length // batch).long()
    seen[0, 0] = 0  # not only padding
    found, expected = answers(compiled, tokens(batch, length), seen)
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        assert found[name].dtype == y.dtype and found[name].shape == y.shape
        if y.dtype == torch.uint8:
            difference = (found[name].int() - y.int()).abs()
            rounded = 2 if "attention" in name and compiles_to_bfloat16() else 1
            assert difference.max() <= rounded and difference.float().mean() < 0.2, name
            assert y.float().std() > 0, "codes differ"
        else:
            within = 1e-2 if "attention" in name and compiles_to_bfloat16() else 1e-5
            if "alone" in name:
                within = max(within, 1e-3)  # they are kept in 16 bits
            if "gelu" in name:
                within = 1e-4
            assert relative_error(found[name], y) < within, name


@needs_templates
def test_a_row_that_sees_no_key_is_answered_with_zeros(compiled: Graph) -> None:
    seen = torch.ones(2, 20, dtype=torch.long)
    seen[1] = 0
    found, expected = answers(compiled, tokens(2, 20), seen)
    assert not found["attention with keys unseen"][1].any()
    assert found["attention with keys unseen"][0].all()
    # Where that is the least number, added to every score, it sees all alike, as it does in torch.
    assert relative_error(found["attention by matmuls"][1], expected["attention by matmuls"][1]) < 1e-2


@needs_templates
def test_numbers_that_are_none_stay_so_and_stay_where_they_are(compiled: Graph) -> None:
    ids = tokens(3, 40)
    ids[1, 7] = pieces.NAN
    found, expected = answers(compiled, ids, torch.ones_like(ids))
    for name, y in expected.items():
        assert torch.equal(found[name].isnan(), y.isnan()), name
    assert found["attention"][1].isnan().all() and not found["attention"][::2].isnan().any()


@needs_templates
def test_codes_end_at_their_bounds(compiled: Graph) -> None:
    ids = tokens(2, 40)
    ids[0] = pieces.HUGE
    found, expected = answers(compiled, ids, torch.ones_like(ids))
    codes = found["attention as codes"].view(2, 40, -1)
    assert (codes[0] == 255).all()
    assert torch.equal(codes[0], expected["attention as codes"].view(2, 40, -1)[0])


@needs_templates
def test_numbers_that_16_bits_cannot_hold_are_the_largest(compiled: Graph) -> None:
    ids = tokens(2, 40)
    ids[0] = pieces.HUGE
    found, _ = answers(compiled, ids, torch.ones_like(ids))
    y = found["attention that alone reads its numbers"]
    assert y[0].isfinite().all() and (y[0] > 6e4).all() and y[1].abs().max() < 10


def rewritten(
    model: Any, approach: Approach, monkeypatch: pytest.MonkeyPatch, batches: Sequence[Batch] = BATCHES
) -> fx.GraphModule:
    """What is compiled of `model` in int8, calibrated on `batches`."""
    from hfq.runtime.compiling.inductor.compiler import Rebuilt, trace
    from hfq.runtime.compiling.inductor.rewriting import rewrite

    monkeypatch.setenv("HFQ_FUSIONS", "exact")  # torch's attention, which is looked for, whatever the CPU
    model = quantized(model, Candidate(approach), batches)
    fuse(model)
    pack_all(model)
    lay_out(model, panels=True)
    parts = take_apart(model, blocks=True)
    assert parts is not None
    rebuilt = Rebuilt(parts[0], ["attention_mask", "input_ids"])
    module = trace(rebuilt, torch.ones(2, 3, 11, dtype=torch.long), parts[1]).module(check_guards=False)
    rewrite(module, fusions=["compiled-attention", "compiled-residual"])
    return module


@pytest.mark.skipif(not can_compile() or not multiplies_itself(), reason="oneDNN multiplies int8 on this CPU")
@pytest.mark.parametrize(
    ("family", "attentions"),
    [("Bert", 2), ("DistilBert", 2), ("Roberta", 2), ("Electra", 2), ("MPNet", 2)],  # the last multiplies itself
)
def test_they_are_found_whatever_the_family(family: str, attentions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = rewritten(tiny(family), "static", monkeypatch)
    counts = Counter(str(node.target) for node in module.graph.nodes)
    assert counts["hfq.attention.default"] == attentions
    assert counts["aten.scaled_dot_product_attention.default"] == 0
    # Of two layers and the embeddings: all but the last are followed by an int8 layer's quantization.
    with_matmul = counts["hfq.int8_linear_norm.default"]
    assert counts["hfq.layer_norm.default"] + with_matmul >= 4
    assert with_matmul == 3 if pieces.multiplies_blocks() else with_matmul == 0
    norms = [
        node
        for node in module.graph.nodes
        if str(node.target) in ("hfq.layer_norm.default", "hfq.int8_linear_norm.default")
    ]
    assert sum(node.args[-1] for node in norms) >= 2  # nothing but a sum reads their numbers
    assert counts["hfq.quantize.default"] <= 6 - attentions  # what follows an attention is in it


@pytest.mark.skipif(not can_compile() or not multiplies_itself(), reason="oneDNN multiplies int8 on this CPU")
def test_the_range_of_a_row_is_found_where_the_row_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    module = rewritten(tiny(), "dynamic", monkeypatch)
    counts = Counter(str(node.target) for node in module.graph.nodes)
    assert counts["hfq.attention.default"] == 2
    assert counts["hfq.layer_norm.default"] + counts["hfq.int8_linear_norm.default"] >= 4
    if pieces.multiplies_blocks():
        assert counts["hfq.int8_linear_rows.default"] == 2
        assert (
            counts["hfq.quantize_rows.default"] <= 2 + 1
        )  # of attention, whose heads have parts of rows, and of a pooler


@pytest.mark.skipif(not can_compile() or not multiplies_itself(), reason="oneDNN multiplies int8 on this CPU")
@pytest.mark.parametrize("shared", [True, False])
def test_attention_by_distance_is_found(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(
        "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=shared
    )
    counts = Counter(str(node.target) for node in rewritten(model, "static", monkeypatch).graph.nodes)
    assert counts["hfq.attention.default"] == 2
    assert counts["aten.bmm.default"] == counts["aten.gather.default"] == 0


def test_gelu_of_codes_is_far_below_a_step() -> None:
    x = torch.cat([torch.linspace(-9, 9, 200_001), torch.tensor([-1e30, 1e30])])
    assert (gelu(x) - torch.nn.functional.gelu(x)).abs().max() < 1e-4


_WIDTHS = ("hidden_size", "intermediate_size", "d_model", "d_ff", "dim", "hidden_dim", "embedding_size")


@pytest.mark.skipif(not can_compile() or not multiplies_itself(), reason="oneDNN multiplies int8 on this CPU")
@pytest.mark.parametrize("name", ["albert", "deberta", "gemma3, bidirectional", "modernbert", "mpnet", "t5 encoder"])
def test_each_family_is_one_graph_in_which_matmuls_are_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    wide = {key: max(64, family.config[key]) for key in _WIDTHS if key in family.config}
    model = replace(family, config={**family.config, **wide}).make().base_model
    module = rewritten(model, "static", monkeypatch, [family.inputs()])
    matmuls = [node for node in module.graph.nodes if "hfq.int8_linear" in str(node.target)]
    assert len(matmuls) >= 4
