"""Layers that compute in float what int8 would, with scales that are learned; and back, from what they learned to a plan.

Scales get their gradient as in LSQ (Esser et al. 2020, arXiv:1902.08153): rounding passes it straight through, clipping does
not. Their logarithm is what is learned, as in TQT (Jain et al. 2019, arXiv:1903.08066), so that a step changes each by a
share of itself. Zero points stay where calibration put them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ..ptq.layers import twin, weight_rows
from ..ptq.scheme import LayerScheme, Plan, Rows, quantize_rows
from ..runtime.kernels.kernel import token_scale

SMALLEST = torch.finfo(torch.float32).eps  # scale


class FakeWeight(nn.Module):
    """A weight as its int8 codes have it: symmetric, one scale for each output channel.

    `turned`: the weight is stored `[in, out]`.
    """

    def __init__(self, rows: Rows, *, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.log_scale = nn.Parameter(rows.scale.clamp(min=SMALLEST).log())

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.t() if self.turned else weight
        found = rounded(rows.flatten(1), self.log_scale.exp(), (-127, 127)).view_as(rows)
        return found.t() if self.turned else found

    def rows(self, weight: Tensor) -> Rows:
        """The codes of a weight with output channels first."""
        scale = self.log_scale.detach().exp()
        codes = (weight.flatten(1) / scale).round().clamp(-127, 127).to(torch.int8)
        return Rows(codes.view(weight.shape), scale)


class FakeInput(nn.Module):
    """An input as its int8 codes have it: with one learned scale, or with one for each token of what comes.

    `observes`: the first forwards of training that make its range, where calibration did not.
    """

    def __init__(self, scheme: LayerScheme, *, observes: int = 0) -> None:
        super().__init__()
        self.scheme = scheme
        self.observes = observes
        self.range = (0.0, 0.0)
        if scheme.approach == "static":
            self.log_scale = nn.Parameter(torch.tensor(scheme.input_scale).clamp(min=SMALLEST).log())

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme.approach == "static":
            if self.observes and self.training:
                self._observe(x.detach())
            zero_point = self.scheme.input_zero_point
            return rounded(x, self.log_scale.exp(), (-128 - zero_point, 127 - zero_point))
        return rounded(x, token_scale(x.detach().float()), (-128, 127))

    def _observe(self, x: Tensor) -> None:
        self.observes -= 1
        self.range = (min(self.range[0], x.amin().item()), max(self.range[1], x.amax().item()))
        self.scheme = LayerScheme.static(self.range)
        self.log_scale.data.fill_(self.scheme.input_scale).log_()

    def learned(self) -> LayerScheme:
        """How the layer's input becomes codes now."""
        if self.scheme.approach != "static":
            return self.scheme
        return LayerScheme("static", self.log_scale.detach().exp().item(), self.scheme.input_zero_point)


def rounded(x: Tensor, scale: Tensor, codes: tuple[int, int]) -> Tensor:
    """`x` rounded to multiples of `scale` between two codes. Its gradient, and the scale's, are LSQ's."""
    inside = (x / scale).clamp(*codes)
    return (inside + (inside.round() - inside).detach()) * scale


def fake_quantize(model: nn.Module, plan: Plan, *, observes: int = 0) -> None:
    """Have `model` compute in float what `plan` would make of it, in place. Embeddings are rounded once and for all.

    `observes`: as of `FakeInput`.
    """
    for name in plan.embeddings:
        weight = model.get_submodule(name)._parameters["weight"]
        assert weight is not None
        codes, scale = quantize_rows(weight)
        weight.data = (codes * scale).to(weight.dtype)
    for name, scheme in plan.layers.items():
        layer = model.get_submodule(name)
        rows = plan.weights.get(name) or quantize_rows(weight_rows(layer))
        parametrize.register_parametrization(layer, "weight", FakeWeight(rows, turned=isinstance(layer, Conv1D)))
        if scheme.approach != "weight-only":
            layer.fake_input = FakeInput(scheme, observes=observes)
            layer.register_forward_pre_hook(_round_input, with_kwargs=True)


def train_what_is_rounded(model: nn.Module, plan: Plan) -> None:
    """Leave to training the weights and biases of `plan`, their scales, and the parameters of norms."""
    model.requires_grad_(False)
    for name in plan.layers:
        model.get_submodule(name).requires_grad_(True)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.requires_grad_(True)


def learned(student: nn.Module, floats: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    """What `student`, of the model `floats` and a plan, is now: a float model with what was trained, and its plan.

    Its tensors are the student's own: further training changes them. Embeddings are those of `floats`.
    """
    model = twin(floats)
    for name, parameter in student.named_parameters():
        layer, _, tensor = name.replace(".parametrizations.weight.original", ".weight").rpartition(".")
        if tensor != "log_scale" and not (tensor == "weight" and layer in plan.embeddings):
            setattr(model.get_submodule(layer), tensor, nn.Parameter(parameter.detach(), requires_grad=False))
    schemes: dict[str, LayerScheme] = {}
    weights: dict[str, Rows] = {}
    for name, scheme in plan.layers.items():
        layer_: Any = student.get_submodule(name)
        weights[name] = layer_.parametrizations.weight[0].rows(weight_rows(model.get_submodule(name)))
        schemes[name] = layer_.fake_input.learned() if scheme.approach != "weight-only" else scheme
    return model, Plan(schemes, plan.embeddings, weights=weights)


def trained(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights that are trained, and the scales."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = [parameter for name, parameter in named if name.endswith("log_scale")]
    return [parameter for name, parameter in named if not name.endswith("log_scale")], scales


def _round_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    fake: Any = layer.fake_input
    if args:
        return (fake(args[0]), *args[1:]), kwargs
    first, *_ = kwargs
    return args, {**kwargs, first: fake(kwargs[first])}
