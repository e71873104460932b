"""`hfq.compile`: the work between the matmuls as compiled code, and on x86 the matmuls too.

It is compiled for any batch and length at once, so a server that sees every shape compiles once for single inputs and
once for batches, not once a request; and once for a machine, as what is compiled is kept on disk (`hfq.runtime.compiling.graphs`).
What cannot be compiled ahead, such as a model with a class of the user's own, torch.compile compiles in each process.
"""

import functools
import os
import shutil
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...common.memory import LargestInput, return_freed_memory
from ..direct.forward import DirectForward
from ..fusion.flow import standing_in
from ..fusion.fuse import finish_fusing, known_of, wanted_fusions
from ..fusion.slicing import TOKENS, is_token_batch
from ..fusion.snapshot import unchanged
from ..inputs import NUMBERS
from ..inside import sentence_transformer
from ..int8.known_forward import WATCHED, FusedForward, enter
from ..int8.linear import Int8Linear
from ..int8.packed import PACKING, pack_all
from .blocked import lay_out, lay_out_for_kernels
from .difference import Reference, differs
from .folders import are_all_empty, cache_folder, compile_setting, folders, say_what_differs
from .graphs import CompilerError, Graph, Graphs, WrongOutputError, dynamic_axes, made_with, said

Model = TypeVar("Model", bound=nn.Module)
_NO_COMPILER = "hfq.compile needs a C++ compiler (g++ or clang++, or its path in CXX) and found none"
SIZES = 4  # of images or sounds that a model is compiled for, a minute each; others run uncompiled


def compile(model: Model) -> Model:
    """Compile `model`, in place, for encoder inputs of any shape; what is unusual about other inputs runs as before.

    The first single input and the first batch that this machine sees are compiled when they come, by a process of its
    own, which takes a minute or two for BERT-base: for tokens of any length, or for images and sounds of the size that they have.
    So are those of transformers' models inside, such as an encoder that is called without its head, and those of copies
    and pickles. Inputs that a gradient is wanted of run as before, and what is asked for more than a forward returns by
    itself, such as hidden states: the first time, a warning says so. What results is kept on disk, in
    `TORCHINDUCTOR_CACHE_DIR` or the cache folder of the Hub's client, and other processes load it in milliseconds. The
    tensors are those of the moment: replacing one afterwards has no effect. Classes are compiled as their packages have
    them: what a program changed in them while it runs is not seen. Without a C++ compiler, and with nothing on disk, the
    model is returned as it is, with a warning. Of a SentenceTransformer, CrossEncoder or SparseEncoder, and of a model
    that another library built around transformers' models, those are compiled.

    Example:
        >>> model = hfq.compile(hfq.load("me/bert-mrpc-int8"))
    """
    finish_fusing(model)
    parts = _parts(model)
    reasons = [_without_gain(part) for part in parts]
    worth = [part for part, why in zip(parts, reasons, strict=True) if why is None]
    if not worth:
        warnings.warn(
            f"hfq.compile leaves {type(parts[0]).__name__} as it is: {reasons[0]}. Its outputs and its speed are the same "
            "as before.",
            stacklevel=2,
        )
        return model
    known = known_of(model)
    for part in worth:
        forward = enter(part, known)
        if isinstance(forward.compiled, _Compiled) and forward.compiled.is_asked and forward.compiled.prepare():
            continue
        inside = [enter(inner, known) for inner in list(part.modules())[1:] if isinstance(inner, PreTrainedModel)]
        forward.settle()
        compiled = forward.compiled = _Compiled(forward)
        if not compiled.prepare():
            warnings.warn(f"{_NO_COMPILER}: the model runs uncompiled, with the same outputs.", stacklevel=2)
            forward.compiled = None
            continue
        for inner in inside:
            inner.inner = True
            inner.look_again()
            inner.compiled = _Compiled(inner)
    return model


def use_kept(model: nn.Module) -> None:
    """Have `model`, which is fused, run what was compiled for it before, if anything was.

    Nothing is compiled for it, or, if the user wants that, in the background.

    Raises:
        UsageError: `HFQ_COMPILE` says what it cannot.
    """
    setting = compile_setting()
    if setting == "off" or (setting == "kept" and are_all_empty()):
        return
    for part in _parts(model):
        for module in (part, *list(part.modules())[1:]):
            forward = module.__dict__.get("forward")
            if isinstance(forward, FusedForward) and forward.compiled is None and _without_gain(module) is None:
                forward.compiled = _Compiled(forward, is_asked=False)
        entered = part.__dict__.get("forward")
        if isinstance(entered, FusedForward) and entered.compiled is not None and not entered.compiled.prepare():
            entered.compiled = None


def kept_for(model: nn.Module) -> list[Path]:
    """Folders of what is compiled for `model`, and for transformers' models in it."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    compiled = (forward.compiled for forward in forwards if isinstance(forward, FusedForward))
    folders = (one.folder for one in compiled if isinstance(one, _Compiled))
    return [folder for folder in folders if folder is not None and folder.exists()]


def _parts(model: nn.Module) -> list[nn.Module]:
    """What is compiled of `model`: itself, or the models of transformers' that another library's is built around."""
    if isinstance(model, PreTrainedModel):
        return [model]
    if (inside := sentence_transformer(model)) is not None:
        return [inside]
    found: list[nn.Module] = []
    for child in model.children():
        found += [part for part in _parts(child) if isinstance(part, PreTrainedModel)]
    return found or [model]


def _without_gain(model: nn.Module) -> str | None:
    """Why nothing that this model is called with would be compiled; None if something may be."""
    forward = model.__dict__.get("forward")
    if isinstance(forward, FusedForward) and isinstance(forward.compiled, DirectForward):
        return "its convolutions run as steps that need no compiler, with norms, activation functions and sums in them"
    name = getattr(model, "main_input_name", TOKENS[0])
    config = getattr(model, "config", None)
    if name not in (TOKENS[0], *NUMBERS):
        return f"it takes {name}, and inputs that are compiled are plain tokens, images or sounds"
    if getattr(config, "is_encoder_decoder", False) and _has_decoder(model):
        return (
            "it takes tokens for its encoder and for its decoder, and inputs that are compiled are plain tokens alone"
        )
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        return "it takes tokens and images together; each of its two towers can be compiled by itself"
    return None


def _has_decoder(model: nn.Module) -> bool:
    """Whether a part of it is one. A classifier on Whisper's encoder has the config of the whole, and none."""
    return any(name.rpartition(".")[2] == "decoder" for name, _ in model.named_modules())


class _Comparison(threading.local):
    """`under_way`: this thread asks a model for what a graph is compared with, so no graph is to have a part in it."""

    under_way = False


_comparison = _Comparison()


class _Compiled:
    """A model's `forward` that runs compiled graphs on token batches and gives everything else to the original.

    `entry`: that of the model. Copies and pickles of it find their own graphs when they are called first. `is_asked`:
    by the user, who is told what does not run compiled; else nothing is compiled, and there is nothing to tell. With
    `HFQ_COMPILE=background`, either way, a thread waits for what is compiled while the original computes.
    """

    def __init__(self, entry: FusedForward, is_asked: bool = True) -> None:
        self.is_asked = is_asked
        self._entry = entry
        self._model = model = entry.model
        self._graphs: Graphs | None = None
        self._compiler = False
        self._is_prepared = False
        self._in_background = False
        self._maker: threading.Thread | None = None
        self._is_said = False
        self._in_process: _InProcess | None = None
        self._largest = LargestInput()
        self._sizes: set[tuple[int, ...]] = set()
        self._main_input = getattr(model, "main_input_name", TOKENS[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return _Compiled, (self._entry, self.is_asked)

    @property
    def folder(self) -> Path | None:
        """Where what is compiled is kept; None if nothing can be."""
        return None if self._graphs is None else self._graphs.folder

    def prepare(self) -> bool:
        """Find what was compiled for the model as it is now, and whether more can be. Returns: whether anything can."""
        with PACKING, torch.inference_mode(False), torch.no_grad():
            if not self._is_prepared:
                self._prepare()
                self._is_prepared = True
        return self._compiler or self._graphs is not None

    def _prepare(self) -> None:
        model = self._model
        pack_all(model)  # what is packed while it is traced would be packed again each time
        fusions = wanted_fusions()
        lay_out(model, panels="compiled-matmul" in fusions)
        graphs = Graphs.of(model, folders(), fusions=fusions)
        self._in_background = compile_setting() == "background"
        self._compiler = (self.is_asked or self._in_background) and has_compiler()
        are_kept = graphs is not None and graphs.are_kept
        if not (are_kept or self._compiler or self._entry.inner):
            say_what_differs(type(model).__name__, made_with())
        if self._compiler or are_kept:
            self._graphs = graphs
            return_freed_memory()  # what packing left: activations of compiled code mostly do not fit into it
        elif not self._entry.inner:  # else what it is inside may need it
            lay_out_for_kernels(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        eager = self._entry.forward
        if _comparison.under_way or self._model.training or not torch.backends.mkldnn.enabled:
            return eager(*args, **kwargs)
        if args or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return eager(*args, **kwargs)
        if not self._is_prepared and not self.prepare() and not self._entry.inner:
            self.say_why(_NO_COMPILER)
        if not self._compiler and self._graphs is None:
            return eager(**kwargs)
        # One tensor, so that all have the same dynamic shape.
        with torch.inference_mode(False):  # torch.compile would take a tensor made in it for another kind
            found = self._numbers(kwargs) or self._tokens(kwargs)
        if found is None or found[1].device.type != "cpu":
            unusual = sorted(kwargs.keys() - {self._main_input, *TOKENS})
            if unusual and not self._has_inner:
                self.say_why(f"it is called with {', '.join(unusual)}")
            return eager(**kwargs)
        names, stacked = found
        with self._largest.of(stacked[0].numel()):
            outputs = self._compiled(names, stacked, kwargs)
        if stacked.is_floating_point():
            self._sizes.add(stacked.shape[2:])
        return outputs

    def say_why(self, reason: str) -> None:
        """Tell the user, once, why a call of the model runs uncompiled."""
        if self.is_asked and not self._is_said and not _comparison.under_way:
            self._is_said = True
            warnings.warn(
                f"A call of the compiled {type(self._model).__name__} runs uncompiled, as slowly as before hfq.compile: "
                f"{reason}. This is said once.",
                stacklevel=2,
            )

    @functools.cached_property
    def _has_inner(self) -> bool:
        """Whether a model inside is compiled for itself: what it computes is most of it, and it says what it cannot."""
        return any(isinstance(inner, PreTrainedModel) for inner in list(self._model.modules())[1:])

    def _numbers(self, inputs: dict[str, Any]) -> tuple[tuple[str, ...], Tensor] | None:
        """Names, and float32 `[1, batch, *size]`, of images or sounds alone; None if `inputs` are something else."""
        numbers = inputs.get(self._main_input)
        if self._main_input not in NUMBERS or len(inputs) != 1 or not isinstance(numbers, Tensor):
            return None
        if numbers.dim() not in (2, 3, 4) or not len(numbers) or numbers.dtype != torch.float32:
            return None
        sizes = self._sizes | {numbers.shape[1:]}
        # A copy, as the model may write into its input.
        copy = numbers.detach().clone(memory_format=torch.contiguous_format)
        return ((self._main_input,), copy[None]) if len(sizes) <= SIZES else None

    def _tokens(self, inputs: dict[str, Any]) -> tuple[tuple[str, ...], Tensor] | None:
        """Names, and int64 `[names, batch, length]`, of plain tokens; None if `inputs` are something else."""
        # A graph for any batch is not one for none: what it computes for a part of its rows, it may divide by.
        if not is_token_batch(inputs) or inputs["input_ids"].shape[1] < 2 or not len(inputs["input_ids"]):
            return None
        if "attention_mask" not in inputs and not self._has_padding(inputs["input_ids"]):
            if "position_ids" in inputs and not _are_consecutive(inputs["position_ids"]):
                return None  # texts one after the other in a row, which such a model may keep apart
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        names = tuple(sorted(inputs))
        return names, torch.stack([inputs[name].long() for name in names])

    def _compiled(self, names: tuple[str, ...], stacked: Tensor, inputs: dict[str, Any]) -> Any:
        """`stacked`: the tensors of `names`, in which there may be more than in `inputs`."""
        graphs = self._graphs
        graph = graphs.find(names, stacked) if graphs else None
        if graph is None and graphs and graphs.may_make(names, stacked):
            if self._in_background:
                self._make_meanwhile(graphs, names, stacked)
            else:
                graph = self._make(graphs, names, stacked)
        if graph is not None:
            return graph(stacked)
        if not self._compiler or self._in_background:
            return self._entry.forward(**inputs)
        if self._in_process is None:
            self._in_process = _InProcess(self._model, functools.partial(_Uncompiled, self))
        try:
            return self._in_process(names, stacked)
        except NotOneGraphError as error:
            outputs = self.uncompiled(inputs)
            self._leave_to_inner(error)
            return outputs
        except Exception as error:  # any of torch's
            outputs = self.uncompiled(inputs)  # which says what is wrong with the inputs, if that is it
            self._give_up(error)
            return outputs

    def _make(self, graphs: Graphs, names: tuple[str, ...], stacked: Tensor) -> Graph | None:
        eager = _Uncompiled(self, names) if self._compiler else None
        try:
            return graphs.make(names, stacked, eager=eager)
        except (CompilerError, WrongOutputError) as error:
            self._give_up(error)
            return None

    def _make_meanwhile(self, graphs: Graphs, names: tuple[str, ...], stacked: Tensor) -> None:
        """Have a thread make it, one at a time: a forward to come finds it."""
        known = self._entry.known
        level, copy = known.level, stacked.clone()

        def make() -> None:
            with torch.inference_mode(), known.running(level):
                self._make(graphs, names, copy)

        with PACKING:
            if self._maker is None or not self._maker.is_alive():
                self._maker = threading.Thread(target=make, daemon=True)  # the process may end before it does
                self._maker.start()

    def uncompiled(self, inputs: dict[str, Any]) -> Any:
        """What the model puts out, no graph of a model inside having a part in it."""
        _comparison.under_way = True
        try:
            return self._entry.forward(**inputs)
        finally:
            _comparison.under_way = False

    def rounded(self, inputs: dict[str, Any]) -> Any:
        """The same, no layer doing another's work, and all that they read rounded to bfloat16."""

        def read_rounded(layer: Int8Linear, x: Tensor) -> Tensor:
            return type(layer).forward(layer, x.bfloat16().to(x.dtype))

        with self._entry.known.running(WATCHED), standing_in(self._model.modules(), read_rounded):
            return self.uncompiled(inputs)

    def _has_padding(self, ids: Tensor) -> bool:
        """Whether some are those of padding, from which a few models make a mask of their own."""
        padding = getattr(getattr(self._model, "config", None), "pad_token_id", None)
        return padding is not None and bool(ids.eq(padding).any())

    def _leave_to_inner(self, error: Exception) -> None:
        """Compile nothing but the models inside, which have no more to say."""
        self._compiler, self._graphs = False, None
        for inner in self._inner_forwards():
            if isinstance(inner.compiled, _Compiled):
                inner.compiled._is_said = True
        if not self._has_inner and not self._entry.inner:
            lay_out_for_kernels(self._model)
        inside = "; the model inside may still be compiled by itself" if self._has_inner else ""
        warnings.warn(
            f"hfq.compile leaves {type(self._model).__name__} as it is, which is no single graph{inside}. {error}.",
            stacklevel=4,
        )

    def _inner_forwards(self) -> Iterator[FusedForward]:
        forwards = (inner.__dict__.get("forward") for inner in list(self._model.modules())[1:])
        return (forward for forward in forwards if isinstance(forward, FusedForward))

    def _give_up(self, error: Exception) -> None:
        """Compile nothing further of the model in this process."""
        self._compiler = False
        for forward in self._inner_forwards():
            forward.compiled = None
        if self._graphs is None or not self._graphs.has_loaded():
            self._graphs = None
            if not self._entry.inner:
                lay_out_for_kernels(self._model)
        name = type(self._model).__name__
        if self.is_asked or self._in_background:
            warnings.warn(f"hfq.compile failed: {name} runs uncompiled, with its own outputs. {error}", stacklevel=4)


def _are_consecutive(positions: Tensor) -> bool:
    return torch.equal(positions[:, 1:], positions[:, :-1] + 1)


@dataclass(frozen=True)
class _Uncompiled:
    """What is compiled of a model is compared with it. Inputs are those of `names`, in one tensor."""

    compiled: _Compiled
    names: tuple[str, ...]

    def __call__(self, stacked: Tensor) -> Any:
        return self.compiled.uncompiled(self._by_name(stacked))

    def rounded(self, stacked: Tensor) -> Any:
        return self.compiled.rounded(self._by_name(stacked))

    def _by_name(self, stacked: Tensor) -> dict[str, Any]:
        return dict(zip(self.names, stacked.unbind(), strict=True))


class NotOneGraphError(Exception):
    """A forward depends on numbers, or calls what a graph cannot, as the message says."""


class _InProcess:
    """torch.compile of a model's forward, with what it sees as constants (freezing). `uncompiled`: whose outputs it is to have.

    The forward has to be one graph: compiling Longformer's pieces took each process more than ten minutes.
    """

    def __init__(self, model: nn.Module, uncompiled: Callable[[tuple[str, ...]], Reference]) -> None:
        _keep_on_disk()
        self._name = type(model).__name__
        self._model = model
        self._own = types.MethodType(type(model).forward, model)
        self._uncompiled = uncompiled
        self._made = threading.Event()
        self._is_known = False
        self._is_said = False
        # Guards on modules would be checked at each call, for a tenth of the time that a single input takes.
        guards: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self._compiled = torch.compile(self._unstacked, fullgraph=True, backend=self._inductor, options=guards)

    def __call__(self, names: tuple[str, ...], stacked: Tensor) -> Any:
        """The outputs.

        Raises:
            NotOneGraphError, WrongOutputError: it is not to be called again.
            Exception: any of torch's.
        """
        from torch._dynamo.exc import Unsupported

        # Frozen weights are ordinary tensors, and inference mode would hand the compiler something else.
        with torch.inference_mode(False), torch.no_grad(), _settings():
            if not self._is_known:
                self._see_that_it_stays(names, stacked)
            self._made.clear()
            try:
                output = self._run(names, stacked)
            except Unsupported as error:
                raise NotOneGraphError(str(error).strip().split("\n")[0].rstrip(".:")) from error
            if self._made.is_set():
                self._check(names, stacked)
            return output

    def _see_that_it_stays(self, names: tuple[str, ...], stacked: Tensor) -> None:
        """Refuse a forward that changes its model, which no guard would see: a graph would do for ever what the first one did.

        Raises:
            NotOneGraphError: it does.
        """
        with unchanged(self._model) as snapshot:
            self._uncompiled(names)(stacked)
        if snapshot.changed:
            raise NotOneGraphError("Its forward changes the model itself")
        self._is_known = True

    def _inductor(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        """What torch.compile calls with a graph, once it has one."""
        from torch._inductor.compile_fx import compile_fx

        self._made.set()
        if not self._is_said:
            self._is_said = True
            warnings.warn(
                f"hfq.compile compiles {self._name} for this process alone, and anew in each, which may take minutes: it, or "
                "what it puts out, is of a class that cannot be kept.",
                stacklevel=2,
            )
        return compile_fx(module, inputs)

    def _run(self, names: tuple[str, ...], stacked: Tensor) -> Any:
        for dimension in dynamic_axes(stacked):
            torch._dynamo.maybe_mark_dynamic(stacked, dimension)
        return self._compiled(names, stacked)

    def _check(self, names: tuple[str, ...], stacked: Tensor) -> None:
        """See that what was just compiled is right.

        Raises:
            WrongOutputError: it is not.
        """
        model = self._uncompiled(names)
        difference = differs(functools.partial(self._run, names), model, stacked, rounded=model.rounded)
        if difference is not None:
            raise WrongOutputError(said(difference))

    def _unstacked(self, names: tuple[str, ...], inputs: Tensor) -> Any:
        return self._own(**dict(zip(names, inputs.unbind(), strict=True)))


@contextmanager
def _settings() -> Iterator[None]:
    """Inductor's setting while it compiles: constants folded."""
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True):
        yield


def _keep_on_disk() -> None:
    """Have inductor keep what it compiles in this process there too."""
    folder = str(cache_folder())
    import torch._inductor.config  # noqa: F401 - sets the variable

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def has_compiler() -> bool:
    """Whether there is the C++ compiler that inductor would call. Asking inductor takes a second and 70 MiB."""
    return shutil.which(os.environ.get("CXX") or _COMPILERS.get(sys.platform, "g++")) is not None


_COMPILERS = {"darwin": "clang++", "win32": "cl"}
