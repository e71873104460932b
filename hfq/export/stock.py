"""The last check of a folder that was written: stock transformers opens it, and it is the model in memory.

Where hfq is not installed nobody else would notice a weight that is another's, or a layer that was taken for float.
"""

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import CompressedTensorsConfig, PreTrainedModel, __version__
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from ..common.errors import ExportError, UnsupportedError
from ..ptq.inputs import Batch
from ..runtime.fusion.snapshot import drawing_alike, unchanged
from ..runtime.int8.conv import Int8Conv
from ..runtime.int8.embedding import Int8Embedding
from ..runtime.int8.linear import Int8Linear
from ..runtime.int8.recording import rounded_input
from ..runtime.loading.stock import stock_transformers

FAR = 0.5  # relative to the answer: more than a code here and there that rounds the other way


def check_openable(model: nn.Module) -> None:
    """Before work is done, or written: whether stock transformers opens int8 checkpoints of this architecture at all.

    Some it loads by splitting a weight in two, which transformers 5.23 cannot do with a weight that has a scale, even
    where a checkpoint has none to split (DINOv2, whose largest model alone has one).

    Raises:
        UnsupportedError: it opens none.
    """
    if not isinstance(model, PreTrainedModel):
        return
    quantizer = CompressedTensorsHfQuantizer(CompressedTensorsConfig(format="int-quantized"), pre_quantized=True)
    quantizer.use_fp8_kernel = False
    try:
        quantizer.update_weight_conversions(get_model_conversion_mapping(model), _Named(model))
    except ValueError as error:
        raise UnsupportedError(
            f"transformers {__version__} opens no compressed-tensors checkpoint of {type(model).__name__}: its loader "
            f"cannot split a quantized weight ({str(error)[:100]}…). Nothing was written. Upgrade transformers, if it can."
        ) from error


class _Named:
    """The names that a model's parameters have in int8."""

    def __init__(self, model: nn.Module) -> None:
        self.names = [name for name, _ in model.named_parameters()]

    def named_parameters(self) -> Iterator[tuple[str, None]]:
        for name in self.names:
            yield from ((name, None), (f"{name}_scale", None))


def check_written(model: PreTrainedModel, folder: Path, *, kind: type[PreTrainedModel], batch: Batch | None) -> None:
    """Open `folder`, a `kind` in float, without hfq's quantizer and compare it with `model`, tensors and answers.

    `batch`: what both are to answer, if anything.

    Raises:
        ExportError: it does not open, or it is another model than the one in memory.
        UnsupportedError: it changes its weights when it is new, as `model` may have done when it was.
    """
    try:
        with stock_transformers(), redirect_stderr(io.StringIO()):  # of progress bars
            stock = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
            widened = not hasattr(stock, "ct_decompress_hook")  # when it was loaded
            if not widened:
                stock.hf_quantizer.compressor.decompress_model(stock)
            difference = next(_differences(model, stock, widened=widened), None)
            if widened:
                _round_inputs(stock, model)
            if difference is None and batch is not None:
                difference = _other_answer(model, stock, batch)
    except UnsupportedError:
        raise
    except Exception as error:  # whatever transformers, compressed-tensors or the model's code raises
        raise ExportError(other_model(f"it cannot be opened ({type(error).__name__}: {error})")) from error
    if difference is not None:
        raise ExportError(other_model(difference))


def other_model(reason: str) -> str:
    """The message about a folder that stock transformers opens otherwise."""
    return (
        f"What was written would be another model where hfq is not installed: {reason}. It was removed. Keep that layer "
        "in float, and please report it."
    )


def _differences(model: nn.Module, stock: nn.Module, *, widened: bool) -> Iterator[str]:
    """What of `model` is otherwise in `stock`, which holds its weights in float; if `widened`, it quantizes no inputs."""
    kinds = Int8Linear | Int8Embedding | Int8Conv
    int8 = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    for name, module in int8.items():
        found: Any = stock.get_submodule(name)
        codes = module.codes if isinstance(module, Int8Conv) else module.weight.detach()
        if not _alike(found.weight, codes * module.weight_scale.detach().float()):
            yield f"{name} has another weight"
        if not widened and _activation(found) != getattr(module, "activation", "weight-only"):
            yield f"{name} runs with {_activation(found)} activations"
    state = stock.state_dict()
    for name, tensor in model.state_dict().items():
        owner, _, key = name.rpartition(".")
        in_int8 = owner in int8 and (key in ("weight", "weight_scale") or (widened and key.startswith("input_")))
        if not in_int8 and (name not in state or not _alike(state[name], tensor)):
            yield f"{name} is another"


def _round_inputs(stock: nn.Module, model: nn.Module) -> None:
    """Have layers of `stock`, which rounds no inputs, read them as the int8 layers of `model` do.

    Else what rounding does to a deep model would be taken for another model.
    """
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear | Int8Conv):
            stock.get_submodule(name).register_forward_pre_hook(partial(_rounded, module))


def _rounded(module: Int8Linear | Int8Conv, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(rounded_input(module, x) for x in args)


def _activation(module: nn.Module) -> str:
    scheme: Any = getattr(module, "quantization_scheme", None)
    if scheme is None:
        return "float"
    if scheme.input_activations is None:
        return "weight-only"
    return "dynamic" if scheme.input_activations.dynamic else "static"


def _alike(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(
        found.float(), expected.float(), rtol=1e-5, atol=1e-30, equal_nan=True
    )


@torch.inference_mode()
def _other_answer(model: nn.Module, stock: nn.Module, batch: Batch) -> str | None:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # or what dropout makes of it is compared
    try:
        with unchanged(model):
            ours = _answer(model, batch)
    finally:
        for module, mode in modes:
            module.training = mode
    with unchanged(stock):
        theirs = _answer(stock, batch)
    return answers_otherwise(ours, theirs)


def answers_otherwise(ours: Tensor, theirs: Tensor) -> str | None:
    """How far the answers of stock transformers are from the int8 model's; None where int8 may account for it."""
    difference = ((theirs - ours).norm() / ours.norm().clamp(min=1e-12)).item()
    return None if difference <= FAR or not ours.isfinite().all() else f"its answer differs by {difference:.1%}"


def _answer(model: nn.Module, batch: Batch) -> Tensor:
    with drawing_alike():
        output = model(**batch)
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()).float()
