"""`hfq.compile`: the work between the matmuls as compiled code, and on x86 the matmuls too.

It is compiled for any batch and length at once, so a server that sees every shape compiles once for single inputs and
once for batches, not once a request; and once for a machine, as what is compiled is kept on disk (`hfq.runtime.compiling.graphs`).
What cannot be compiled ahead, such as a model with a class of the user's own, torch.compile compiles in each process.
"""

import functools
import os
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...common.memory import LargestInput, return_freed_memory
from ..fusion.fuse import finish_fusing, known_of, wanted_fusions
from ..fusion.slicing import TOKENS, is_token_batch
from ..inside import sentence_transformer
from ..int8.known_forward import enter
from ..int8.linear import pack_all
from .blocked import lay_out, lay_out_for_kernels
from .difference import differs
from .graphs import CompilerError, Graphs, WrongAnswerError, dynamic_axes, said

Model = TypeVar("Model", bound=nn.Module)
SIZES = 4  # of images that a model is compiled for, a minute each; others run uncompiled


def compile(model: Model) -> Model:
    """Compile `model`, in place, for encoder inputs of any shape; what is unusual about other inputs runs as before.

    The first single input and the first batch that this machine sees are compiled when they come, by a process of its
    own, which takes a minute or two for BERT-base: for tokens of any length, or for images of the size that they have.
    Inputs that a gradient is wanted of run as before. What results is kept on disk, in `TORCHINDUCTOR_CACHE_DIR` or the
    cache folder of the Hub's client, and other processes load it in milliseconds. Copies of the model run uncompiled. The tensors are those of the moment:
    replacing one afterwards has no effect. Of a SentenceTransformer, CrossEncoder or SparseEncoder, the transformers model
    inside is compiled. Classes are compiled as their packages have them: what a program changed in
    them while it runs is not seen. Without a C++ compiler, and with nothing on disk, the model is returned as it is,
    with a warning.

    Example:
        >>> model = hfq.compile(hfq.load("me/bert-mrpc-int8"))
    """
    if (inside := sentence_transformer(model)) is not None:
        compile(inside)
        return model
    if (why := _without_gain(model)) is not None:
        warnings.warn(
            f"hfq.compile leaves {type(model).__name__} as it is: {why}. Its outputs and its speed are the same as before.",
            stacklevel=2,
        )
        return model
    finish_fusing(model)
    forward = enter(model, known_of(model))
    if forward.compiled is not None:
        return model
    forward.settle()
    pack_all(model)  # what is packed while it is traced would be packed again each time
    fusions = wanted_fusions()
    lay_out(model, panels="compiled-matmul" in fusions)
    graphs = Graphs.of(model, cache_folder(), fusions=fusions)
    compiler = has_compiler()
    if not compiler and not (graphs and graphs.folder.exists()):
        warnings.warn(
            "hfq.compile needs a C++ compiler (g++ or clang++, or its path in CXX) and found none: "
            "the model runs uncompiled, with the same answers.",
            stacklevel=2,
        )
        lay_out_for_kernels(model)
        return model
    return_freed_memory()  # what packing left: activations of compiled code mostly do not fit into it
    forward.compiled = _Compiled(model, forward.forward, graphs=graphs, compiler=compiler)
    return model


def _without_gain(model: nn.Module) -> str | None:
    """Why nothing that this model is called with would be compiled; None if something may be."""
    name = getattr(model, "main_input_name", TOKENS[0])
    config = getattr(model, "config", None)
    if name not in (TOKENS[0], "pixel_values"):
        return f"it takes {name}, and inputs that are compiled are plain tokens or images"
    if getattr(config, "is_encoder_decoder", False):
        return (
            "it takes tokens for its encoder and for its decoder, and inputs that are compiled are plain tokens alone"
        )
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        return "it takes tokens and images together; each of its two towers can be compiled by itself"
    return None


class _Compiled:
    """A model's `forward` that runs compiled graphs on token batches and gives everything else to the original."""

    def __init__(self, model: nn.Module, eager: Any, *, graphs: Graphs | None, compiler: bool) -> None:
        self._model = model
        self.eager = eager
        self._graphs = graphs
        self._compiler = compiler
        self._in_process: _InProcess | None = None
        self._largest = LargestInput()
        self._sizes: set[tuple[int, ...]] = set()
        self._main_input = getattr(model, "main_input_name", TOKENS[0])
        self._own = types.MethodType(type(model).forward, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        unusual = torch.is_grad_enabled() or self._model.training or not torch.backends.mkldnn.enabled
        if len(args) > 1 or unusual or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.eager(*args, **kwargs)
        inputs = dict(zip((self._main_input,), args, strict=False)) | kwargs
        # One tensor, so that all have the same dynamic shape.
        with torch.inference_mode(False):  # torch.compile would take a tensor made in it for another kind
            found = self._images(inputs) or self._tokens(inputs)
        if found is None or found[1].device.type != "cpu":
            return self.eager(*args, **kwargs)
        names, stacked = found
        with self._largest.of(stacked[0].numel()):
            answer = self._compiled(names, stacked, *args, **kwargs)
        if stacked.dim() > 3:
            self._sizes.add(stacked.shape[2:])
        return answer

    def _images(self, inputs: dict[str, Any]) -> tuple[tuple[str, ...], Tensor] | None:
        """Names, and float32 `[1, batch, channels, height, width]`, of images alone; None if `inputs` are something else."""
        pixels = inputs.get(self._main_input)
        if self._main_input != "pixel_values" or len(inputs) != 1 or not isinstance(pixels, Tensor):
            return None
        if pixels.dim() != 4 or not len(pixels) or pixels.dtype != torch.float32:
            return None
        sizes = self._sizes | {pixels.shape[1:]}
        # A copy, as the model may write into its input.
        copy = pixels.detach().clone(memory_format=torch.contiguous_format)
        return ((self._main_input,), copy[None]) if len(sizes) <= SIZES else None

    def _tokens(self, inputs: dict[str, Any]) -> tuple[tuple[str, ...], Tensor] | None:
        """Names, and int64 `[names, batch, length]`, of plain tokens; None if `inputs` are something else."""
        # A graph for any batch is not one for none: what it computes for a part of its rows, it may divide by.
        if not is_token_batch(inputs) or inputs["input_ids"].shape[1] < 2 or not len(inputs["input_ids"]):
            return None
        if "attention_mask" not in inputs and not self._has_padding(inputs["input_ids"]):
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        names = tuple(sorted(inputs))
        return names, torch.stack([inputs[name].long() for name in names])

    def _compiled(self, names: tuple[str, ...], stacked: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`stacked`: the tensors of `names`, in which there may be more than in the other arguments."""
        graphs = self._graphs
        graph = graphs.find(names, stacked) if graphs else None
        if graph is None and graphs and graphs.may_make(names, stacked):
            eager = functools.partial(self._eager_of, names) if self._compiler else None
            try:
                graph = graphs.make(names, stacked, eager=eager)
            except (CompilerError, WrongAnswerError) as error:
                self._give_up(error)
        if graph is not None:
            return graph(stacked)
        if not self._compiler:
            return self.eager(*args, **kwargs)
        if self._in_process is None:
            warnings.warn(
                f"hfq.compile compiles {type(self._model).__name__} for this process alone, and anew in each, which may "
                "take minutes: it, or what it puts out, is of a class that cannot be kept.",
                stacklevel=4,
            )
            self._in_process = _InProcess(self._own, self._eager_of)
        try:
            return self._in_process(names, stacked)
        except Exception as error:  # any of torch's
            answer = self.eager(*args, **kwargs)  # which says what is wrong with the inputs, if that is it
            self._give_up(error)
            return answer

    def _eager_of(self, names: tuple[str, ...], stacked: Tensor) -> Any:
        return self.eager(**dict(zip(names, stacked.unbind(), strict=True)))

    def _has_padding(self, ids: Tensor) -> bool:
        """Whether some are those of padding, from which a few models make a mask of their own."""
        padding = getattr(getattr(self._model, "config", None), "pad_token_id", None)
        return padding is not None and bool(ids.eq(padding).any())

    def _give_up(self, error: Exception) -> None:
        """Compile nothing further in this process."""
        self._compiler = False
        if self._graphs is None or not self._graphs.has_loaded():
            self._graphs = None
            lay_out_for_kernels(self._model)
        name = type(self._model).__name__
        warnings.warn(f"hfq.compile failed: {name} runs uncompiled, with its own answers. {error}", stacklevel=4)


class _InProcess:
    """torch.compile of a forward, with what it sees as constants (freezing). `eager` is what it is to answer as."""

    def __init__(self, forward: Any, eager: Callable[[tuple[str, ...], Tensor], Any]) -> None:
        _keep_on_disk()
        self._own = forward
        self._eager = eager
        # Guards on modules would be checked at each call, for a tenth of the time that a single input takes.
        guards: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self._compiled = torch.compile(self._unstacked, options=guards)

    def __call__(self, names: tuple[str, ...], stacked: Tensor) -> Any:
        # Frozen weights are ordinary tensors, and inference mode would hand the compiler something else.
        with torch.inference_mode(False), torch.no_grad(), _settings():
            frames = _compiled_frames()
            answer = self._run(names, stacked)
            if _compiled_frames() != frames:
                self._check(names, stacked)
            return answer

    def _run(self, names: tuple[str, ...], stacked: Tensor) -> Any:
        for dimension in dynamic_axes(stacked):
            torch._dynamo.maybe_mark_dynamic(stacked, dimension)
        return self._compiled(names, stacked)

    def _check(self, names: tuple[str, ...], stacked: Tensor) -> None:
        """See that what was just compiled is right.

        Raises:
            WrongAnswerError: it is not.
        """
        compiled, eager = functools.partial(self._run, names), functools.partial(self._eager, names)
        difference = differs(compiled, eager, stacked)
        if difference is not None:
            raise WrongAnswerError(said(difference))

    def _unstacked(self, names: tuple[str, ...], inputs: Tensor) -> Any:
        return self._own(**dict(zip(names, inputs.unbind(), strict=True)))


def _compiled_frames() -> int:
    from torch._dynamo.utils import counters

    return counters["frames"]["ok"]


@contextmanager
def _settings() -> Iterator[None]:
    """Inductor's setting while it compiles: constants folded."""
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True):
        yield


def cache_folder() -> Path:
    """Where compiled code is kept: the folder that the user named for inductor's, or one in the Hub client's cache."""
    from huggingface_hub import constants

    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named and "torch._inductor" in sys.modules:  # which writes its own default, a temporary folder, there
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        named = None if named == default_cache_dir() else named
    return Path(named or Path(constants.HF_HOME) / "hfq" / "compiled")


def _keep_on_disk() -> None:
    """Have inductor keep what it compiles in this process there too."""
    folder = str(cache_folder())
    import torch._inductor.config  # noqa: F401 - sets the variable

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def has_compiler() -> bool:
    """Whether there is the C++ compiler that inductor would call. Asking inductor takes a second and 70 MiB."""
    return shutil.which(os.environ.get("CXX") or _COMPILERS.get(sys.platform, "g++")) is not None


_COMPILERS = {"darwin": "clang++", "win32": "cl"}
