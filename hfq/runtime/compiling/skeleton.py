"""A model apart from its tensors: everything else that its forward depends on, as bytes, the same in every process.

What is compiled from these bytes alone fits every model that has them, whatever its weights. So they are the key under
which a compiled graph is kept, and nothing that is left out of them can make a kept graph wrong.
"""

import io
import logging
import pickle
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..int8.known_forward import CAPTURING, FUSED, KNOWN, FusedForward, KnownForward
from ..int8.linear import Int8Linear, PackedLinear
from ..int8.shared_matmul import SharedMatmul
from .blocked import BlockedMatmul, in_blocks

# The versions of these are known, so the name of a class stands for its code.
_PACKAGES = {"torch", "transformers", "hfq", *sys.stdlib_module_names} - {"__main__"}
_log = logging.getLogger(__name__)
# Where a model came from, how it was loaded, and what forwards with labels or for hidden states, which no graph
# computes, leave behind: no forward that a graph computes reads it.
_UNREAD = (
    "_name_or_path", "name_or_path", "_commit_hash", "_in_file_at", "hf_quantizer", "quantization_config",
    "problem_type", "_output_capturing_hooks_installed", "resize_token_embeddings",
)  # fmt: skip
_HOOKS = "_forward_hooks"
_PARAMETRIZED = "parametrizations"  # asked for as an attribute, an int8 module lets go of what is packed
_LOADING = "state_dict"  # in the names of hooks for it, and nothing is loaded
_NEW = vars(nn.Module())


def take_apart(model: nn.Module, *, blocks: bool = False) -> tuple[bytes, list[Tensor]] | None:
    """The bytes, and the tensors in the order in which `put_together` wants them.

    `blocks`: let matmuls be compiled where they can be, in place of calls of oneDNN (`hfq.runtime.compiling.blocked`).
    None if the model is made of something whose code may be another one tomorrow, such as a class of the user's own,
    or of what cannot be copied into another process.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, model, blocks=blocks)
    try:
        pickler.dump(model)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        _log.info("Not compiled ahead: %s", error)
        return None
    skeleton = pickle.dumps(list(pickler.strings), protocol=5) + file.getvalue()
    # Not a packed weight: where processes share it, this very object keeps the file mapped (`hfq.runtime.kernels.sharing`).
    return skeleton, [tensor if tensor.is_mkldnn else tensor.detach() for tensor in pickler.tensors]


def put_together(skeleton: bytes, tensors: Sequence[Tensor]) -> nn.Module:
    """The model again, for inference, with `tensors` as its tensors. A forward that was set on it is left out.

    `skeleton` is a pickle: only what `take_apart` returned goes in here, not what was read from a file.
    """
    file = io.BytesIO(skeleton)
    strings = pickle.load(file)  # noqa: S301  # nosec B301
    return _Unpickler(file, tensors, strings).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, model: nn.Module, *, blocks: bool) -> None:
        super().__init__(file, protocol=5)
        self.model = model
        self.blocks = blocks
        self.tensors: list[Tensor] = []
        self.strings: dict[str, int] = {}  # each once: which of them are the same object, another process cannot know
        self._position: dict[int, int] = {}
        # Of an inner model, whose outer one's outputs need no other token, all tokens are outputs.
        self._most = FUSED if getattr(model.__dict__.get("forward"), "inner", False) else KNOWN

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            position = self._position.setdefault(id(value), len(self.tensors))
            if position == len(self.tensors):
                self.tensors.append(value)
            return position
        if type(value) is str:
            return -1 - self.strings.setdefault(value, len(self.strings))
        if type(value) in (set, frozenset):  # in an order that does not change from process to process
            return type(value), sorted(value, key=repr)
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type | FunctionType | BuiltinFunctionType):
            if (value.__module__ or "").partition(".")[0] not in _PACKAGES:
                raise pickle.PicklingError(f"{value!r} is not of a package whose version is known")
            return NotImplemented
        if self.blocks and isinstance(value, PackedLinear) and (matmul := in_blocks(value)):
            return _new, (BlockedMatmul,), matmul.__dict__, None, None, _set_state
        if isinstance(value, threading.local):
            return threading.local, ()
        if isinstance(value, KnownForward):
            return KnownForward, (min(value.most, self._most),)
        if isinstance(value, nn.Module | SharedMatmul | PretrainedConfig):  # their own ways leave out packed weights
            state = {name: item for name, item in value.__dict__.items() if name not in _UNREAD}
            kind = getattr(type(value), "hfq_runs_as", type(value))
            if isinstance(value, nn.Module) and _PARAMETRIZED in state["_modules"]:
                kind, state = _with_weights(value, state)
            for name in [name for name in state if name.startswith("_hfq_")]:  # what `fit` has to say of it
                del state[name]
            if _HOOKS in state:
                kept = [key for key, hook in state[_HOOKS].items() if getattr(hook, "__module__", "") != CAPTURING]
                state[_HOOKS] = OrderedDict((key, state[_HOOKS][key]) for key in kept)
                state = _renumbered({name: item for name, item in state.items() if _LOADING not in name})
            if "training" in state:
                state["training"] = False
            if value is self.model or isinstance(state.get("forward"), FusedForward):
                state.pop("forward", None)
            if isinstance(value, nn.Module):  # most of what there is, which a new one has as well
                state = {name: item for name, item in state.items() if name not in _NEW or item != _NEW[name]}
            if isinstance(value, Int8Linear) and value._packed is not None:
                state["_parameters"] = {}  # they are in what was packed
            return _new, (kind,), state, None, None, _set_state
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor], strings: Sequence[str]) -> None:
        super().__init__(file)
        self.tensors = tensors
        self.strings = strings

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, int):
            return self.strings[-1 - pid] if pid < 0 else self.tensors[pid]
        kind, items = pid
        return kind(items)


def _with_weights(module: nn.Module, state: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """Class and state of `module` with what its parametrizations (weight norm, say) compute at the moment."""
    names = list(module.parametrizations)  # type: ignore[arg-type]
    weights = {name: getattr(module, name).detach() for name in names}
    modules = {name: child for name, child in state["_modules"].items() if name != _PARAMETRIZED}
    plain = {"_modules": modules, "_parameters": {**module._parameters, **weights}}
    return type(module).__bases__[0], {**state, **plain}


def _renumbered(state: dict[str, Any]) -> dict[str, Any]:
    """A module's state with its hooks numbered from 0: torch counts all that a process ever made."""
    hooks = {name: item for name, item in state.items() if "hooks" in name and isinstance(item, dict)}
    numbers = {number: rank for rank, number in enumerate(sorted({key for item in hooks.values() for key in item}))}
    return state | {
        name: OrderedDict((numbers[key], hook) for key, hook in item.items()) for name, item in hooks.items()
    }


def _new(kind: type) -> Any:
    new: Any = object.__new__(kind)
    if issubclass(kind, nn.Module):
        nn.Module.__init__(new)
    return new


def _set_state(value: Any, state: dict[str, Any]) -> None:
    value.__dict__.update(state)


def stand_in(tensor: Tensor) -> dict[str, Any]:
    """What a compiler has to know of a tensor, in JSON's types. A packed weight counts as a plain one of its shape."""
    stride = torch.empty(tensor.shape, device="meta").stride() if tensor.is_mkldnn else tensor.stride()
    return {"size": list(tensor.shape), "stride": list(stride), "dtype": str(tensor.dtype).partition(".")[2]}
