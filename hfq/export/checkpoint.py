"""Write a quantized model as a transformers folder in the compressed-tensors layout, and prove what was written.

Format: https://github.com/neuralmagic/compressed-tensors and `../shared/DESIGN.md`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..common.errors import ExportError
from ..common.files import write_text
from ..common.memory import drop_file_pages
from ..common.names import INPUT_RANGES
from ..ptq.convert import large_floats
from ..ptq.scheme import Plan
from ..runtime.int8.conv import Int8Conv, Int8Conv1D
from ..runtime.loading.input_ranges import TENSORS, input_ranges
from ..runtime.loading.swap import tied_scales
from ..source.checkpoint import Checkpoint
from ..source.contents import SENTENCE_TRANSFORMERS, list_contents
from .local_paths import copy_config, without_local_paths
from .patterns import find_patterns

SHARD_SIZE = "5GB"
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "static": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
    "dynamic": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
}
APPROACHES = ("static", "dynamic", "weight-only")
FLOAT_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)


def export(
    model: nn.Module, plan: Plan, checkpoint: Checkpoint, *, folder: Path, library: str = "transformers"
) -> None:
    """Fill the new `folder` with weights, config, and what else belongs to the checkpoint (`hfq.contents`).

    `library`: which is to open it.

    Raises:
        ExportError: the disk is full or read-only, or a file does not read back bit for bit.
        SourceError: a file that belongs to the checkpoint lies elsewhere, by way of a link.
    """
    try:
        folder.mkdir(parents=True)
        widened = checkpoint.is_sentence_model or library == SENTENCE_TRANSFORMERS
        write_weights_and_config(model, plan, checkpoint.config, folder=folder, widened=widened)
        for name in list_contents(checkpoint.path, checkpoint.contents):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / name).exists():  # what is made anew: config.json, which code may name too
                copy_config(checkpoint.path / name, folder / name)
    except OSError as error:
        raise ExportError(
            f"{folder} cannot be written: {error.strerror or error}. Free space or choose another --output."
        ) from error


def write_weights_and_config(
    model: nn.Module, plan: Plan, config: Mapping[str, Any], *, folder: Path, widened: bool = False
) -> None:
    """Weights and config.json, of a checkpoint whose float version has `config`. `widened`: as of `quantization_config`.

    Raises:
        ExportError: the disk is full, or a file does not read back bit for bit.
        OSError: the folder cannot be written.
    """
    settings = quantization_config(model, plan, widened=widened)
    left_out: set[str] = set()
    if "dequantize" in settings:
        # What widens a weight when it is loaded takes a scale that is alone for a damaged one.
        left_out = {*tied_scales(model), *(f"{name}.{tensor}" for name in settings[INPUT_RANGES] for tensor in TENSORS)}
    _write_weights(_tensors(model, without=left_out), folder)
    kept = {key: value for key, value in without_local_paths(config).items() if key != "torch_dtype"}
    kept |= {"dtype": "float32", "quantization_config": settings}
    write_text(folder / "config.json", json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def quantization_config(model: nn.Module, plan: Plan, *, widened: bool = False) -> dict[str, Any]:
    """The `quantization_config` of config.json: groups of layers with one scheme, everything else under `ignore`.

    `widened`: where hfq is not imported, the model is one of float weights from when it is loaded, and not from its
    first forward. sentence-transformers passes by the hook of compressed-tensors that would see to it then. As it is
    quantized in its weights only, the groups say so, and what hfq needs of inputs stands beside them.
    """
    # Stock transformers opens an int8 Conv1D only so.
    unknown_in_stock = (Int8Conv1D, Int8Conv) if isinstance(model, PreTrainedModel) else Int8Conv1D
    widened = (
        widened or _runs_in_parts(model) or any(isinstance(module, unknown_in_stock) for module in model.modules())
    )
    ranges = input_ranges(model) if widened else {}
    approaches: dict[str, str] = dict.fromkeys(plan.embeddings, "weight-only")
    approaches |= {name: "weight-only" if name in ranges else s.approach for name, s in plan.layers.items()}
    ignored = [name for name, module in model.named_modules() if isinstance(module, FLOAT_LAYERS)]
    patterns = find_patterns(model, {**approaches, **dict.fromkeys(ignored, "ignore")})
    groups = [_group(approach, patterns[approach]) for approach in APPROACHES if approach in patterns]
    return ({"dequantize": True, INPUT_RANGES: ranges} if widened else {}) | {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": patterns.get("ignore", []),
    }


def _runs_in_parts(model: nn.Module) -> bool:
    """Whether users run a part of it before its own forward or without, such as the encoder that text is generated from.

    An encoder of such a family, by itself, may be opened as a part, with a decoder that is new.
    """
    if hasattr(model, "get_image_features"):
        return True
    if not isinstance(model, PreTrainedModel) or not getattr(model.config, "is_encoder_decoder", False):
        return False
    return model.can_generate() or not any(name.endswith("decoder") for name, _ in model.named_modules())


def _group(approach: str, targets: list[str]) -> dict[str, Any]:
    if approach == "weight-only":
        return {"format": "naive-quantized", "targets": targets, "weights": WEIGHTS}
    return {
        "format": "int-quantized",
        "targets": targets,
        "weights": WEIGHTS,
        "input_activations": ACTIVATIONS[approach],
    }


def _tensors(model: nn.Module, *, without: Iterable[str]) -> dict[str, Tensor]:
    """State by name, contiguous, each shared tensor once (transformers ties the others again when it loads)."""
    tied = {*getattr(model, "all_tied_weights_keys", {}), *without}
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    for name, _, _ in large_floats(model):
        if name in tensors and torch.equal(tensors[name], tensors[name].half()):  # `quantize_model` saw to it
            tensors[name] = tensors[name].half()
    memory = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    return {
        name: tensor.clone() if memory.count(tensor.untyped_storage().data_ptr()) > 1 else tensor
        for name, tensor in tensors.items()
    }


def _write_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
    )
    for filename, names in split.filename_to_tensors.items():
        path = folder / filename
        temporary = folder / f".{filename}.tmp"
        try:
            save_file({name: tensors[name] for name in names}, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk is one
            raise ExportError(f"{path} cannot be written: {error}. Free space or choose another --output.") from error
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # safetensors makes it private to its owner
        _check(temporary, tensors, names)
        temporary.replace(path)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check(path: Path, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(names):
                raise ExportError(f"{path} does not hold the tensors that were written to it. Check the disk.")
            for name in names:
                read = file.get_tensor(name)
                if not _bytes(read).equal(_bytes(tensors[name])):
                    raise ExportError(f"{path} does not read back what was written: {name} differs. Check the disk.")
                drop_file_pages(read)
    except SafetensorError as error:
        raise ExportError(f"{path} cannot be read back: {error}. Check the disk.") from error


def _bytes(tensor: Tensor) -> Tensor:
    """As they are on disk: NaN equals itself there, and -0.0 is not 0.0."""
    return tensor.reshape(-1).view(torch.uint8)
