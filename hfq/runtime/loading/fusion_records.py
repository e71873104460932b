"""What was fused in a checkpoint's model, kept from process to process, so that it is looked for once on a machine."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor, nn

from ...common.files import write_text
from ..compiling.folders import trusted
from ..compiling.graphs import made_with
from ..compiling.skeleton import stand_in, take_apart
from ..fusion.record import Record

_SMALL = 1 << 16  # numbers of a tensor whose values are a part of the key: scales, norms and biases


class KeptRecords:
    """One model's, in a file of the Hub client's cache folder (`hfq.runtime.fusion.record.Records`).

    The key is the model without its large tensors, the fusions, the versions of torch, transformers and hfq, and the
    CPU. A file counts only if this user or root made it and nobody else may write to it.
    """

    def __init__(self) -> None:
        self._name: str | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return KeptRecords, ()

    def find(self, model: nn.Module, fusions: Sequence[str]) -> Record | None:
        """The record of `model`; None if there is none here, or the model has code whose version is not known."""
        self._name = _name(model, fusions)
        if self._name is None:
            return None
        try:
            with trusted(_folder(), self._name) as folder:
                return Record.of_json(json.loads((folder / self._name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def keep(self, record: Record) -> None:
        """Write it, where the cache folder can be written to."""
        if self._name is None:
            return
        try:
            _folder().mkdir(mode=0o700, parents=True, exist_ok=True)
            write_text(_folder() / self._name, json.dumps(record.as_json()))
        except OSError:  # it is looked for again the next time
            return


def _folder() -> Path:
    return Path(constants.HF_HOME) / "hfq" / "fusions"


def _name(model: nn.Module, fusions: Sequence[str]) -> str | None:
    parts = take_apart(model)
    if parts is None or any(tensor.device.type != "cpu" or tensor.is_mkldnn for tensor in parts[1]):
        return None
    skeleton, tensors = parts
    digest = hashlib.sha256(skeleton)
    digest.update(json.dumps([made_with(), list(fusions), *map(stand_in, tensors)]).encode())
    for tensor in tensors:
        if tensor.numel() <= _SMALL:
            digest.update(_bytes(tensor))
    return f"{digest.hexdigest()[:32]}.json"


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
