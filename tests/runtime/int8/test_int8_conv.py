"""Int8 convolutions compute what their tensors say, on every kernel, and their state is the checkpoint's."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from hfq.common.errors import UnsupportedError
from hfq.ptq.convert import int8_conv, int8_linear
from hfq.ptq.layers import why_not
from hfq.ptq.scheme import LayerScheme, Rows
from hfq.runtime.int8.conv import ConvActivation, Int8Conv, Int8Conv1D
from hfq.runtime.kernels.convolution import runs_onednn
from hfq.runtime.kernels.selection import select_kernel

ACTIVATIONS: tuple[ConvActivation, ...] = ("static", "weight-only")
SCHEMES = {"static": LayerScheme.static((-2.0, 3.0)), "dynamic": LayerScheme("dynamic")}

CONVS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "patches": (lambda: nn.Conv2d(3, 16, 4, stride=4), (2, 3, 16, 16)),
    "padded": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 9, 7)),
    "padded more than the input is wide": (lambda: nn.Conv2d(4, 8, 3, padding=9), (1, 4, 5, 5)),
    "uneven everything": (
        lambda: nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 3), groups=2),
        (3, 6, 11, 13),
    ),
    "depthwise": (lambda: nn.Conv2d(12, 12, 7, padding=3, groups=12), (2, 12, 9, 9)),
    "depthwise, two a group": (lambda: nn.Conv2d(5, 10, 3, padding=1, groups=5, bias=False), (2, 5, 8, 8)),
    "odd channels": (lambda: nn.Conv2d(7, 5, 3, padding=1, bias=False), (2, 7, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(16, 24, 1), (1, 16, 5, 5)),
    "one of everything": (lambda: nn.Conv2d(1, 1, 1), (1, 1, 1, 1)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 8, 8)),
    "same, even kernel": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), (2, 4, 8, 7)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 8, 8)),
    "sums beyond 2^24": (lambda: nn.Conv2d(256, 4, 3, padding=1), (1, 256, 6, 6)),
    "1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 30)),
    "1d, strided": (lambda: nn.Conv1d(3, 7, 5, stride=2, padding=7, dilation=3), (2, 3, 40)),
    "1d, grouped": (lambda: nn.Conv1d(32, 32, 16, padding=8, groups=4), (1, 32, 21)),
    "1d, grouped, of a length at which oneDNN may fail": (lambda: nn.Conv1d(96, 96, 3, groups=2), (1, 96, 50)),
    "wide over few channels": (lambda: nn.Conv2d(16, 16, (2, 8)), (1, 16, 12, 40)),
    "1d, same, even kernel": (lambda: nn.Conv1d(5, 5, 2, padding="same", groups=5), (3, 5, 9)),
    "unbatched": (lambda: nn.Conv2d(3, 8, 3), (3, 6, 6)),
    "1d, unbatched": (lambda: nn.Conv1d(3, 8, 3), (3, 6)),
}


@pytest.fixture(params=["native", "portable"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernel of this CPU, then the one that runs on any."""
    monkeypatch.setenv("HFQ_ISA", request.param)
    select_kernel.cache_clear()
    yield request.param
    select_kernel.cache_clear()


def make(case: str, activation: ConvActivation = "static", *, seed: int = 0, zero_point: int = 90) -> Int8Conv:
    """A zero point far from 0: padding with code 0 would be seen."""
    torch.manual_seed(seed)
    return int8_conv(CONVS[case][0](), LayerScheme(activation, 0.02, zero_point))


def given(case: str) -> Tensor:
    return normal(*CONVS[case][1])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def reference(case: str, layer: Int8Conv, x: Tensor) -> Tensor:
    """Quantize in float32; dequantize, and let the float layer convolve in float64."""
    x = x.float()
    if layer.activation == "static":
        scale, zero_point = layer.input_scale.float(), layer.input_zero_point
        x = (((x / scale).round() + zero_point).clamp(-128, 127) - zero_point).double() * scale
    plain = CONVS[case][0]().double()
    plain.weight.data = layer.codes.double() * layer.weight_scale.double()
    if layer.bias is not None:
        plain.bias.data = layer.bias.double()
    return plain(x.double()).detach()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_layer_computes_what_its_tensors_say(kernel: str, case: str, activation: ConvActivation) -> None:
    layer, x = make(case, activation), given(case)
    y, expected = layer(x), reference(case, layer, x)
    assert y.shape == expected.shape
    assert y.dtype == torch.float32
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("zero_point", [-128, -1, 0, 127])
def test_padding_is_zero_whatever_codes_it(kernel: str, zero_point: int) -> None:
    layer = make("padded", zero_point=zero_point)
    x = torch.full((1, 8, 4, 4), 0.02 if zero_point < 0 else -0.02)
    assert torch.allclose(layer(x).double(), reference("padded", layer, x), rtol=1e-5, atol=1e-6)
    assert torch.allclose(layer(torch.zeros_like(x)), layer.bias.view(1, -1, 1, 1).expand(1, 16, 4, 4), atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", ["padded", "depthwise", "1d"])
def test_layer_is_close_to_the_float_layer(kernel: str, case: str, activation: ConvActivation) -> None:
    layer, x = make(case, activation, zero_point=0), given(case).clamp(-2.5, 2.5)
    torch.manual_seed(0)
    assert relative_error(layer(x), CONVS[case][0]()(x).detach()) < 0.02


def test_weight_only_is_the_dequantized_convolution() -> None:
    layer, x = make("padded", "weight-only"), given("padded")
    assert torch.equal(layer(x), F.conv2d(x, layer.codes * layer.weight_scale, layer.bias, padding=1))
    assert dict(layer.named_parameters())["weight"].dtype == torch.int8  # nothing wider stays in memory


@pytest.mark.parametrize("case", ["padded", "depthwise", "1d, strided", "sums beyond 2^24"])
def test_largest_sums_do_not_saturate(kernel: str, case: str) -> None:
    layer, x = make(case, zero_point=-128), torch.full(CONVS[case][1], 1e3)
    layer.load_state_dict({**layer.state_dict(), "weight": torch.full_like(layer.codes, 127)})
    assert torch.allclose(layer(x).double(), reference(case, layer, x), rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", ["padded", "same, even kernel", "1d"])
def test_empty_batch_gives_an_empty_answer(kernel: str, case: str, activation: ConvActivation) -> None:
    layer, x = make(case, activation), given(case)
    assert layer(x[:0]).shape == (0, *layer(x).shape[1:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_examples_do_not_change_each_other(kernel: str, activation: ConvActivation) -> None:
    layer, x = make("padded", activation), given("padded")
    assert torch.allclose(layer(x)[:1], layer(x[:1]), atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, 8, 9, 9),
        lambda x: x[..., ::2, 1:],
    ],
    ids=["channels last", "transposed", "expanded", "sliced"],
)
def test_layer_reads_views(kernel: str, activation: ConvActivation, view: Any) -> None:
    layer, x = make("padded", activation), view(normal(2, 8, 9, 9))
    assert torch.allclose(layer(x), layer(x.contiguous()), atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_answer_has_the_type_of_the_input(kernel: str, activation: ConvActivation, dtype: torch.dtype) -> None:
    layer, x = make("padded", activation), given("padded").to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert relative_error(y, reference("padded", layer, x)) < 0.01


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_wrong_input_is_an_error(kernel: str, activation: ConvActivation) -> None:
    layer = make("valid", activation)
    for x in (normal(2, 5, 8, 8), normal(2, 4, 2, 2), normal(8, 8)):
        with pytest.raises(RuntimeError):
            layer(x)


@pytest.mark.parametrize("case", CONVS)
def test_state_gives_back_the_exact_weight(kernel: str, case: str) -> None:
    layer = make(case)
    weight = torch.randint(-128, 128, layer.weight_shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    before = {**layer.state_dict(), "weight": weight}
    layer.load_state_dict(before)
    layer(given(case))
    after = layer.state_dict()
    assert list(after) == list(make(case).state_dict())
    assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert torch.equal(layer.codes, weight)
    layer.unpack()
    assert torch.equal(layer.codes, weight)


def test_packing_keeps_one_copy_of_the_weight(kernel: str) -> None:
    layer = make("padded")
    layer.pack()
    held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert ("weight" in held) == (not runs_onednn())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_models_that_ask_the_weight_for_its_dtype_see_floats(kernel: str, activation: ConvActivation) -> None:
    layer, x = make("padded", activation), given("padded")
    fresh = layer.weight
    layer(x.to(layer.weight.dtype))
    assert torch.equal(layer.weight, fresh)
    assert torch.equal(fresh, layer.codes * layer.weight_scale)


@pytest.mark.parametrize("packed", [False, True], ids=["fresh", "packed"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_copies_answer_alike(kernel: str, activation: ConvActivation, packed: bool) -> None:
    layer, x = make("uneven everything", activation), given("uneven everything")
    expected = copy.deepcopy(layer)(x)
    if packed:
        layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loaded_state_is_what_runs(kernel: str, activation: ConvActivation) -> None:
    layer, other, x = make("padded", activation), make("padded", activation, seed=1, zero_point=-90), given("padded")
    assert not torch.allclose(layer(x), other(x), atol=1e-2)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_casting_keeps_the_codes_and_casts_the_rest(kernel: str, activation: ConvActivation) -> None:
    layer, x = make("padded", activation), given("padded")
    expected, codes = layer(x), layer.codes
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.weight_scale.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.codes, codes)
    assert relative_error(layer(x), expected) < 0.02
    assert relative_error(layer(x.bfloat16()), expected) < 0.02


def test_weight_scale_is_the_largest_of_each_output_channel() -> None:
    layer = make("odd channels")
    assert layer.weight_scale.shape == (5, 1, 1, 1)
    assert layer.codes.abs().amax((1, 2, 3)).tolist() == [127] * 5
    assert make("1d").weight_scale.shape == (12, 1, 1)


def test_codes_may_come_from_the_caller() -> None:
    codes, scale = torch.full((16, 8 * 9), 3, dtype=torch.int8), torch.full((16, 1), 0.5)
    layer = int8_conv(CONVS["padded"][0](), LayerScheme("weight-only"), rows=Rows(codes, scale))
    assert torch.equal(layer.weight, torch.full((16, 8, 3, 3), 1.5))


class _Standardized(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("make_layer", "reason"),
    [
        (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "pads with 'reflect', not with zeros"),
        (lambda: nn.Conv3d(2, 2, 3), "is a Conv3d, not a plain Conv1d or Conv2d"),
        (lambda: nn.ConvTranspose2d(2, 2, 3), "is a ConvTranspose2d"),
        (lambda: _Standardized(2, 2, 3), "is a _Standardized"),
        (lambda: parametrizations.weight_norm(nn.Conv1d(2, 2, 3)), "is a ParametrizedConv1d"),
        (lambda: nn.utils.weight_norm(nn.Conv1d(2, 2, 3)), "computes its weight at every call"),
        (lambda: nn.Conv1d(2, 2, 3, dtype=torch.complex64), "has torch.complex64 weights"),
    ],
    ids=["reflect", "3d", "transposed", "subclass", "parametrized", "weight_norm", "complex"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Complex modules")
def test_layers_without_a_twin_say_why(make_layer: Any, reason: str) -> None:
    layer = make_layer()
    found = why_not(layer)
    assert found is not None
    assert found.startswith(reason)
    with pytest.raises(UnsupportedError, match=f"it {reason}.*Leave it float"):
        int8_conv(layer, LayerScheme("weight-only"))


def test_layers_with_a_twin_have_no_reason() -> None:
    assert all(why_not(make_layer()) is None for make_layer, _ in CONVS.values())


def conv1d(approach: str, *, seed: int = 0, features: tuple[int, int] = (7, 5)) -> tuple[Conv1D, Int8Conv1D]:
    torch.manual_seed(seed)
    layer = Conv1D(features[1], features[0])
    layer.weight.data.normal_()
    layer.bias.data.normal_()
    return layer, int8_linear(layer, SCHEMES[approach])


def conv1d_reference(layer: Int8Conv1D, x: Tensor) -> Tensor:
    if layer.activation == "static":
        scale, zero_point = layer.input_scale, layer.input_zero_point
    else:
        scale, zero_point = x.abs().amax(-1, keepdim=True) / 127.5, torch.zeros(1)
    codes = ((x / scale).round() + zero_point).clamp(-128, 127) - zero_point
    weight = layer.weight.double() * layer.weight_scale.double()
    return (codes.double() * scale) @ weight + layer.bias.double()


@pytest.mark.parametrize("features", [(7, 5), (64, 48), (8, 8), (1, 1)], ids=str)
@pytest.mark.parametrize("approach", SCHEMES)
def test_conv1d_computes_what_its_tensors_say(kernel: str, approach: str, features: tuple[int, int]) -> None:
    layer, int8 = conv1d(approach, features=features)
    x = normal(2, 3, features[0]).clamp(-2, 3)
    before = {name: tensor.clone() for name, tensor in int8.state_dict().items()}
    assert before["weight"].shape == layer.weight.shape
    assert before["weight_scale"].shape == (1, features[1])
    assert torch.allclose(int8(x).double(), conv1d_reference(int8, x), rtol=1e-5, atol=1e-5)
    assert relative_error(int8(x), layer(x).detach()) < 0.03
    after = int8.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(int8.weight, before["weight"])


@pytest.mark.parametrize("approach", SCHEMES)
def test_conv1d_survives_copies_and_loads(kernel: str, approach: str) -> None:
    (_, layer), (_, other), x = conv1d(approach), conv1d(approach, seed=1), normal(4, 7)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.unpack()
    assert torch.equal(layer(x), other(x))


CHILD = """
import sys, torch
from hfq.runtime.kernels.convolution import runs_onednn
layers, x = torch.load(sys.argv[1], weights_only=False)
torch.save([layer(x) for layer in layers], sys.argv[1])
print(runs_onednn())
"""


def test_cpu_without_vnni_gets_the_portable_path_and_the_same_answers(tmp_path: Path) -> None:
    layers = [make("padded"), make("padded", zero_point=-128)]
    layers[1].load_state_dict({**layers[1].state_dict(), "weight": torch.full((16, 8, 3, 3), 127, dtype=torch.int8)})
    x = torch.cat([torch.full((1, 8, 9, 7), 1e3), given("padded")])
    expected = [layer(x) for layer in layers]  # pickled packed, as on the CPU that made them
    torch.save((layers, x), tmp_path / "layers.pt")
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, tmp_path / "layers.pt"],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "HFQ_ISA": "native"},
        capture_output=True,
        text=True,
    )
    assert (child.stdout, child.stderr) == ("False\n", "")
    for found, answer in zip(torch.load(tmp_path / "layers.pt"), expected, strict=True):
        assert torch.allclose(found, answer, rtol=1e-5, atol=1e-4)
