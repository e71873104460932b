"""transformers' compressed-tensors quantizer, with int8 kernels where they apply.

`import hfq` puts it under the name transformers already knows, so `from_pretrained` stays the entry point. A
checkpoint it cannot run in int8 (another bit width, another device, `dequantize=True`) goes to the parent
untouched.
"""

from typing import Any

from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from .filling import fill_modules
from .fusion import fuse
from .memory import checkpoint_files
from .modules import note_files
from .swap import is_int8, must_be_widened, swap_modules


class Int8HfQuantizer(CompressedTensorsHfQuantizer):
    """Keeps int8 weights int8 on a CPU; in every other case it is its parent."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        super().validate_environment(*args, **kwargs)
        self.runs_int8 = (
            _on_cpu(kwargs.get("device_map"))
            and (not self.quantization_config.dequantize or must_be_widened(self.compressor.quantization_config))
            and self.quantization_config.is_quantization_compressed
            and is_int8(self.compressor.quantization_config)
        )
        if self.runs_int8:
            # The tensors are loaded as they are, into modules that hold them as they are.
            self.serialized_names: dict[str, list[str]] = {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.runs_int8:
            super()._process_model_before_weight_loading(model, **kwargs)
            return
        swap_modules(model, self.compressor.quantization_config)
        self.end_filling = fill_modules(model, kwargs.get("checkpoint_files") or [])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.runs_int8:
            mapped = checkpoint_files()
            self.end_filling(mapped)
            del self.end_filling  # the model keeps its quantizer, and copies and pickles it
            model.requires_grad_(False)
            note_files(model, mapped)
            fuse(model, at_first_forward=True)
            if self.quantization_config.dequantize:  # to_dict() leaves it out, and stock could not open the copy
                settings = {**self.quantization_config.to_dict(), "dequantize": True}
                model.config.quantization_config = settings
        return super()._process_model_after_weight_loading(model, **kwargs)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        if not self.runs_int8:  # with no name of its own to add, the parent still goes over every parameter
            super().update_parallel_plan(model, plan)

    def get_load_operations(self) -> dict:
        return {} if self.runs_int8 else super().get_load_operations()

    @property
    def is_trainable(self) -> bool:
        return not self.runs_int8 and super().is_trainable


def _on_cpu(device_map: Any) -> bool:
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    return all(device is None or str(device) == "cpu" for device in devices)
