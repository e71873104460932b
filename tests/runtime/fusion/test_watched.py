"""Whoever watches, changes, differentiates or records a fused model meets the modules that it was made of."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import families
from support.models import ROUNDING, int8_linears, logits, quantized, relative_error, tiny, token_batches
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_leaves

from hfq.ptq.convert import int8_conv, int8_linear
from hfq.ptq.scheme import LayerScheme
from hfq.runtime.fusion.fuse import finish_fusing, fuse
from hfq.runtime.fusion.planning import SEEN
from hfq.runtime.int8.packed import pack_all
from hfq.tuning.candidates import Candidate

BATCHES = token_batches(1)
FAMILIES = ["Bert", "DistilBert", "MPNet"]


def pair(family: str = "Bert", *, fused: Callable[[nn.Module], None] = fuse) -> tuple[Any, Any]:
    """The int8 model as it is, and fused."""
    model, twin = (quantized(tiny(family, num_hidden_layers=1), Candidate("static"), BATCHES) for _ in range(2))
    fused(twin)
    return model, twin


def at_first_forward(model: nn.Module) -> None:
    fuse(model, at_first_forward=True)


def seen_by_hooks(model: nn.Module) -> dict[str, list[Tensor]]:
    """All that modules inside the model are given and answer."""
    seen: dict[str, list[Tensor]] = {}

    def see(name: str, *call: Any) -> None:
        seen[name] = [leaf for leaf in tree_leaves(call[1:]) if isinstance(leaf, Tensor)]

    handles = [
        module.register_forward_hook(lambda *call, name=name: see(name, *call))
        for name, module in model.named_modules()
        if name
    ]
    logits(model, BATCHES)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("fused", [fuse, at_first_forward])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_see_what_modules_are_given_and_answer(family: str, fused: Callable[[nn.Module], None]) -> None:
    model, twin = pair(family, fused=fused)
    expected, found = seen_by_hooks(model), seen_by_hooks(twin)
    assert expected.keys() <= found.keys()
    for name, tensors in expected.items():
        assert [(x.shape, x.dtype) for x in found[name]] == [(x.shape, x.dtype) for x in tensors], name
        assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(found[name], tensors, strict=True)), name
    before = logits(twin, BATCHES)
    assert any(layer.post_op for layer in int8_linears(twin).values()), "and fused when nobody looks"
    assert relative_error(before, logits(model, BATCHES)) < ROUNDING


@contextmanager
def zeroing(layer: nn.Module) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, given, answer: 0 * answer)
    yield
    handle.remove()


@contextmanager
def called_once(layer: nn.Module) -> Iterator[None]:
    """A hook that goes when it was called."""

    def negate(module: nn.Module, given: Any, answer: Tensor) -> Tensor:
        handle.remove()
        return -answer

    handle = layer.register_forward_hook(negate)
    yield


@contextmanager
def given_in_place(layer: nn.Module) -> Iterator[None]:
    """What it is given is changed where it lies, after others were given it."""
    handle = layer.register_forward_pre_hook(lambda module, given: (given[0].neg_(),))
    yield
    handle.remove()


@contextmanager
def patched(layer: Any) -> Iterator[None]:
    forward = layer.forward
    layer.forward = lambda x: -forward(x)
    yield
    layer.forward = forward
    del layer.forward


@contextmanager
def masked(layer: Any) -> Iterator[None]:
    prune.l1_unstructured(layer, "weight", amount=0.5)
    yield


class Negated(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


@contextmanager
def parametrized(layer: Any) -> Iterator[None]:
    parametrize.register_parametrization(layer, "weight", Negated())
    yield


WAYS = [zeroing, called_once, given_in_place, patched, masked, parametrized]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_put_around_a_layer_does_what_it_does_without_fusions(way: Any) -> None:
    for name in int8_linears(pair()[0]):
        model, twin = pair()
        plain = logits(model, BATCHES)
        assert relative_error(logits(twin, BATCHES), plain) < ROUNDING
        answers = []
        for net in (model, twin):
            with way(net.get_submodule(name)):
                answers.append(logits(net, BATCHES))
        assert relative_error(answers[1], answers[0]) < ROUNDING, name
        assert not torch.equal(answers[0], plain), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_that_was_put_back_is_fused_again(family: str) -> None:
    """Patches, and hooks of accelerate, put it back where it was the class's."""
    _, model = pair(family)
    expected = logits(model, BATCHES)
    for layer in model.modules():
        if layer is not model:
            forward = layer.forward
            layer.forward = lambda *args, forward=forward, **named: forward(*args, **named)
            assert not model.forward.is_as_it_was()
            layer.forward = forward
            assert model.forward.is_as_it_was()
    assert torch.equal(logits(model, BATCHES), expected)


class Adapted(nn.Module):
    """A layer with a low-rank one beside it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.down, self.up = layer, nn.Linear(layer.in_features, 4), nn.Linear(4, layer.out_features)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.up(self.down(x))
        return y


@pytest.mark.parametrize("fused", [fuse, at_first_forward])
def test_layers_may_be_replaced_by_adapters_and_trained(fused: Any) -> None:
    model, twin = pair(fused=fused)
    for net in (model, twin):
        for name, layer in int8_linears(net).items():
            net.set_submodule(name, Adapted(layer))
    assert relative_error(logits(twin, BATCHES), logits(model, BATCHES)) < ROUNDING
    gradients = []
    for net in (model, twin):
        net(**BATCHES[0]).logits.square().sum().backward()
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained]))
    assert relative_error(gradients[1], gradients[0]) < ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_inputs_are_those_of_the_float_model(family: str) -> None:
    """As far as int8 is: they are of the same weights, at other points."""
    _, twin = pair(family)
    gradients = []
    for net in (tiny(family, num_hidden_layers=1), twin):
        x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        net(inputs_embeds=x).logits.sum().backward()
        gradients.append(x.grad)
    assert torch.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.9


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv1d(6, 4, 3, padding="same"), nn.Conv2d(6, 4, (3, 2), 2, 1)])
def test_a_layer_has_the_gradient_of_its_float_twin(layer: Any) -> None:
    shape = (5, 6) if isinstance(layer, nn.Linear) else (2, 6) + (9,) * len(layer.kernel_size)
    if isinstance(layer, nn.Linear):
        twin: nn.Module = int8_linear(layer, LayerScheme.static((-4.0, 4.0)))
    else:
        twin = int8_conv(layer, LayerScheme.static((-4.0, 4.0)))
    gradients = []
    for net in (layer, twin):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (3 * net(x)).sum().backward()
        gradients.append(x.grad)
    assert relative_error(gradients[1], gradients[0]) < ROUNDING


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
@pytest.mark.parametrize("approach", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_a_fused_model_can_be_traced_and_exported(family: str, approach: Any) -> None:
    model: Any = quantized(tiny(family, num_hidden_layers=1), Candidate(approach), BATCHES)
    fuse(model)
    pack_all(model)
    expected = logits(model, BATCHES)
    inputs = dict(BATCHES[0])
    with torch.no_grad():
        traced = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False, check_trace=False)
        assert relative_error(traced(**inputs)["logits"], expected) < ROUNDING
        exported = torch.export.export(model, (), inputs).module()
        assert relative_error(exported(**inputs).logits, expected) < ROUNDING
    assert torch.equal(logits(model, BATCHES), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
def test_a_model_that_looks_at_its_weights_can_be_traced() -> None:
    """As T5's layers look at the dtype of what comes next."""
    family = families.FAMILIES["t5 encoder"]
    inputs = family.inputs()
    int8: Any = quantized(family.make(), Candidate("static"), [inputs])
    fuse(int8)
    with torch.no_grad():
        expected = int8(**inputs).last_hidden_state
        traced = torch.jit.trace(int8, example_kwarg_inputs=inputs, strict=False, check_trace=False)
        assert relative_error(traced(**inputs)["last_hidden_state"], expected) < ROUNDING


def test_hooks_see_no_examples() -> None:
    """Looking for fusions calls the model, which is nothing to be counted."""
    model, _ = pair()
    seen: list[Any] = []
    handle = model.bert.encoder.layer[0].register_forward_hook(lambda *call: seen.append(call))
    fuse(model)
    finish_fusing(model)
    assert not seen
    logits(model, BATCHES)
    assert len(seen) == 1
    handle.remove()
    logits(model, BATCHES)
    assert any(layer.returns_codes for layer in int8_linears(model).values()), "it is fused once nobody looks"


def test_backward_hooks_see_no_examples() -> None:
    """Some of what is looked for is found by gradients."""
    _, twin = pair(fused=at_first_forward)
    seen: list[Any] = []
    twin.classifier.register_full_backward_hook(lambda *call: seen.append(call))
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    twin(inputs_embeds=x).logits.sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [fuse, at_first_forward])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_changed_in_place_is_computed_with(
    family: str, fused: Callable[[nn.Module], None], dtype: torch.dtype
) -> None:
    _, model = pair(family, fused=fused)
    model.to(dtype)
    before = logits(model, BATCHES)
    for i, layer in enumerate(int8_linears(model).values()):
        with torch.no_grad():
            (layer.bias if i % 2 else layer.bias.data).add_(0.1 * (-1) ** (i // 2))
            (layer.weight_scale.data if i % 2 else layer.weight_scale).mul_(1 + 0.1 * (-1) ** (i // 2))
    changed = logits(model, BATCHES)
    assert relative_error(changed, before) > 0.01
    assert torch.equal(changed, logits(copy.deepcopy(model), BATCHES))  # which packs anew
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(changed, logits(model, BATCHES))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_number_that_was_changed_is_computed_with(family: str) -> None:
    model, twin = pair(family)
    answers = []
    for net in (model, twin):
        before = [logits(net, BATCHES) for _ in range(SEEN + 2)][-1]
        for module in net.modules():
            for name in {"eps", "scaling"} & vars(module).keys():
                setattr(module, name, 0.5)
        answers.append(logits(net, BATCHES))
        assert relative_error(answers[-1], before) > 0.1
    assert relative_error(answers[1], answers[0]) < ROUNDING


@pytest.mark.parametrize("runs_before", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_is_given_another_input_scale_is_computed_with_it(family: str, runs_before: bool) -> None:
    models = pair(family)
    for name in int8_linears(models[0]):
        model, twin = copy.deepcopy(models)
        if runs_before:
            logits(twin, BATCHES)
        for changed in (model, twin):
            layer = int8_linears(changed)[name]
            layer.input_scale = nn.Parameter(layer.input_scale * 1.5, requires_grad=False)
        assert relative_error(logits(twin, BATCHES), logits(model, BATCHES)) < ROUNDING, name
