"""Make the int8 model of a plan. Parameters that stay float are shared with the original, not copied, if they are small."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.errors import UnsupportedError
from ..runtime.int8.conv import Int8Conv, Int8Conv1D
from ..runtime.int8.embedding import Int8Embedding, factor_of
from ..runtime.int8.linear import Int8Linear
from ..runtime.int8.packed import PackedModule
from ..runtime.loading.swap import replacer
from .graph import Fold, fold_into
from .layers import CONVOLUTIONS, LARGE, MATMULS, linear, twin, why_not
from .scheme import LayerScheme, Plan, Rows, quantize_rows

CLOSE = 1e-3  # relative difference that float16's rounding makes, and what it cannot hold does not


def quantize_model(model: nn.Module, plan: Plan, folds: Sequence[Fold]) -> nn.Module:
    """A new module with the layers of `plan` in int8; `model` is left as it was."""
    quantized = twin(model) if plan.rotation is None else plan.rotation.applied(model)
    fold_into(quantized, folds, plan.smoothing)
    put = replacer(quantized)
    for name, scheme in plan.layers.items():
        layer = linear(quantized, name)
        put(layer, int8_layer(layer, scheme, rows=plan.weights.get(name), bias_shift=plan.bias_shifts.get(name)))
    tied: dict[int, Int8Embedding | Int8Linear] = {}  # by the float weight, the first that was made of it
    for name in plan.embeddings:
        layer = linear(quantized, name)
        first = tied.get(id(layer.weight))
        if first is None:
            int8 = tied[id(layer.weight)] = int8_embedding(layer)
        else:
            int8 = int8_embedding(layer, Rows(first.weight.detach(), first.weight_scale.detach()))
            int8.weight = first.weight
        put(layer, int8)
    _round_large_floats(quantized)
    return quantized.eval()


def large_floats(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Weights that stay float as their kind has no int8 form, and are stored as float16: name, owner, and name there.

    A convolution among few, a weight-normed one, positions that are no Embedding. What is a Linear or an Embedding
    stays as it is, because somebody wanted it so.
    """
    for prefix, module in model.named_modules():
        if not isinstance(module, (*MATMULS, nn.Embedding, PackedModule, Int8Embedding)):
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() > 1 and parameter.numel() >= LARGE:
                    yield f"{prefix}.{name}".lstrip("."), module, name


def _round_large_floats(model: nn.Module) -> None:
    """Let it compute with the numbers that are stored, unless one is out of float16's range."""
    rounded: dict[int, nn.Parameter] = {}
    for _, module, name in list(large_floats(model)):
        parameter = cast(nn.Parameter, module._parameters[name])
        if parameter.dtype == torch.float32 and id(parameter) not in rounded:
            near = parameter.detach().half().float()
            if (near - parameter).norm() <= CLOSE * parameter.norm():
                rounded[id(parameter)] = nn.Parameter(near, requires_grad=parameter.requires_grad)
        module._parameters[name] = rounded.get(id(parameter), parameter)


def int8_layer(
    layer: nn.Module, scheme: LayerScheme, *, rows: Rows | None = None, bias_shift: Tensor | None = None
) -> nn.Module:
    """The int8 twin of a Linear, Conv1D or convolution, with `rows` as its weight instead of the nearest codes."""
    if isinstance(layer, CONVOLUTIONS):
        return int8_conv(layer, scheme, rows=rows, bias_shift=bias_shift)
    return int8_linear(layer, scheme, rows=rows, bias_shift=bias_shift)


def int8_linear(
    layer: nn.Module, scheme: LayerScheme, *, rows: Rows | None = None, bias_shift: Tensor | None = None
) -> Int8Linear:
    """The int8 twin of a Linear; of a Conv1D, whose weight is stored `[in, out]`, a module that stores it so too."""
    if isinstance(layer, Conv1D):
        turned: Int8Linear = Int8Conv1D(layer.nx, layer.nf, bias=True, activation=scheme.approach)
        rows = rows or quantize_rows(layer.weight.t(), per_tensor=scheme.per_tensor)
        _fill(turned, layer, scheme, Rows(rows.codes.t().contiguous(), rows.scale.t().contiguous()), bias_shift)
        return turned
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{type(layer).__name__} has no int8 twin.")
    int8 = Int8Linear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None or bias_shift is not None,
        activation=scheme.approach,
    )
    _fill(int8, layer, scheme, rows or quantize_rows(layer.weight, per_tensor=scheme.per_tensor), bias_shift)
    return int8


def int8_conv(
    layer: nn.Conv1d | nn.Conv2d, scheme: LayerScheme, *, rows: Rows | None = None, bias_shift: Tensor | None = None
) -> Int8Conv:
    """The int8 twin of a convolution. There is no token to take a scale of: with "dynamic" it is weight-only.

    Raises:
        UnsupportedError: there is none; `why_not` says why.
    """
    reason = why_not(layer)
    if reason is not None:
        raise UnsupportedError(f"This layer has no int8 twin: it {reason}. Leave it float.")
    int8 = Int8Conv.like(layer, activation="static" if scheme.approach == "static" else "weight-only")
    codes, scale = rows or quantize_rows(layer.weight, per_tensor=scheme.per_tensor)
    _fill(int8, layer, scheme, Rows(codes.view(int8.weight_shape), scale.view_as(int8.weight_scale)), bias_shift)
    return int8


def int8_embedding(layer: nn.Module, rows: Rows | None = None) -> Int8Embedding | Int8Linear:
    """The int8 twin of an Embedding; of a Linear that shares an Embedding's weight, one that takes float inputs."""
    if isinstance(layer, nn.Linear):
        return int8_linear(layer, LayerScheme("weight-only"), rows=rows)
    if not isinstance(layer, nn.Embedding):
        raise TypeError(f"{type(layer).__name__} has no int8 twin.")
    factor = factor_of(layer)
    if factor is None:
        raise TypeError(f"{type(layer).__name__} is no plain Embedding, and has no int8 twin.")
    int8 = Int8Embedding(layer.num_embeddings, layer.embedding_dim, padding_idx=layer.padding_idx, factor=factor)
    int8.weight.data, int8.weight_scale.data = rows or quantize_rows(layer.weight)
    return int8


def _fill(int8: nn.Module, layer: nn.Module, scheme: LayerScheme, rows: Rows, bias_shift: Tensor | None) -> None:
    state = {"weight": rows.codes, "weight_scale": rows.scale}
    bias = cast(Tensor | None, layer.bias)
    shifts = [term.detach().float() for term in (bias, bias_shift) if term is not None]
    if shifts:
        state["bias"] = torch.stack(shifts).sum(0)
    if scheme.approach == "static":
        state["input_scale"] = torch.tensor([scheme.input_scale])
        state["input_zero_point"] = torch.tensor([scheme.input_zero_point], dtype=torch.int8)
    for name, value in state.items():
        setattr(int8, name, nn.Parameter(value, requires_grad=False))
