"""Make the int8 model of a plan. Parameters that stay float are shared with the original, not copied."""

from collections.abc import Sequence

from torch import nn

from ..runtime.modules import Int8Embedding, Int8Linear
from .graph import Fold, fold_into
from .layers import embedding, linear, twin
from .scheme import LinearScheme, Plan, quantize_rows


def quantize_model(model: nn.Module, plan: Plan, folds: Sequence[Fold]) -> nn.Module:
    """A new module with the layers of `plan` in int8; `model` is left as it was."""
    quantized = twin(model)
    fold_into(quantized, folds, plan.smoothing)
    for name, scheme in plan.linears.items():
        quantized.set_submodule(name, int8_linear(linear(quantized, name), scheme))
    for name in plan.embeddings:
        quantized.set_submodule(name, int8_embedding(embedding(quantized, name)))
    return quantized.eval()


def int8_linear(layer: nn.Linear, scheme: LinearScheme) -> Int8Linear:
    """The int8 twin of `layer`."""
    int8 = Int8Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, activation=scheme.approach)
    codes, scale = quantize_rows(layer.weight)
    int8.weight.data, int8.weight_scale.data = codes, scale
    if layer.bias is not None:
        int8.bias.data = layer.bias.detach().float()
    if scheme.approach == "static":
        int8.input_scale.fill_(scheme.input_scale)
        int8.input_zero_point.fill_(scheme.input_zero_point)
    return int8


def int8_embedding(layer: nn.Embedding) -> Int8Embedding:
    """The int8 twin of `layer`."""
    int8 = Int8Embedding(layer.num_embeddings, layer.embedding_dim, padding_idx=layer.padding_idx)
    int8.weight.data, int8.weight_scale.data = quantize_rows(layer.weight)
    return int8
