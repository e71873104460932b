"""transformers' compressed-tensors quantizer, with int8 kernels where they apply.

`import hfq` puts it under the name transformers already knows, so `from_pretrained` stays the entry point. A
checkpoint it cannot run in int8 (another bit width, another device, `dequantize=True`) goes to the parent
untouched.
"""

from typing import Any

import torch
from torch import nn
from transformers import CompressedTensorsConfig, TrainerCallback
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from ...common.errors import UnsupportedError
from ...common.memory import checkpoint_files
from ...common.names import INPUT_RANGES
from ..compiling.compile import use_kept
from ..fusion.fuse import fuse
from ..int8.embedding import Int8Embedding
from ..int8.packed import PackedModule, note_files
from .filling import fill_modules
from .fusion_records import KeptRecords
from .input_ranges import take_ranges
from .stock import is_stock
from .swap import begin_without_bias, is_int8, swap_modules, swap_tied, tied_scales
from .vocabulary import keep_vocabulary

WIDENED = "hfq_widened_in_stock"  # an attribute of settings


class Int8HfQuantizer(CompressedTensorsHfQuantizer):
    """Keeps int8 weights int8 on a CPU; in every other case it is its parent."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """transformers asks once with the user's `device_map`, and if that is "auto" again with what it became.

        By then modules are what they are, so the first decision stands.

        Raises:
            UnsupportedError: a part of an int8 model is to lie on disk.
        """
        super().validate_environment(*args, **kwargs)
        device_map, settings = kwargs.get("device_map"), self.quantization_config
        is_kept = settings.is_quantization_compressed and is_int8(self.compressor.quantization_config)
        on_disk = isinstance(device_map, dict) and "disk" in map(str, device_map.values())
        if is_kept and on_disk and getattr(self, "runs_int8", not settings.dequantize):
            raise UnsupportedError(
                "The device_map puts a part of this int8 model on disk, from where int8 weights cannot run. Pass "
                'device_map="cpu": there they are a quarter of the float weights, and stay in their file until they '
                "are used. With max_memory, allow the CPU all of the model."
            )
        if not hasattr(self, "runs_int8"):
            self.runs_int8 = is_kept and _on_cpu(device_map) and not settings.dequantize
            settings.dequantize = settings.dequantize or (not self.runs_int8 and self._is_widened_in_stock)

    @property
    def _is_widened_in_stock(self) -> bool:
        return getattr(self.quantization_config, WIDENED, False)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.runs_int8:
            super()._process_model_before_weight_loading(model, **kwargs)
            return
        # The tensors are loaded as they are, into modules that hold them as they are.
        self.serialized_names: dict[str, list[str]] = {}
        swap_modules(model, self.compressor.quantization_config)
        self.heads = swap_tied(model)
        model.all_tied_weights_keys |= tied_scales(model) if self._is_widened_in_stock else self.heads
        self.end_filling = fill_modules(model, kwargs.get("checkpoint_files") or [])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.runs_int8:
            mapped = checkpoint_files()
            self.end_filling(mapped)
            begin_without_bias(model, self.heads)
            del self.end_filling, self.heads  # the model keeps its quantizer, and copies and pickles it
            model.requires_grad_(False)
            note_files(model, mapped)
            if self._is_widened_in_stock:
                ranges = getattr(self.quantization_config, INPUT_RANGES)
                take_ranges(model, ranges)
                # to_dict() leaves it out, and stock could not open the copy
                settings = {"dequantize": True, INPUT_RANGES: ranges}
                model.config.quantization_config = {**settings, **self.quantization_config.to_dict()}
            keep_vocabulary(model)
            fuse(model, at_first_forward=True, then=use_kept, records=KeptRecords())
        return super()._process_model_after_weight_loading(model, **kwargs)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        if not self.runs_int8:  # with no name of its own to add, the parent still goes over every parameter
            super().update_parallel_plan(model, plan)

    def get_load_operations(self) -> dict:
        return {} if self.runs_int8 else super().get_load_operations()


class RefuseTraining(TrainerCallback):
    """Says at the start of a training that nothing of the model can be trained. Trainers also evaluate and predict."""

    def on_train_begin(self, *_: Any, model: nn.Module | None = None, **__: Any) -> None:
        """Have a look at `model`.

        Raises:
            UnsupportedError: it has int8 layers, and no parameter that requires a gradient.
        """
        if model is None or any(parameter.requires_grad for parameter in model.parameters()):
            return
        if any(isinstance(module, PackedModule | Int8Embedding) for module in model.modules()):
            raise UnsupportedError(
                "An int8 model is not trained: its weights are frozen. Train the float checkpoint and quantize the "
                "result, or load this one in float, with quantization_config=CompressedTensorsConfig(dequantize=True)."
            )


def read_settings(settings: dict[str, Any]) -> CompressedTensorsConfig:
    """The `quantization_config` of a checkpoint's file.

    `"dequantize": true` is for stock transformers there, which could not run the model otherwise. Only where the user
    asks for it too is the model a float one here.
    """
    found = CompressedTensorsConfig.from_dict(settings)
    if found.dequantize and not is_stock():
        setattr(found, WIDENED, True)
        setattr(found, INPUT_RANGES, settings.get(INPUT_RANGES) or {})
        found.dequantize = False
    return found


def make_quantizer(config: Any, **kwargs: Any) -> CompressedTensorsHfQuantizer:
    """What transformers opens a compressed-tensors checkpoint with."""
    return (CompressedTensorsHfQuantizer if is_stock() else Int8HfQuantizer)(config, **kwargs)


def _on_cpu(device_map: Any) -> bool:
    """Whether everything is on the CPU, or will be, as transformers chooses devices and there is no other."""
    if isinstance(device_map, str) and device_map in _CHOSEN:
        return not torch.accelerator.is_available()
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    return all(device is None or str(device) == "cpu" for device in devices)


_CHOSEN = ("auto", "balanced", "balanced_low_0", "sequential")
