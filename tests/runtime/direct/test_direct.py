"""Models of int8 convolutions compute as steps what they compute module by module."""

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import relative_error
from torch import Tensor, nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileViTConfig,
    MobileViTForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import hfq
from hfq.ptq.convert import int8_conv
from hfq.ptq.scheme import LayerScheme
from hfq.runtime.direct.forward import DirectForward
from hfq.runtime.direct.program import program_of
from hfq.runtime.fusion.fuse import fuse
from hfq.runtime.kernels.selection import select_kernel

RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1], "num_labels": 5}


def bottlenecks() -> PreTrainedModel:
    return ResNetForImageClassification(ResNetConfig(**RESNET))


def basic() -> PreTrainedModel:
    return ResNetForImageClassification(ResNetConfig(**RESNET, layer_type="basic", hidden_act="silu"))


def depthwise() -> PreTrainedModel:
    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, image_size=32, num_labels=5))


def with_attention() -> PreTrainedModel:
    sizes = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32], "image_size": 32}
    return MobileViTForImageClassification(MobileViTConfig(**sizes, num_attention_heads=2, num_labels=5))


@pytest.fixture(params=["native", "portable"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernel of this CPU, then the one that runs on any."""
    monkeypatch.setenv("HFQ_ISA", request.param)
    select_kernel.cache_clear()
    yield request.param
    select_kernel.cache_clear()


def quantized(make: Any) -> PreTrainedModel:
    """With int8 convolutions, and norms that do something."""
    torch.manual_seed(0)
    model = make().eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            for tensor, (low, high) in zip(
                (module.weight, module.bias, module.running_mean, module.running_var),
                ((-1.5, 1.5), (-0.3, 0.3), (-0.3, 0.3), (0.5, 2.0)),
                strict=True,
            ):
                nn.init.uniform_(tensor, low, high)
        elif type(module) is nn.Conv2d:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, int8_conv(module, LayerScheme.static((-2.0, 3.0))))
    return model.eval()


def images(batch: int = 3, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [bottlenecks, basic, depthwise, with_attention])
def test_steps_compute_what_the_modules_do(kernel: str, make: Any) -> None:
    model = quantized(make)
    with torch.inference_mode():
        expected = [model(pixel_values=images(batch)).logits for batch in (1, 3)]
        fuse(model)
        found = [model(pixel_values=images(batch)).logits for batch in (1, 3)]
    assert isinstance(model.forward.compiled, DirectForward)
    assert list(model.forward.compiled._found) == [(3, 32, 32)]
    assert all(model.forward.compiled._found.values())
    for output, of_modules in zip(found, expected, strict=True):
        assert relative_error(output, of_modules) < 0.02  # a code at an edge may round another way


@pytest.fixture(scope="module")
def resnet() -> PreTrainedModel:
    model = quantized(bottlenecks)
    fuse(model)
    return model


def test_other_inputs_are_computed_too(resnet: PreTrainedModel) -> None:
    with torch.inference_mode():
        expected = resnet(images()).logits
        other_size = resnet(images(2, 48)).logits
        outputs = resnet(pixel_values=images(), labels=torch.tensor([0, 1, 2]), output_hidden_states=True)
    assert other_size.shape == (2, 5)
    assert relative_error(outputs.logits, expected) < 0.02
    assert len(outputs.hidden_states) == 3
    assert outputs.loss > 0
    with pytest.raises(ValueError, match="channel dimension"):
        resnet(torch.randn(1, 4, 32, 32))


def test_images_do_not_change_each_other(resnet: PreTrainedModel) -> None:
    with torch.inference_mode():
        together = resnet(images(5)).logits
        alone = torch.cat([resnet(image[None]).logits for image in images(5)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_no_activation_is_kept_while_steps_are_found_out() -> None:
    alive: list[int] = []

    def forward(x: Tensor) -> Tensor:
        made = []
        for _ in range(8):
            x = torch.relu(x.mul(2).add_(1))
            made.append(weakref.ref(x))
        alive.append(sum(tensor() is not None for tensor in made))
        return x

    assert len(program_of(nn.Identity(), forward, (3, 4, 4)).calls) == 24
    assert alive == [1, 1]


def test_hooks_see_what_modules_return(resnet: PreTrainedModel) -> None:
    seen: list[Tensor] = []
    handle = resnet.resnet.encoder.register_forward_hook(lambda *_: seen.append(_[2].last_hidden_state))
    try:
        resnet(images())
    finally:
        handle.remove()
    assert seen[0].shape == (3, 32, 4, 4)


def test_gradients_reach_the_image(resnet: PreTrainedModel) -> None:
    x = images().requires_grad_()
    resnet(x).logits.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_new_weights_are_what_runs(resnet: PreTrainedModel) -> None:
    model, other = copy.deepcopy(resnet), quantized(bottlenecks)
    norm = other.resnet.embedder.embedder.normalization
    nn.init.uniform_(norm.running_mean, 1.0, 2.0)
    with torch.inference_mode():
        before = model(images()).logits
        model.load_state_dict(other.state_dict())
        assert relative_error(model(images()).logits, other(images()).logits) < 0.02
    assert relative_error(before, other(images()).logits) > 0.1


def test_compiling_says_that_nothing_is_gained(resnet: PreTrainedModel) -> None:
    with pytest.warns(UserWarning, match="leaves ResNetForImageClassification as it is: its convolutions run as steps"):
        assert hfq.compile(resnet) is resnet
