"""Int8 layers compute what their tensors say, on every kernel, and their state is the checkpoint's."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.models import relative_error
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from hfq.common.errors import UsageError
from hfq.ptq.convert import int8_embedding, int8_linear
from hfq.ptq.scheme import LayerScheme, quantize_rows
from hfq.runtime.int8.embedding import Int8Embedding
from hfq.runtime.int8.linear import Int8Linear
from hfq.runtime.int8.packed import memory_mib, pack_all
from hfq.runtime.kernels.kernel import PostOp
from hfq.runtime.kernels.selection import select_kernel

SCHEMES = {"static": LayerScheme.static((-2.0, 3.0)), "dynamic": LayerScheme("dynamic")}
ODD = (7, 5)
EVEN = (64, 48)


@pytest.fixture(params=["native", "portable"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernel of this CPU, then the one that runs on any."""
    yield from use_kernel(request.param, monkeypatch)


def use_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("HFQ_ISA", name)
    select_kernel.cache_clear()
    yield select_kernel().name
    select_kernel.cache_clear()


def make(approach: str, size: tuple[int, int] = ODD, *, bias: bool = True, seed: int = 0) -> Int8Linear:
    torch.manual_seed(seed)
    return int8_linear(nn.Linear(*size, bias=bias), SCHEMES[approach])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def reference(layer: Int8Linear, x: Tensor) -> Tensor:
    """Quantize in float32, where a row's largest value is a tie; dequantize and multiply in float64."""
    x = x.float()
    if layer.activation == "static":
        scale, zero_point = layer.input_scale.float(), layer.input_zero_point
    else:
        scale, zero_point = x.abs().amax(-1, keepdim=True) / 127.5, torch.zeros(1)
    codes = ((x / scale).round() + zero_point).clamp(-128, 127)
    y = ((codes - zero_point).double() * scale) @ (layer.weight.double() * layer.weight_scale.double()).t()
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("size", [ODD, EVEN, (1, 1)], ids=str)
@pytest.mark.parametrize("approach", SCHEMES)
def test_layer_computes_what_its_tensors_say(
    kernel: str, approach: str, size: tuple[int, int], shape: tuple[int, ...], bias: bool
) -> None:
    layer, x = make(approach, size, bias=bias), normal(*shape, size[0])
    y = layer(x)
    assert y.shape == (*shape, size[1])
    assert y.dtype == torch.float32
    assert torch.allclose(y.double(), reference(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("approach", SCHEMES)
def test_layer_is_close_to_the_float_layer(kernel: str, approach: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    x = normal(32, 64).clamp(-2, 3)
    assert relative_error(int8_linear(linear, SCHEMES[approach])(x), linear(x).detach()) < 0.02


def test_rows_beyond_one_block_are_computed_too(kernel: str) -> None:
    layer, x = make("dynamic"), normal(1300, 7)
    assert torch.allclose(layer(x).double(), reference(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("approach", SCHEMES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 0],
        lambda x: x.transpose(0, 1),
        lambda x: x[:1].expand(5, 3, 7),
        lambda x: x[..., None, :].permute(1, 2, 0, 3),
    ],
    ids=["column", "transposed", "expanded", "permuted"],
)
def test_layer_reads_views(kernel: str, approach: str, view: Any) -> None:
    layer, x = make(approach), view(normal(5, 3, 7))
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize(
    ("approach", "shape"),
    [
        ("static", (0, 7)),
        ("dynamic", (0, 7)),
        ("dynamic", (0, 3, 7)),
        ("static", (0, 3, 7)),
        ("static", (2, 0, 7)),
    ],
    ids=str,
)
def test_empty_batch_gives_an_empty_answer(approach: str, shape: tuple[int, ...]) -> None:
    assert make(approach)(torch.empty(shape)).shape == (*shape[:-1], 5)


@pytest.mark.parametrize("approach", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_answer_has_the_type_of_the_input(kernel: str, approach: str, dtype: torch.dtype) -> None:
    layer, x = make(approach), normal(3, 7).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.allclose(y.double(), reference(layer, x), rtol=1e-2, atol=1e-2)


def test_row_of_zeros_gives_the_bias(kernel: str) -> None:
    for approach in SCHEMES:
        layer = make(approach)
        assert torch.allclose(layer(torch.zeros(2, 7)), layer.bias.expand(2, 5), atol=1e-6)


def test_rows_do_not_change_each_other(kernel: str) -> None:
    layer, x = make("dynamic"), normal(4, 7)
    scaled = x * torch.tensor([[1.0], [1e-3], [1e3], [1e6]])
    for i in range(4):
        assert torch.allclose(layer(scaled)[i], layer(scaled[i : i + 1])[0], rtol=1e-5)


def test_values_outside_the_static_range_saturate(kernel: str) -> None:
    layer = make("static")
    assert torch.equal(layer(torch.full((1, 7), 1e30)), layer(torch.full((1, 7), 3.0)))
    assert torch.equal(layer(torch.full((1, 7), -1e30)), layer(torch.full((1, 7), -2.0)))


@pytest.mark.parametrize("approach", SCHEMES)
@pytest.mark.parametrize("size", [ODD, EVEN, (300, 130)], ids=str)
def test_kernels_agree(approach: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, answers = normal(9, size[0]), {}
    for name in ("native", "portable"):
        for found in use_kernel(name, monkeypatch):
            layer = make(approach, size)
            answers[name] = {
                post_op: with_post_op(layer, post_op)(x) for post_op in (None, "relu", "gelu", "gelu_tanh")
            }
            assert name == "native" or found == "portable"
    for post_op, answer in answers["native"].items():
        assert torch.allclose(answer, answers["portable"][post_op], rtol=1e-4, atol=1e-4)


def with_post_op(layer: Int8Linear, post_op: Any) -> Int8Linear:
    layer.post_op = post_op
    return layer


def test_codes_for_the_next_layer_are_its_own_quantization(kernel: str) -> None:
    first, second, x = make("static", (7, 9)), make("static", (9, 4), seed=1), normal(3, 7)
    floats = first(x)
    expected = second(floats)
    first.emit_codes_for(second)
    codes = first(x)
    scale, zero_point = second.input_scale, second.input_zero_point
    assert codes.dtype == torch.uint8
    assert ((codes.int() - ((floats / scale).round() + zero_point + 128).clamp(0, 255)).abs() <= 1).all()
    assert relative_error(second(codes), expected) < 0.02
    first.emit_codes_for(None)
    assert torch.equal(first(x), floats)


@pytest.mark.parametrize("size", [ODD, EVEN, (1, 1), (200, 3)], ids=str)
def test_state_gives_back_the_exact_weight(kernel: str, size: tuple[int, int]) -> None:
    layer = make("static", size)
    weight = torch.randint(-128, 128, (size[1], size[0]), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    before = {**layer.state_dict(), "weight": weight}
    layer.load_state_dict(before)
    layer(normal(2, size[0]))
    after = layer.state_dict()
    assert list(after) == list(make("static", size).state_dict())
    assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert torch.equal(layer.weight, weight)
    layer.unpack()
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("packed", [False, True], ids=["fresh", "packed"])
@pytest.mark.parametrize("approach", SCHEMES)
def test_copies_answer_alike(kernel: str, approach: str, packed: bool) -> None:
    layer, x = with_post_op(make(approach), "gelu"), normal(3, 7)
    expected = copy.deepcopy(layer)(x)
    if packed:
        layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("approach", SCHEMES)
def test_loaded_state_is_what_runs(kernel: str, approach: str) -> None:
    layer, other, x = make(approach), make(approach, seed=1), normal(3, 7)
    assert not torch.allclose(layer(x), other(x), atol=1e-2)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("approach", SCHEMES)
def test_casting_keeps_the_codes_and_casts_the_rest(kernel: str, approach: str) -> None:
    layer, x = make(approach), normal(16, 7)
    expected, weight = layer(x), layer.weight
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.int8
    assert layer.weight_scale.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, weight)
    assert relative_error(layer(x), expected) < 0.02
    assert relative_error(layer(x.bfloat16()), expected) < 0.02
    assert torch.allclose(layer(x).double(), reference(layer, x), rtol=1e-4, atol=1e-4)


def test_copy_of_a_layer_does_not_follow_it() -> None:
    layer, x = make("static"), normal(3, 7)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    layer.load_state_dict(make("static", seed=1).state_dict())
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("rows", [1, 11])
def test_embedding_gives_its_rows(rows: int) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(rows, 7, padding_idx=0)
    twin = int8_embedding(embedding)
    ids = torch.tensor([[0, rows - 1], [rows // 2, 0]])
    weight, scale = quantize_rows(embedding.weight)
    assert torch.equal(twin(ids), (weight.float() * scale)[ids])
    assert (twin(ids) - embedding(ids)).abs().max() <= scale.max() / 2 + 1e-6
    assert twin(ids)[0, 0].eq(0).all()  # the padding row stays zero
    assert twin(ids[:0]).shape == (0, 2, 7)
    assert twin(ids.int()).shape == (2, 2, 7)


@pytest.mark.parametrize("scaled", [Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding])
def test_embedding_that_multiplies_its_rows_is_int8_too(scaled: type[nn.Embedding]) -> None:
    torch.manual_seed(0)
    embedding = scaled(11, 8, 0, embed_scale=8**0.5)  # type: ignore[call-arg]
    twin = int8_embedding(embedding)
    ids = torch.arange(11)
    assert relative_error(twin(ids), embedding(ids)) < 0.01
    assert torch.equal(
        twin.weight_scale, quantize_rows(embedding.weight).scale
    )  # which a head that is tied to it reads


def test_embedding_that_does_something_else_stays_float() -> None:
    class Doubled(nn.Embedding):
        embed_scale = 2.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids + 1) * self.embed_scale

    with pytest.raises(TypeError, match="no plain Embedding"):
        int8_embedding(Doubled(11, 8))


def test_embedding_survives_copies_and_casts() -> None:
    torch.manual_seed(0)
    twin = int8_embedding(nn.Embedding(11, 8))
    ids = torch.arange(11)
    expected = twin(ids)
    assert torch.equal(copy.deepcopy(twin)(ids), expected)
    assert torch.equal(pickle.loads(pickle.dumps(twin))(ids), expected)
    fresh = Int8Embedding(11, 8)
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(fresh(ids), expected)
    cast = twin.to(torch.bfloat16)(ids)
    assert cast.dtype == torch.bfloat16
    assert relative_error(cast, expected) < 0.01


def test_weight_rows_use_the_whole_code_range() -> None:
    weight = torch.cat([normal(4, 9) * torch.tensor([[1e-3], [1.0], [1e3], [0.0]]), torch.full((1, 9), 0.5)])
    codes, scale = quantize_rows(weight)
    assert codes.abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    assert codes.min() >= -127
    assert ((codes * scale - weight).abs() <= scale * 0.5001).all()


def test_memory_counts_each_weight_once_as_int8(kernel: str) -> None:
    layer = make("static", (256, 128))
    model = nn.Sequential(layer, nn.Sequential(layer, nn.Linear(8, 8, bias=False)))
    expected = 256 * 128 + 128 * (4 + 4) + 4 + 1 + 8 * 8 * 4
    assert memory_mib(model) * 2**20 == expected
    pack_all(model)
    assert "weight" not in dict(layer.named_parameters())
    assert memory_mib(model) * 2**20 == expected


def test_unknown_isa_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"HFQ_ISA is 'junk'; expected 'native' .* or 'portable'"):
        next(use_kernel("junk", monkeypatch))


CHILD = """
import sys, torch
from hfq.runtime.kernels.selection import select_kernel
layers, x = torch.load(sys.argv[1], weights_only=False)
torch.save([layer(x) for layer in layers], sys.argv[1])
print(select_kernel().name)
"""


@pytest.mark.parametrize("fused", ["nothing", "gelu", "relu", "residual", "codes"])
@pytest.mark.parametrize("large", [0, 3, 48], ids=["no large weights", "some", "all"])
@pytest.mark.parametrize("approach", SCHEMES)
def test_sums_beyond_16_bits_are_exact(kernel: str, approach: str, large: int, fused: str) -> None:
    layer, reader = make(approach, EVEN), make("static", (48, 16))
    weight = torch.randint(-60, 61, (48, 64), generator=torch.Generator().manual_seed(0))
    weight[:large] = weight[:large].sign() * 127
    layer.load_state_dict({**layer.state_dict(), "weight": weight.to(torch.int8)})
    x, residual = normal(80, 64) * 3, normal(80, 48)
    expected = reference(layer, x)
    if fused in ("gelu", "relu"):
        layer.post_op = cast(PostOp, fused)
        found, expected = layer(x), getattr(nn.functional, fused)(expected)
    elif fused == "residual":
        found, expected = layer(x, residual=residual), expected + residual
    elif fused == "codes" and approach == "static":
        layer.emit_codes_for(reader)
        found, expected = reader(layer(x)), reference(reader, expected)
    else:
        found = layer(x)
    assert relative_error(found, expected.float()) < (
        1e-2 if fused == "codes" else 1e-5
    )  # a code may round another way
    assert torch.equal(layer.state_dict()["weight"], weight)


@pytest.mark.parametrize("in_features", [64, 66, 68, 257, 258, 260, 510, 514, 516, 770, 1026])
def test_sums_are_exact_whichever_neighbours_are_added_first(kernel: str, in_features: int) -> None:
    layer = make("static", (in_features, 48), bias=False)
    weight = torch.zeros(48, in_features, dtype=torch.int8)
    weight[0, ::4] = weight[0, 1::4] = 127
    weight[1, 1:-1:4] = weight[1, 2::4] = 127
    layer.load_state_dict({**layer.state_dict(), "weight": weight})
    x = torch.full((64, in_features), 3.0)
    assert torch.allclose(layer(x).double(), reference(layer, x), rtol=1e-5)


@pytest.mark.parametrize("approach", SCHEMES)
def test_a_residual_may_be_broadcast(kernel: str, approach: str) -> None:
    layer, x = make(approach, EVEN), normal(2, 50, 64)
    for residual in (normal(2, 50, 48), normal(1, 50, 48), normal(48), normal(3, 1, 50, 48)):
        assert torch.allclose(layer(x, residual=residual), layer(x) + residual, atol=1e-5)
    assert layer(torch.empty(0, 3, 64), residual=torch.empty(0, 3, 48)).shape == (0, 3, 48)


@pytest.mark.parametrize("large", [0, 3, 48], ids=["no large weights", "some", "all"])
@pytest.mark.parametrize("approach", SCHEMES)
def test_a_sum_in_the_memory_of_the_residual_is_the_same(kernel: str, approach: str, large: int) -> None:
    layer = make(approach, EVEN)
    weight = torch.randint(-60, 61, (48, 64), generator=torch.Generator().manual_seed(0))
    weight[:large] = weight[:large].sign() * 127  # where sums of 16 bits may overflow
    layer.load_state_dict({**layer.state_dict(), "weight": weight.to(torch.int8)})
    x = normal(2, 50, 64) * 3
    for residual in (normal(2, 50, 48), normal(1, 50, 48), normal(2, 48, 50).mT, normal(2, 50, 48).bfloat16()):
        expected = layer(x) + residual
        with torch.no_grad():
            assert torch.allclose(layer(x, residual, in_place=True), expected, atol=1e-4)


@pytest.mark.parametrize("approach", ["static", "dynamic"])
def test_autocast_rounds_no_sum_of_codes(kernel: str, approach: str) -> None:
    layer, x = make(approach, EVEN), normal(80, 64)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("approach", SCHEMES)
def test_a_layer_can_be_traced(kernel: str, approach: str) -> None:
    layer, x, other = make(approach, EVEN), normal(80, 64), normal(3, 64)
    with torch.inference_mode():
        traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert torch.allclose(traced(other), layer(other), atol=1e-5)


@pytest.mark.parametrize("approach", SCHEMES)
def test_a_layer_can_be_compiled_and_exported_by_others(kernel: str, approach: str) -> None:
    layer, x = make(approach, EVEN), normal(80, 64) * 3
    expected = layer(x)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    exported = torch.export.export(layer, (x,), strict=False).module()
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    assert torch.allclose(exported(x), expected, atol=1e-5)


@pytest.mark.parametrize("isa", ["AVX2", "SSE41"])
def test_cpu_without_vnni_gets_another_kernel_and_the_same_answers(isa: str, tmp_path: Path) -> None:
    layers = [make(approach, EVEN) for approach in SCHEMES]
    for layer in (make(approach, EVEN) for approach in SCHEMES):
        layer.load_state_dict({**layer.state_dict(), "weight": torch.full((48, 64), 127, dtype=torch.int8)})
        layers.append(layer)  # with the first rows below, sums as large as they can be
    x = torch.cat([torch.full((2, 64), 3.0), normal(8, 64)])
    expected = [layer(x) for layer in layers]  # pickled packed, as on the CPU that made them
    torch.save((layers, x), tmp_path / "layers.pt")
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, tmp_path / "layers.pt"],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "HFQ_ISA": "native"},
        capture_output=True,
        text=True,
    )
    assert child.stdout in ("portable\n", "onednn-checked\n") and not child.stderr
    for found, answer in zip(torch.load(tmp_path / "layers.pt"), expected, strict=True):
        assert torch.allclose(found, answer, rtol=1e-5, atol=1e-5)
