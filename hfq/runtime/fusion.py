"""Work that int8 layers can share: a matmul with the activation function that follows it, with quantizing for the
layer that reads the result, and with the layers that read the same input; and bfloat16 attention between them.

Candidates are found by structure and by what one forward shows, and kept only if the model answers as it did
before: no list of model names, nothing assumed about anybody's `forward`.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..errors import UsageError
from . import attention
from .kernels import return_freed_memory
from .modules import Int8Linear, PostOp, input_codes, share_matmul
from .slicing import slice_batches

EQUAL = 1e-4  # largest relative difference of one layer: the fused erf and tanh are oneDNN's, the others torch's
SAME_ANSWER = 0.02  # relative difference of each output once a code may round the other way


def fuse(model: nn.Module) -> None:
    """Fuse in place wherever it is proved equal and `HFQ_FUSIONS` allows it.

    What needs a forward is tried on the `dummy_inputs` of the model, or of the models it is built around.

    Raises:
        UsageError: `HFQ_FUSIONS` names a fusion that does not exist.
    """
    wanted = wanted_fusions()
    if "activation" in wanted:
        for parent in list(model.modules()):
            _fuse_activation(parent)
    for part in _with_examples(model):
        _fuse_flow(part, part.dummy_inputs, [FLOW_FUSIONS[name] for name in FLOW_FUSIONS if name in wanted])
    if "slices" in wanted and isinstance(model, PreTrainedModel):
        slice_batches(model)
    return_freed_memory()


def wanted_fusions() -> tuple[str, ...]:
    """Names from `HFQ_FUSIONS`: comma-separated, or one of the sets "exact" (the default), "all" and "none".

    bfloat16 attention is not in the default: it rounds scores to 8 bits, which turns int8 codes and, on a small
    model, costs more answers than int8 itself. Who wants its speed asks for it and measures with it.

    Raises:
        UsageError: there is no fusion of that name.
    """
    setting = os.environ.get("HFQ_FUSIONS", "exact")
    if setting in FUSION_SETS:
        return FUSION_SETS[setting]
    names = tuple(name.strip() for name in setting.split(","))
    if unknown := [name for name in names if name not in FUSION_SETS["all"]]:
        raise UsageError(
            f"HFQ_FUSIONS names {', '.join(map(repr, unknown))}; expected one of {', '.join(FUSION_SETS)}, "
            f"or some of {', '.join(FUSION_SETS['all'])}."
        )
    return names


def _with_examples(model: nn.Module) -> Iterator[Any]:
    if getattr(model, "dummy_inputs", None) is not None:
        yield model
        return
    for child in model.children():
        yield from _with_examples(child)


def _fuse_flow(model: nn.Module, example: Mapping[str, Tensor], fusions: Sequence["Fusion"]) -> None:
    """Fuse what hands tensors from layer to layer, as one forward on `example` shows it."""
    before = _answers(model, example)
    if before is None:
        return
    for fusion in fusions:
        apply, undo = fusion(model, example)
        apply()
        after = _answers(model, example)
        if after is None or not _same_answers(before, after):
            undo()


Change = tuple[Callable[[], None], Callable[[], None]]  # do it, and undo it
Fusion = Callable[[nn.Module, Mapping[str, Tensor]], Change]


def _requantization(model: nn.Module, example: Mapping[str, Tensor]) -> Change:
    """Let a layer whose output only another static layer reads hand it int8 codes instead of floats."""
    pairs = _direct_pairs(model, example)

    def apply() -> None:
        for producer, consumer in pairs:
            producer.emit_codes_for(consumer)

    def undo() -> None:  # something else reads one of these tensors, and got codes
        for producer, _ in pairs:
            producer.emit_codes_for(None)

    return apply, undo


def _shared_matmuls(model: nn.Module, example: Mapping[str, Tensor]) -> Change:
    """Let layers that are given the very same tensor (query, key and value) multiply, and quantize it, together."""
    groups = _common_readers(model, example)

    def apply() -> None:
        for group in groups:
            share_matmul(group)

    def undo() -> None:  # somebody needs the output contiguous
        for group in groups:
            for layer in group:
                layer.unpack()

    return apply, undo


def _attention(model: nn.Module, example: Mapping[str, Tensor]) -> Change:
    """Let a transformers model use `hfq.runtime.attention` where it would use torch's."""
    if not isinstance(model, PreTrainedModel) or not attention.can_replace(model):
        return lambda: None, lambda: None
    attention.register()
    return lambda: model.set_attn_implementation(attention.NAME), lambda: model.set_attn_implementation("sdpa")


FLOW_FUSIONS: dict[str, Fusion] = {
    "requantization": _requantization,
    "shared-matmul": _shared_matmuls,
    "attention": _attention,
}
FUSION_SETS: dict[str, tuple[str, ...]] = {
    "exact": ("activation", "requantization", "shared-matmul", "slices"),  # up to requantization error
    "all": ("activation", *FLOW_FUSIONS, "slices"),
    "none": (),
}


def _same_answers(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(
        a.dtype == b.dtype and (a.float() - b.float()).norm() <= SAME_ANSWER * b.float().norm()
        for a, b in zip(after, before, strict=True)
    )


def _direct_pairs(model: nn.Module, example: Mapping[str, Tensor]) -> list[tuple[Int8Linear, Int8Linear]]:
    """(producer, consumer) where the very tensor the one returned is what the other, and no other Linear, was given."""
    made, read = _flow(model, example)
    calls = [module for _, module in made]
    pairs = []
    for tensor, producer in made:
        readers = [module for x, module in read if x is tensor]
        if len(readers) != 1 or calls.count(producer) != 1 or not isinstance(readers[0], Int8Linear):
            continue
        if producer.activation == "static" and readers[0].activation == "static":
            pairs.append((producer, readers[0]))
    return pairs


def _common_readers(model: nn.Module, example: Mapping[str, Tensor]) -> list[list[Int8Linear]]:
    """Int8 layers that were given the very same tensor, and would quantize it to the same codes."""
    made, read = _flow(model, example)
    calls = [module for _, module in made]
    groups: dict[tuple[object, ...], list[Int8Linear]] = {}
    for x, module in read:
        if type(module) is Int8Linear and calls.count(module) == 1 and module.is_plain:
            codes = input_codes(module) if module.activation == "static" else None
            groups.setdefault((id(x), codes), []).append(module)
    return [group for group in groups.values() if len(group) > 1]


def _flow(
    model: nn.Module, example: Mapping[str, Tensor]
) -> tuple[list[tuple[Tensor, Int8Linear]], list[tuple[Tensor, nn.Module]]]:
    """What each int8 layer returned, and what it and each float Linear was given, in the order of one forward."""
    made: list[tuple[Tensor, Int8Linear]] = []
    read: list[tuple[Tensor, nn.Module]] = []
    handles = []
    for module in model.modules():
        if isinstance(module, Int8Linear):
            handles.append(module.register_forward_hook(lambda m, _, y: made.append((y, m))))
        if isinstance(module, Int8Linear | nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda m, args: read.append((args[0], m))))
    try:
        _answers(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return made, read


def _answers(model: nn.Module, example: Mapping[str, Tensor]) -> list[Tensor] | None:
    """Every tensor that the model returns."""
    try:
        with torch.inference_mode():
            return [leaf for leaf in tree_leaves(model(**example)) if isinstance(leaf, Tensor)]
    except Exception:  # the model's own code: an example that does not fit only means that nothing is fused
        return None


def _fuse_activation(parent: nn.Module) -> bool:
    """Replace an activation function among the children by a post-op of the Linear beside it."""
    for linear, name, post_op in _candidates(parent):
        x = torch.randn(4, linear.in_features, generator=torch.Generator().manual_seed(0))
        before = _output(parent, x)
        if before is None:
            continue
        activation = getattr(parent, name)
        linear.post_op = post_op
        setattr(parent, name, nn.Identity())
        after = _output(parent, x)
        if after is not None and _close(before, after):
            return True
        linear.post_op = None
        setattr(parent, name, activation)
    return False


def _candidates(parent: nn.Module) -> Iterator[tuple[Int8Linear, str, PostOp]]:
    children = dict(parent.named_children())
    for name, child in children.items():
        post_op = _post_op(child)
        if post_op is not None:
            for linear in children.values():
                if isinstance(linear, Int8Linear) and linear.post_op is None:
                    yield linear, name, post_op


def _post_op(module: nn.Module) -> PostOp | None:
    """Which function a parameterless module computes, found by asking it."""
    if next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        return None
    x = torch.linspace(-6, 6, 97)
    y = _output(module, x)
    if y is None or y.shape != x.shape:
        return None
    functions: dict[PostOp, Tensor] = {
        "gelu": F.gelu(x),
        "gelu_tanh": F.gelu(x, approximate="tanh"),
        "relu": F.relu(x),
    }
    return next((name for name, value in functions.items() if torch.allclose(y, value, atol=1e-6)), None)


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    try:
        with torch.inference_mode():
            y = module(x)
    except Exception:  # a forward that wants other arguments: not a module this can be done to
        return None
    return y if isinstance(y, Tensor) else None


def _close(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape and bool(
        (before - after).abs().max() <= EQUAL * before.abs().max().clamp(min=1e-6)
    )
