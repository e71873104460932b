"""Put int8 modules where a checkpoint's `quantization_config` says so, before its tensors are loaded."""

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
)
from compressed_tensors.utils.match import match_named_modules
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..int8.conv import Int8Conv, Int8Conv1D
from ..int8.embedding import Int8Embedding, factor_of
from ..int8.linear import Activation, Int8Linear


def swap_modules(model: nn.Module, config: QuantizationConfig) -> None:
    """Replace, in place, each layer that `config` names by its int8 twin, whose tensors are still to be loaded."""
    device = torch.get_default_device()
    put = replacer(model)
    with torch._C.DisableTorchFunction():  # which is how that one is set, and slow
        for scheme in config.config_groups.values():
            for _, module in list(match_named_modules(model, scheme.targets, config.ignore)):
                put(module, _int8_twin(module, _activation(scheme), device))


def replacer(model: nn.Module) -> Callable[[nn.Module, nn.Module], None]:
    """What puts a module in the place of one of `model`, under every name that it has there, and in lists."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    listed: dict[nn.Module, list[tuple[list[Any], int]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
        for value in vars(parent).values():  # Mask2Former's heads call their layers from a plain list
            for i, item in enumerate(value if isinstance(value, list) else ()):
                if isinstance(item, nn.Module):
                    listed.setdefault(item, []).append((value, i))

    def put(old: nn.Module, new: nn.Module) -> None:
        vars(new).update({name: value for name, value in _noted_on(old).items() if not hasattr(new, name)})
        for items, i in listed.get(old, ()):
            items[i] = new
        for parent, name in places[old]:
            parent._modules[name] = new
            if isinstance(new, Int8Embedding):  # peft takes ".weight" out of the name of what has a row for each token
                vars(parent)[f"{name}_scale"] = new
            if isinstance(parent, nn.TransformerEncoderLayer):  # its fast path reads weights past their modules
                parent.activation_relu_or_gelu = 0
                for encoder in encoders:  # and only that takes nested tensors
                    encoder.use_nested_tensor = False

    return put


def _noted_on(layer: nn.Module) -> dict[str, Any]:
    """What somebody's model keeps on a layer of torch's or transformers', to read it in its forward."""
    own = _own_names(type(layer))  # type: ignore[arg-type]
    return {
        name: value
        for name, value in vars(layer).items()
        if not (name in own or name.startswith("_") or callable(value))
    }


@cache
def _own_names(kind: type[nn.Module]) -> frozenset[str]:
    """Of a layer's settings; inspecting takes longer than a layer."""
    bases = (base for base in kind.__mro__ if issubclass(base, nn.Module))
    names = {name for base in bases for name in inspect.signature(base).parameters}
    return frozenset((*names, *getattr(kind, "__constants__", ()), "training"))


def swap_tied(model: nn.Module) -> dict[str, str]:
    """Replace, in place, each float layer whose weight is an int8 one's, as a head's is the embeddings', by its int8 twin.

    A checkpoint says nothing of a head that its own model had not. Returns: the scales that are tied then (`tied_scales`).
    """
    put, device = replacer(model), torch.get_default_device()
    made = []
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        layer, owner = (model.get_submodule(name.rpartition(".")[0]) for name in (target, source))
        is_weight = target.endswith(".weight") and source.endswith(".weight")
        if is_weight and type(layer) in (nn.Linear, nn.Embedding) and isinstance(owner, Int8Linear | Int8Embedding):
            with torch._C.DisableTorchFunction():
                put(layer, _int8_twin(layer, "weight-only", device))
            made.append(f"{target}_scale")
    tied = tied_scales(model)
    return {scale: tied[scale] for scale in made}


def begin_without_bias(model: nn.Module, heads: Iterable[str]) -> None:
    """Set the biases to zero that no file held, of layers that `swap_tied` made: transformers does so for Linear alone."""
    for scale in heads:
        bias = getattr(model.get_submodule(scale.rpartition(".")[0]), "bias", None)
        if bias is not None and not getattr(bias, "_is_hf_initialized", False):
            bias.data.zero_()


def tied_scales(model: nn.Module) -> dict[str, str]:
    """Of int8 modules whose weight is another's: the name of their scale, and that of the other's, which is equal."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    tensors = model.state_dict(keep_vars=True).keys() if tied else {}
    scales = {f"{target}_scale": f"{source}_scale" for target, source in tied.items()}
    return {target: source for target, source in scales.items() if target in tensors and source in tensors}


def is_int8(config: QuantizationConfig) -> bool:
    """Whether hfq's kernels can run every group of `config`."""
    return all(_runs(scheme) for scheme in config.config_groups.values())


def _activation(scheme: QuantizationScheme) -> Activation:
    if scheme.input_activations is None:
        return "weight-only"
    return "dynamic" if scheme.input_activations.dynamic else "static"


def _int8_twin(module: nn.Module, activation: Activation, device: torch.device) -> nn.Module:
    if isinstance(module, nn.Embedding):
        rows, size = module.num_embeddings, module.embedding_dim
        factor = factor_of(module)
        if factor is None:
            raise TypeError(f"{type(module).__name__} is no plain Embedding, and has no int8 twin.")
        return Int8Embedding(rows, size, padding_idx=module.padding_idx, factor=factor, device=device)
    if isinstance(module, Conv1D):
        return Int8Conv1D(*module.weight.shape, bias=True, activation=activation, device=device)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return Int8Conv.like(module, activation="static" if activation == "static" else "weight-only", device=device)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{type(module).__name__} has no int8 twin.")
    bias = module.bias is not None
    return Int8Linear(module.in_features, module.out_features, bias=bias, activation=activation, device=device)


def _runs(scheme: QuantizationScheme) -> bool:
    if not _is_int8_weight(scheme.weights) or scheme.output_activations is not None:
        return False
    inputs = scheme.input_activations
    if inputs is None:
        return scheme.format == "naive-quantized"  # others pack the codes into int32
    if inputs.num_bits != 8 or inputs.type != "int":
        return False
    if inputs.dynamic:
        return bool(inputs.symmetric) and inputs.strategy == QuantizationStrategy.TOKEN
    return not inputs.symmetric and inputs.strategy == QuantizationStrategy.TENSOR


def _is_int8_weight(weights: QuantizationArgs | None) -> bool:
    return (
        weights is not None
        and weights.num_bits == 8
        and weights.type == "int"
        and bool(weights.symmetric)
        and weights.strategy == QuantizationStrategy.CHANNEL
    )
