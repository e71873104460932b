"""The float model's outputs, kept from run to run: evaluating it takes longer than a trial, and gives the same each time."""

import hashlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..common.version import __version__
from ..data.session import Session
from ..runtime.compiling.folders import trusted
from ..source.contents import list_contents
from ..tasks.base import Batch, Task

Outputs = tuple[list[Tensor], float]  # one for each example, and the seconds that they took
LARGEST = 1 << 26  # bytes that are kept of one split: vocabularies of logits are not
MOST = 64  # files; the oldest go first


def keeping_outputs(session: Session, batches: Sequence[Batch], compute: Callable[[], Outputs]) -> Outputs:
    """What `compute` returns of the session's own model on `batches`, or returned in an earlier run for the same content.

    Not of a model that brings code, nor of batches that are made one by one.
    """
    if session.checkpoint.info.remote_code or not isinstance(batches, list):
        return compute()
    folder = Path(constants.HF_HOME) / "hfq" / "outputs"
    path = folder / f"{_key(session, batches)}.safetensors"
    found = _read(path)
    if found is None:
        found = compute()
        with suppress(OSError, SafetensorError):  # a cache that cannot be written is none
            _write(path, found)
    return found


def _key(session: Session, batches: Sequence[Batch]) -> str:
    """A hash of all that the outputs depend on."""
    checkpoint, recipe = session.checkpoint, session.recipe
    digest = hashlib.sha256()
    facts = {
        "versions": [__version__, torch.__version__, transformers.__version__],
        "computing": [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "engine": [recipe.accelerator, recipe.devices, recipe.strategy],
        "weights": checkpoint.info.revision,
        "config": checkpoint.config,
        "task": [session.task.name, dict(session.task.given), _code_of(session.task)],
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name in sorted(map(str, list_contents(checkpoint.path, checkpoint.contents))):
        digest.update(name.encode() + hashlib.sha256((checkpoint.path / name).read_bytes()).digest())
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _code_of(task: Task) -> str:
    """The file that says what outputs are, which its author may be changing; nothing where only bytecode is installed."""
    with suppress(OSError):
        return inspect.getsource(sys.modules[type(task).__module__])
    return ""


def _read(path: Path) -> Outputs | None:
    """None: it is not there, damaged, or others may have written it."""
    try:
        with trusted(path.parent, path.name) as folder:
            found = load_file(folder / path.name)
        seconds = found.pop("seconds").item()
        return [found[str(row)] for row in range(len(found))], seconds
    except (OSError, SafetensorError, KeyError):
        return None


def _write(path: Path, found: Outputs) -> None:
    outputs, seconds = found
    if sum(output.nbytes for output in outputs) > LARGEST:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    tensors = {str(row): output.contiguous().clone() for row, output in enumerate(outputs)}
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as unfinished:
        file = Path(unfinished) / path.name
        save_file({**tensors, "seconds": torch.tensor(seconds, dtype=torch.float64)}, file)
        file.chmod(0o600)
        file.replace(path)
    kept = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in kept[MOST:]:
        file.unlink()
