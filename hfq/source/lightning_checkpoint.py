"""A Lightning `.ckpt` as a transformers folder. It is a pickle: only tensors and plain values are read from it.

What is pulled afterwards is the folder, so everything behind this knows safetensors only.
"""

import hashlib
import pickle
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from ..common.errors import SourceError

# Names under which modules keep, by `save_hyperparameters`, what they were made from.
ORIGINS = ("model_name_or_path", "pretrained_model_name_or_path", "model_name", "checkpoint", "model_id")


def as_folder(path: Path) -> Path:
    """A transformers folder with the weights of `path`, made once and kept in the cache of the Hub's client.

    config.json and the tokenizer are those beside the file, else those of the model it names in its hyperparameters.

    Raises:
        SourceError: it is no such file, holds more than tensors and plain values, or says not what it was made from.
    """
    found = _read(path)
    state = found.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SourceError(f"{path} has no state_dict of tensors. Expected a checkpoint that Lightning's Trainer saved.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    folder = Path(constants.HF_HOME) / "hfq" / digest / path.stem
    if not folder.exists():
        _write(_without_prefix(state), _origin(path, found), folder)
    return folder


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{path} holds more than tensors and plain values, and reading that could run code. Where you trust it, "
            "write the model inside with `module.model.save_pretrained(folder)`, then quantize the folder."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise SourceError(f"{path} cannot be read as a Lightning checkpoint: {error}") from error
    if not isinstance(found, Mapping):
        raise SourceError(f"{path} holds a {type(found).__name__}; expected a Lightning checkpoint.")
    return found


def _origin(path: Path, found: Mapping[str, Any]) -> str:
    """Folder or Hub id with config.json and tokenizer."""
    if (path.parent / "config.json").is_file():
        return str(path.parent)
    hyperparameters = found.get("hyper_parameters") or {}
    for name in ORIGINS:
        if isinstance(hyperparameters.get(name), str):
            return hyperparameters[name]
    raise SourceError(
        f"{path} does not say which model it was made from: there is no config.json beside it, and none of "
        f"{', '.join(ORIGINS)} among its hyperparameters. Put config.json and the tokenizer's files beside it."
    )


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the attribute that holds most of them, by their names in it: metrics and losses stay behind."""
    sizes: Counter[str] = Counter()
    for name, tensor in state.items():
        sizes[name.split(".")[0]] += tensor.numel()
    attribute = sizes.most_common(1)[0][0] if sizes else ""
    return {
        name.removeprefix(f"{attribute}."): tensor.contiguous().clone()
        for name, tensor in state.items()
        if name.startswith(f"{attribute}.")
    }


def _write(state: Mapping[str, Tensor], origin: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    try:
        config = AutoConfig.from_pretrained(origin)
        tokenizer = AutoTokenizer.from_pretrained(origin)
        architecture: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"The checkpoint was made from {origin}, which cannot be read: {error}") from error
    labels = _labels(state)
    if labels is not None and labels != config.num_labels:
        config.num_labels = labels
    config.architectures = [architecture.__name__]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            written = Path(work) / "folder"
            config.save_pretrained(written)
            tokenizer.save_pretrained(written)
            save_file(dict(state), written / "model.safetensors", metadata={"format": "pt"})
            written.rename(folder)
    except OSError as error:
        raise SourceError(f"{folder} cannot be written: {error.strerror or error}. Free space.") from error


def _labels(state: Mapping[str, Tensor]) -> int | None:
    """How many labels the last matrix of the head makes."""
    heads = [tensor for name, tensor in state.items() if name.startswith(("classifier", "score")) and tensor.dim() == 2]
    return len(heads[-1]) if heads else None
