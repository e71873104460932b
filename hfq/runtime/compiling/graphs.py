"""Compiled graphs on disk: machine code of one model's forward, for any length, that takes the weights as arguments.

Loading one takes milliseconds and none of the compiler's memory. It is compiled by a process of its own
(`hfq.runtime.compiling.inductor.compiler`), which is given the model without its weights (`hfq.runtime.compiling.skeleton`).
"""

import ctypes
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...common.version import __version__
from ..int8.linear import packed_linears
from ..kernels.cpu import compiles_to_bfloat16, is_compiled, onednn_settings
from ..kernels.native import machine, take_tensors
from .difference import Reference, differs
from .folders import trusted
from .skeleton import stand_in, take_apart

LIBRARY = "graph.so"
FACTS = "graph.json"
REFUSED = "refused.txt"
WRONG = "wrong.txt"
MOST = 4  # graphs for one kind of input; each is right where its conditions hold, which lengths and batches may decide
_COMPILING = threading.Lock()
_log = logging.getLogger(__name__)


class CompilerError(Exception):
    """What compiles has failed, which says nothing about the model: a broken compiler, a full disk."""


class WrongOutputError(Exception):
    """What was compiled, here or in a process before, does not compute what the model does."""


class Graphs:
    """The graphs of one model, which are loaded, or compiled and kept, when an input first asks for them."""

    def __init__(
        self, folders: Sequence[Path], *, skeleton: bytes, tensors: list[Tensor], fusions: Sequence[str]
    ) -> None:
        self.folders = folders
        self.folder = folders[0]  # where new ones are put
        self._fusions = fusions
        self._skeleton = skeleton
        self._tensors = tensors
        self._loaded: dict[tuple[Any, ...], list[Graph]] = {}
        self._refused: set[tuple[Any, ...]] = set()

    @classmethod
    def of(cls, model: nn.Module, roots: Sequence[Path], *, fusions: Sequence[str]) -> "Graphs | None":
        """None where the model cannot be compiled by another process. `fusions`: those that are wanted."""
        parts = take_apart(model, blocks="compiled-matmul" in fusions)
        if parts is None or any(tensor.device.type != "cpu" for tensor in parts[1]):
            return None
        skeleton, tensors = parts
        # A float model keeps to float products.
        narrow = compiles_to_bfloat16()
        here = {
            "compiled-attention": is_compiled(fusions) and (not narrow or bool(packed_linears(model))),
            "compiled-residual": narrow and "compiled-residual" in fusions,
        }
        wanted = [name for name, is_wanted in here.items() if is_wanted]
        facts = json.dumps([made_with(), wanted, *map(stand_in, tensors)])
        key = hashlib.sha256(facts.encode() + skeleton).hexdigest()[:32]
        return cls([root / key for root in roots], skeleton=skeleton, tensors=tensors, fusions=wanted)

    @property
    def are_kept(self) -> bool:
        """Whether anything was compiled for the model before."""
        return any(folder.exists() for folder in self.folders)

    def find(self, names: Sequence[str], inputs: Tensor) -> "Graph | None":
        """A loaded graph for `inputs`, int64 `[names, batch, length]` or float32 `[1, batch, channels, height, width]`."""
        for graph in self._loaded.get(_kind(names, inputs), ()):
            if graph.fits(inputs):
                return graph
        return None

    def has_loaded(self) -> bool:
        """Whether there is any that the model's weights have to stay as they are for."""
        return any(self._loaded.values())

    def may_make(self, names: Sequence[str], inputs: Tensor) -> bool:
        """Whether nothing was found yet that keeps such inputs from having a graph."""
        return _kind(names, inputs) not in self._refused

    def make(self, names: Sequence[str], inputs: Tensor, *, eager: Reference | None) -> "Graph | None":
        """Load or compile a graph for `inputs`. None if it cannot be.

        Args:
            eager: the model itself, whose outputs a new graph has to have; raises if `inputs` are not worth one.
                None: nothing can be compiled.

        Raises:
            CompilerError: it may be another time.
            WrongOutputError: it may not, and is only said once.
        """
        kind = _kind(names, inputs)
        with _COMPILING:
            graph = self.find(names, inputs)
            while graph is None and kind not in self._refused:
                loaded = self._loaded.setdefault(kind, [])
                name = "-".join(map(str, (*kind, len(loaded))))
                places = [folder / name for folder in self.folders]
                found = self._first_of(places)
                if found is None and eager and len(loaded) < MOST and not any(place.exists() for place in places):
                    eager(inputs.clone())
                    self._compile(names, inputs, places[0], eager=eager)
                    found = self._first_of(places[:1])
                if found is None:
                    self._refused.add(kind)
                    if (places[0] / WRONG).exists():
                        raise WrongOutputError((places[0] / WRONG).read_text(encoding="utf-8"))
                else:
                    loaded.append(found)
                    graph = self.find(names, inputs)
            return graph

    def _first_of(self, places: Sequence[Path]) -> "Graph | None":
        return next((found for place in places if (found := self._load(place)) is not None), None)

    def _load(self, folder: Path) -> "Graph | None":
        """The graph in `folder`; None if there is none that is this user's."""
        if (folder / REFUSED).exists():
            _log.info("Not compiled ahead: %s", (folder / REFUSED).read_text(encoding="utf-8"))
        elif folder.exists() and not (folder / WRONG).exists():
            try:
                with trusted(
                    folder.parent, folder.name, f"{folder.name}/{FACTS}", f"{folder.name}/{LIBRARY}"
                ) as parent:
                    return Graph(parent / folder.name, self._tensors)
            except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
                is_ours = folder.parent == self.folder
                _log.warning("%s is damaged and is %s: %s", folder, "deleted" if is_ours else "not used", error)
                if is_ours:
                    shutil.rmtree(folder, ignore_errors=True)
            except (OSError, RuntimeError) as error:  # others, who may read it or have the memory, go on with it
                _log.warning("%s is not used: %s", folder, error)
        return None

    def _compile(self, names: Sequence[str], inputs: Tensor, folder: Path, *, eager: Reference) -> None:
        """Have another process compile into `folder`, which appears whole and seen to be right, or not at all.

        Raises:
            CompilerError: it does not appear.
        """
        request = {
            "names": list(names),
            "inputs": stand_in(inputs),
            "threads": torch.get_num_threads(),
            "fusions": self._fusions,
            "tensors": [stand_in(tensor) for tensor in self._tensors],
        }
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=self.folder) as unfinished:
                made = Path(unfinished) / "graph"
                made.mkdir(mode=0o700)
                self._run_compiler({**request, "folder": str(made)})
                self._check_outputs(made, inputs, eager)
                try:
                    made.rename(folder)
                except OSError:
                    if not folder.exists():  # else another process was faster
                        raise
        except OSError as error:
            raise CompilerError(str(error)) from error

    def _check_outputs(self, folder: Path, inputs: Tensor, eager: Reference) -> None:
        """Leave a sentence in place of a graph whose outputs are not the model's.

        Raises:
            CompilerError: it does not run.
        """
        if not (folder / FACTS).exists():  # it is refused
            return
        try:
            difference = differs(Graph(folder, self._tensors), eager, inputs, rounded=eager.rounded)
        except RuntimeError as error:
            raise CompilerError(str(error)) from error
        if difference is not None:
            (folder / FACTS).unlink()
            (folder / LIBRARY).unlink()
            (folder / WRONG).write_text(said(difference), encoding="utf-8")

    def _run_compiler(self, request: dict[str, Any]) -> None:
        # It is to find the modules that this process found, and none in the folder that the user is in.
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        done = subprocess.run(
            [sys.executable, "-m", "hfq.runtime.compiling.inductor.compiler"],
            input=json.dumps(request).encode() + b"\n" + self._skeleton,
            capture_output=True,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "PYTHONSAFEPATH": "1",
                "TORCHINDUCTOR_CACHE_DIR": str(self.folder.parent),
            },
        )
        if done.returncode:
            printed = done.stderr.decode(errors="replace").strip()
            _log.info("%s", printed)
            raise CompilerError(printed.rpartition("\n")[2] or f"The compiling process ended with {done.returncode}.")


class Graph:
    """One loaded graph. Several threads may call it at once, and no other thread waits while it computes.

    Raises:
        FileNotFoundError, ValueError, KeyError, TypeError: what is in the folder is not what was put there.
        OSError, RuntimeError: it cannot be read or loaded here.
    """

    def __init__(self, folder: Path, tensors: list[Tensor]) -> None:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["sha256"] != digest(folder, facts["conditions"], facts["outputs"]):
            raise ValueError("its files are not those that were compiled")
        self._tensors = tensors
        if "Cache" in facts["outputs"]:
            register_caches()
        self._outputs = pytree.treespec_loads(facts["outputs"])
        condition = " and ".join(f"({guard})" for guard in facts["conditions"]) or "True"
        # Arithmetic on the shape that the compiler wrote down; the library beside it is machine code of the same origin.
        self._condition = compile(condition, str(folder / FACTS), "eval")
        # Not torch's own runner: that one holds the interpreter's lock while it computes.
        self._library = load_library(folder / LIBRARY)
        self._container = _Pointer()
        threads = ctypes.c_size_t(os.cpu_count() or 1)
        self._check(
            self._library.AOTInductorModelContainerCreateWithDevice(
                ctypes.byref(self._container), threads, b"cpu", None
            )
        )
        weakref.finalize(self, self._library.AOTInductorModelContainerDelete, self._container).atexit = False

    def fits(self, inputs: Tensor) -> bool:
        """Whether the conditions hold under which it was compiled."""
        return bool(eval(self._condition, {"__builtins__": {}}, {"shape": inputs.shape}))  # noqa: S307  # nosec B307

    def __call__(self, inputs: Tensor) -> Any:
        """The model's outputs for `inputs`, as they were found."""
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([inputs, *self._tensors])
        given = (_Pointer * len(capsules))(*map(_capsule_pointer, capsules, repeat(None)))  # it frees them
        count = self._outputs.num_leaves
        outputs = (_Pointer * count)()
        self._check(
            self._library.AOTInductorModelContainerRun(
                self._container, given, _Size(len(given)), outputs, _Size(count), None, None
            )
        )
        return pytree.tree_unflatten(take_tensors(list(outputs)), self._outputs)

    def _check(self, status: int) -> None:
        if status:
            message = ctypes.c_char_p()
            self._library.AOTInductorGetLastError(ctypes.byref(message))
            raise RuntimeError(f"A compiled graph failed: {(message.value or b'').decode(errors='replace')}")


def load_library(file: Path) -> ctypes.CDLL:
    """The library in `file`, which may lead there by way of a descriptor, whose number another folder gets after it.

    To glibc a name that it has loaded is the library that it was then, so it gets the name on disk.
    """
    return ctypes.CDLL(str(file.resolve()))


def register_caches() -> None:
    """Have torch see the tensors in a decoder's cache, which such a model returns beside its other outputs."""
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()


def said(difference: float) -> str:
    """Why what was compiled is not used."""
    return (
        f"Compiled, its outputs differ, by {difference:.2g} of their size: "
        "the compiler is wrong, or a program changed the model's code while it runs."
    )


def digest(folder: Path, conditions: list[str], outputs: str) -> str:
    """SHA-256 of what a graph consists of."""
    content = hashlib.sha256((folder / LIBRARY).read_bytes())
    content.update(json.dumps([conditions, outputs]).encode())
    return content.hexdigest()


_Pointer, _Size = ctypes.c_void_p, ctypes.c_size_t
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = _Pointer, [ctypes.py_object, ctypes.c_char_p]


def dynamic_axes(inputs: Tensor) -> list[int]:
    """Of one graph: a batch, if it is not 1, and a length. Images and sounds have the size that they have."""
    axes = (1,) if inputs.is_floating_point() else (1, 2)
    return [axis for axis in axes if axis == 2 or inputs.shape[axis] > 1]


def _kind(names: Sequence[str], inputs: Tensor) -> tuple[Any, ...]:
    """What has a graph of its own: which inputs there are, of which size if it is one, one or a batch, and for how many threads."""
    sizes = inputs.shape[2:] if inputs.is_floating_point() else ()
    which = "+".join(names) + "".join(f",{size}" for size in sizes)
    return which, "single" if inputs.shape[1] == 1 else "batch", torch.get_num_threads()


@lru_cache(maxsize=1)
def _own_code() -> str:
    """hfq's own by content, as it changes between versions here."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def made_with() -> dict[str, Any]:
    """What graphs are compiled from, by and for, beside their model: they run nowhere else."""
    return {
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "transformers": transformers.__version__,
        "hfq": __version__,
        "code of hfq": _own_code(),
        "setting": [
            *(f"{name}={value}" for name, value in sorted(os.environ.items()) if _is_setting(name)),
            *onednn_settings(),
        ],
        "CPU": machine(),
    }


def _is_setting(name: str) -> bool:
    return name.startswith(("TORCHINDUCTOR_", "AOT_INDUCTOR_")) and not name.endswith("_CACHE_DIR")
