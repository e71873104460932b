"""`hfq.load`: an int8 checkpoint with int8 kernels, its class chosen by its task, or given as a float skeleton."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .common.copies import deep_copy
from .common.errors import DataError, SourceError, UnsupportedError, UsageError
from .common.memory import checkpoint_files, return_freed_memory
from .common.names import INPUT_RANGES
from .runtime.compiling.compile import use_kept
from .runtime.fusion.fuse import finish_fusing, fuse
from .runtime.inside import sentence_transformer, transformers_part
from .runtime.int8.conv import Int8Conv
from .runtime.int8.linear import Int8Linear
from .runtime.int8.packed import note_files, pack_all
from .runtime.loading.input_ranges import take_ranges
from .runtime.loading.swap import is_int8, swap_modules
from .source.bounds import bounded
from .source.checkpoint import Checkpoint, pull
from .source.model import load_tokenizer
from .source.sentence_model import sentence_class
from .tasks.registry import find_architecture, find_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALIGNMENT = 64  # bytes, as torch allocates


def load(
    checkpoint: str | Path,
    *,
    model: nn.Module | None = None,
    revision: str | None = None,
    task: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> "PreTrainedModel | nn.Module":
    """Load an int8 checkpoint, by Hub id or folder, ready to serve. Further arguments go to `from_pretrained`.

    Layers are fused and weights in the layout of this CPU's kernels when it returns; `from_pretrained` leaves that to
    the first forward. A folder of sentence-transformers, where that is installed, is opened as what it is: a
    SentenceTransformer, CrossEncoder or SparseEncoder; with `task`, as the transformers model inside.
    With `HFQ_SHARE=1` in the environment, processes of one user on one host share packed weights,
    by files in the cache folder of the Hub's client, whichever of the two loads them. What `hfq.compile` or `hfq warm`
    compiled for such a model before is used at once, unless `HFQ_COMPILE=off` is in the environment.

    Args:
        model: for a module that is not transformers': one of the class that was quantized, in float and with any
            weights. It is copied, not changed.

    Example:
        >>> model = hfq.load("me/bert-mrpc-int8")
        >>> model(**tokenizer("a", "b", return_tensors="pt")).logits
        >>> net = hfq.load("./saved_model", model=Net())

    Raises:
        SourceError: the checkpoint cannot be pulled or read.
        UnsupportedError: it is not an int8 checkpoint, so there is nothing to run in int8.
        UsageError: it holds a module of the user's own, and `model` is missing.
    """
    import transformers

    found = pull(str(checkpoint), revision=revision, token=token, trust_remote_code=trust_remote_code, hashed=False)
    if model is not None:
        return _ready(_fill(model, found))
    if "hfq_module" in found.config:
        name = found.config["hfq_module"]
        raise UsageError(f"{checkpoint} holds a {name}, which is not transformers'. Pass one: model={name}(…).")
    if task is None and (sentence_model := sentence_class(found.path)) is not None:
        with bounded(found):
            return _checked(sentence_model(str(found.path), device="cpu", **kwargs), checkpoint)
    architecture: Any = find_architecture(found.config)
    if task is not None or architecture is None:
        architecture = getattr(transformers, find_task(found.config, name=task, folder=found.path).auto_class)
    with bounded(found):
        loaded = architecture.from_pretrained(found.path, trust_remote_code=trust_remote_code, **kwargs)
    return _checked(loaded, checkpoint)


def _checked(model: nn.Module, checkpoint: str | Path) -> nn.Module:
    if not any(isinstance(module, Int8Linear | Int8Conv) for module in model.modules()):
        raise UnsupportedError(
            f"{checkpoint} has no layer that runs in int8 here. Expected a checkpoint made by `hfq quantize`; "
            "load a float one with transformers."
        )
    return _ready(model)


def load_with_inputs(checkpoint: str, *, revision: str | None, token: str | None) -> "tuple[nn.Module, list[str]]":
    """As `load`, of sentence-transformers' the model inside; and the names of what its tokenizer makes, if it has one.

    Raises:
        As `load` does.
    """
    model = load(checkpoint, revision=revision, token=token)
    found = pull(checkpoint, revision=revision, token=token, hashed=False)
    model = sentence_transformer(model) or model
    try:
        return model, list(load_tokenizer(found, trust_remote_code=False).model_input_names)
    except DataError:  # a model of images has none
        return model, ["input_ids", "attention_mask"]


def _ready(model: nn.Module) -> nn.Module:
    """Fused and packed now, so that the first request is answered as fast as the second."""
    finish_fusing(model)
    pack_all(model)
    return_freed_memory()
    use_kept(model)
    return model


def _aligned(tensor: Tensor, own: Tensor | None) -> Tensor:
    """A file's tensors begin anywhere in it, and float sums over such a weight are rounded in another order than in memory.

    int8 weights stay in the file until they are packed. Large floats are stored in 16 bits; `own`: what is in their place.
    """
    if tensor.dtype == torch.float16 and own is not None and own.dtype == torch.float32:
        return tensor.float()
    return tensor.clone() if tensor.is_floating_point() and tensor.data_ptr() % _ALIGNMENT else tensor


def _fill(skeleton: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """A copy of `skeleton` with the int8 modules and the tensors of `checkpoint`."""
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    settings = checkpoint.config.get("quantization_config")
    config = QuantizationConfig.model_validate(settings) if settings else None
    if config is None or not is_int8(config):
        raise UnsupportedError(f"{checkpoint.path} is not an int8 checkpoint that hfq can run.")
    model = deep_copy(skeleton).eval().requires_grad_(False)
    part = transformers_part(model)
    if part is not None and "hfq_module" not in checkpoint.config:
        model.set_submodule(part, _fill(model.get_submodule(part), checkpoint))
        return model
    swap_modules(model, config)
    own = model.state_dict()
    state = {
        name: _aligned(tensor, own.get(name)) for path in checkpoint.weights for name, tensor in load_file(path).items()
    }
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise SourceError(
            f"{checkpoint.path} does not fit model, a {type(skeleton).__name__}: {' '.join(str(error).split())}"
        ) from error
    take_ranges(model, (settings or {}).get(INPUT_RANGES) or {})
    note_files(model, checkpoint_files())
    fuse(model)
    return model
