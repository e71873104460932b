"""Give int8 modules their tensors straight from a checkpoint's files, before transformers' loader sees them.

The loader takes as long for a scale as for a weight, and an int8 model has twice as many tensors as a float one. Only
what is exactly as expected is read here. Anything else is left to the loader, which converts, renames or reports it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common.errors import SourceError
from ...common.safetensors_header import read_header
from ..int8.embedding import Int8Embedding
from ..int8.packed import PackedModule, frozen

Place = tuple[nn.Module, str]
_TYPES = {"I8": torch.int8, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def fill_modules(model: Any, files: Sequence[str]) -> Callable[[Sequence[range]], None]:
    """Fill the int8 modules of `model`, a transformers model, if `files` hold exactly their tensors.

    Returns: what ends the loading, given `checkpoint_files()`: until it is called, modules that were filled show the
    loader no state.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, PackedModule | Int8Embedding)}
    places = {
        f"{name}.{key}": (module, key)
        for name, module in modules.items()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }
    pattern = _pattern(modules)
    with torch._C.DisableTorchFunction():  # the loader's context for new tensors, on meta and slow: here are old ones
        tensors = _read(files, re.compile(pattern), places)
        if tensors is None or model.all_tied_weights_keys:
            return lambda mapped: None
        for name, (module, key) in places.items():
            parameter = module._parameters[key] = frozen(tensors[name])
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers draws it at random
    for module in modules.values():
        module._save_to_state_dict = lambda *_: None  # type: ignore[method-assign]
    model._keys_to_ignore_on_load_unexpected.add(pattern)

    def end(mapped: Sequence[range]) -> None:
        model._keys_to_ignore_on_load_unexpected.discard(pattern)
        for module in modules.values():
            del module._save_to_state_dict
        if not _may_stay_mapped(model, places, mapped):
            for name, (module, key) in places.items():
                module._parameters[key] = frozen(tensors[name].clone())

    return end


def _may_stay_mapped(model: nn.Module, places: Mapping[str, Place], mapped: Sequence[range]) -> bool:
    """Whether the loader left its tensors in mapped files: with `disable_mmap` it reads them into memory."""
    ours = {id(module._parameters[key]) for module, key in places.values()}
    theirs = [parameter.data_ptr() for parameter in model.parameters() if id(parameter) not in ours]
    return not mapped or not theirs or any(address in file for address in theirs for file in mapped)


def _pattern(modules: Mapping[str, nn.Module]) -> str:
    """Matches the names of the tensors of all `modules`: numbers are not told apart, so it stays short."""
    names = sorted({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in modules})
    return rf"^(?:{'|'.join(names)})\.[^.]+$"


def _read(files: Sequence[str], names: re.Pattern[str], places: Mapping[str, Place]) -> dict[str, Tensor] | None:
    """The tensors of `places`, in the file's memory; None if `files` hold others, or another one of `names`."""
    found: dict[str, Tensor] = {}
    for path in files:
        if not path.endswith(".safetensors"):
            return None
        try:
            tensors = dict(_tensors(path, names))
        except (SourceError, RuntimeError, KeyError):  # damaged, not aligned, or of another type
            return None
        if not found.keys().isdisjoint(tensors):
            return None
        found.update(tensors)
    if found.keys() != places.keys() or any(
        _form(found[name]) != _form(m._parameters[k]) for name, (m, k) in places.items()
    ):
        return None
    return found


def _tensors(path: str, names: re.Pattern[str]) -> Iterator[tuple[str, Tensor]]:
    """Those of `names`, in the memory of one mapped file: safetensors' own take three times as long to make.

    Each has a storage of its own, of its own length: what is copied, pickled or shared of a tensor is its storage.

    Raises:
        SourceError: it is not a whole safetensors file.
        RuntimeError: a tensor begins where its type may not.
        KeyError: one has a type that no int8 module has.
    """
    tensors = read_header(Path(path))
    size = Path(path).stat().st_size
    start = size - max((tensor.end for tensor in tensors.values()), default=0)
    file = torch.from_file(path, shared=False, size=size, dtype=torch.uint8).untyped_storage()
    for name in filter(names.match, tensors):
        tensor = tensors[name]
        content = torch.empty(0, dtype=_TYPES[tensor.dtype])
        if (start + tensor.begin) % content.itemsize:
            raise RuntimeError(f"{name} is not aligned")
        yield name, content.set_(file[start + tensor.begin : start + tensor.end]).view(tensor.shape)


def _form(tensor: Any) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
