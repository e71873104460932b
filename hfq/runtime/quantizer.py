"""transformers' compressed-tensors quantizer, with int8 kernels where they apply.

`import hfq` puts it under the name transformers already knows, so `from_pretrained` stays the entry point. A
checkpoint it cannot run in int8 (another bit width, another device, `dequantize=True`) goes to the parent
untouched.
"""

from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.utils.match import match_named_modules
from torch import nn
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from .fusion import fuse
from .modules import Activation, Int8Embedding, Int8Linear, leave_file, pack_all


class Int8HfQuantizer(CompressedTensorsHfQuantizer):
    """Keeps int8 weights int8 on a CPU; in every other case it is its parent."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        super().validate_environment(*args, **kwargs)
        self.runs_int8 = (
            _on_cpu(kwargs.get("device_map"))
            and not self.quantization_config.dequantize
            and self.quantization_config.is_quantization_compressed
            and all(map(_is_int8, self._groups().values()))
        )
        if self.runs_int8:
            # The tensors are loaded as they are, into modules that hold them as they are.
            self.serialized_names: dict[str, list[str]] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.runs_int8:
            super()._process_model_before_weight_loading(model, **kwargs)
            return
        ignore = self.compressor.quantization_config.ignore
        for scheme in self._groups().values():
            for name, module in list(match_named_modules(model, scheme.targets, ignore)):
                model.set_submodule(name, _int8_twin(module, scheme))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.runs_int8:
            model.requires_grad_(False)
            pack_all(model)
            leave_file(model)
            fuse(model)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _groups(self) -> dict[str, QuantizationScheme]:
        return self.compressor.quantization_config.config_groups

    def get_load_operations(self) -> dict:
        return {} if self.runs_int8 else super().get_load_operations()

    @property
    def is_trainable(self) -> bool:
        return not self.runs_int8 and super().is_trainable


def _int8_twin(module: nn.Linear | nn.Embedding, scheme: QuantizationScheme) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return Int8Embedding(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx)
    activation: Activation = "dynamic" if scheme.input_activations.dynamic else "static"
    return Int8Linear(module.in_features, module.out_features, bias=module.bias is not None, activation=activation)


def _on_cpu(device_map: Any) -> bool:
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    return all(device is None or str(device) == "cpu" for device in devices)


def _is_int8(scheme: QuantizationScheme) -> bool:
    if not _is_int8_weight(scheme.weights) or scheme.output_activations is not None:
        return False
    inputs = scheme.input_activations
    if inputs is None:
        return scheme.targets == ["Embedding"]
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
