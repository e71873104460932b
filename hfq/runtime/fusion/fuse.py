"""Work that int8 layers can share: a matmul with the activation function that follows it, with quantizing for the
layer that reads the result, with the sum that follows it, and with the layers that read the same input; and bfloat16
attention between them.

They are found by structure and by what one forward shows (`hfq.runtime.fusion.flow`), no matmul run for it: no list of model
names, nothing assumed about anybody's `forward`.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...common.errors import UsageError
from ...common.memory import return_freed_memory
from ..direct.forward import run_directly as run_convolutions
from ..inputs import example_of, takes_numbers
from ..int8.conv import Int8Conv
from ..int8.known_forward import FUSED, FusedForward, KnownForward, Structure, enter, runs_known_code
from ..int8.linear import Int8Linear
from ..int8.packed import PACKING, input_codes, pack_all
from ..int8.shared_matmul import SharedMatmul
from ..kernels import cpu
from . import attention
from .activation import fuse_activations
from .encoder_layer import run_directly
from .flow import Flow, ignores_padding, last_readers, read_for_first_token, trace
from .planning import Plans
from .record import Record, Records
from .residual import fuse_residual
from .slicing import SlicedForward, slice_batches
from .snapshot import many_unchanged

Then = Callable[[nn.Module], None]


def fuse(
    model: nn.Module, *, at_first_forward: bool = False, then: Then | None = None, records: Records | None = None
) -> None:
    """Fuse in place wherever it is proved equal and `HFQ_FUSIONS` allows it.

    What needs a forward is tried on the `dummy_inputs` of the model, or of the models it is built around.

    Args:
        at_first_forward: leave to the first forward, or to `finish_fusing`, what may be left to it.
        then: what that forward is to do after it.
        records: of what was found in such models before, and where to keep what is found.

    Raises:
        UsageError: `HFQ_FUSIONS` names a fusion that does not exist.
    """
    wanted = wanted_fusions()
    known = known_of(model)
    if "activation" in wanted:
        # Never later: a thread that is between a layer and its activation function would skip it, or do it twice.
        fuse_activations(model, known)
    _note_group_norms(model)
    if "slices" in wanted and isinstance(model, PreTrainedModel):
        slice_batches(model, known)
    if at_first_forward or Structure(model).is_watched():  # no hook is to see examples
        _enter(model, known)
        enter(model, known).at_first = _AtFirstForward(wanted, then, records)
    else:
        _fuse_calls(model, wanted, records)


def _note_group_norms(model: nn.Module) -> None:
    """Tell convolutions that have one as a sibling: what they return is then laid out for it."""
    for parent in model.modules():
        if any(isinstance(child, nn.GroupNorm) for child in parent.children()):
            for child in parent.children():
                if isinstance(child, Int8Conv):
                    child.feeds_group_norm = True


def known_of(model: nn.Module) -> KnownForward:
    """What says to layers of `model` what may be done: what does already, or a new one."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    known = next(filter(None, (layer.fused_in for layer in layers)), None) or KnownForward()
    for layer in layers:
        layer.fused_in = layer.fused_in or known
    return known


def _enter(model: nn.Module, known: KnownForward) -> None:
    """Let forwards of `model`, and of transformers' models in it, tell layers what may be done in them, if it is as now."""
    forwards = []
    for module in list(model.modules()):
        if module is model or isinstance(module, PreTrainedModel):
            forwards.append(enter(module, known))
            forwards[-1].inner = module is not model
    for forward in forwards:
        forward.look_again()


def finish_fusing(model: nn.Module) -> None:
    """Do now what `fuse` left to the first forward of `model`, or of a model in it."""
    for module in list(model.modules()):
        forward = module.__dict__.get("forward")
        if isinstance(forward, FusedForward) and isinstance(forward.at_first, _AtFirstForward):
            forward.at_first.fuse(module)


def wanted_fusions() -> tuple[str, ...]:
    """Names from `HFQ_FUSIONS`: comma-separated, or one of the sets "exact", "all" and "none".

    The default is "exact", and attention with products of bfloat16 where that keeps scores in float32: compiled on CPUs
    that multiply bfloat16, uncompiled too on those with AMX. It moves the outputs of a float model a fortieth as far as
    int8 does (MiniLM, logits). Where the CPU has bfloat16, compiled code also keeps normed numbers so from one residual
    sum to the next; the codes that matmuls read are made before they are rounded.

    Behind bfloat16, codes round another way than in stock transformers, which then agrees on fewer outputs: 98.1 % of
    MRPC's test split with AMX (MiniLM). With "exact" it is 99.0 % of 408 pairs that chose nothing (AVX2). Of the time,
    "exact" costs MiniLM up to 3 % below 256 tokens and 17 % there, BERT-base 8 to 30 % (uncompiled, AMX, two threads).

    Raises:
        UsageError: there is no fusion of that name.
    """
    setting = os.environ.get("HFQ_FUSIONS")
    if not setting:
        close = {
            "compiled-attention": cpu.can_compile(),
            "compiled-residual": cpu.compiles_to_bfloat16(),
            "attention": cpu.multiplies_in_tiles(),
        }
        return (*EXACT, *(name for name, here in close.items() if here))
    if setting in FUSION_SETS:
        return FUSION_SETS[setting]
    names = tuple(name.strip() for name in setting.split(","))
    if unknown := [name for name in names if name not in FUSION_SETS["all"]]:
        raise UsageError(
            f"HFQ_FUSIONS names {', '.join(map(repr, unknown))}; expected one of {', '.join(FUSION_SETS)}, "
            f"or some of {', '.join(FUSION_SETS['all'])}."
        )
    return names


class _AtFirstForward:
    """What a model calls before its forward. It works once, then it is gone.

    Other threads' forwards wait for it. One may be in a part of the model: what it changes may change between any two
    calls of theirs, and a layer that they call meanwhile waits, as for packing.
    """

    def __init__(self, wanted: tuple[str, ...], then: Then | None, records: Records | None) -> None:
        self.wanted = wanted
        self.then = then
        self.records = records
        self._has_begun = False  # the search calls the model itself

    def __call__(self, model: nn.Module) -> None:
        if self.fuse(model):
            pack_all(model)  # at once, so that what this leaves is given back before there are activations
            return_freed_memory()
            if self.then is not None:
                self.then(model)

    def fuse(self, model: nn.Module) -> bool:
        """Do it. Returns: whether it was done by this call."""
        if model.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False  # dropout would hide the flow, and a compiler would take the search for a part of the model
        with PACKING:
            forward = model.__dict__.get("forward")
            if not isinstance(forward, FusedForward) or forward.at_first is not self or self._has_begun:
                return False
            if not forward.is_as_it_was() or any(m._backward_hooks for m in model.modules()):
                return False  # what a user put there meanwhile is not to see examples
            self._has_begun = True
            try:
                _fuse_calls(model, self.wanted, self.records)
            finally:
                forward.at_first = None  # not before: other threads would run what is half fused
            return True


def _fuse_calls(model: nn.Module, wanted: tuple[str, ...], records: Records | None) -> None:
    """The fusions that change what layers do when they are called, and nothing that a block holds on to."""
    known = known_of(model)
    with known.running(FUSED):
        record = records.find(model, wanted) if records else None
        if record is not None:
            record.repeat(model, known)
        else:
            _look_for_fusions(model, wanted, known)
            if records is not None:
                records.keep(Record.of(model))
        if "plan" in wanted:
            _plan(model)
    _enter(model, known)
    if "convolutions" in wanted:
        run_convolutions(model)


def _look_for_fusions(model: nn.Module, wanted: tuple[str, ...], known: KnownForward) -> None:
    """Fuse what forwards on examples show."""
    if "residual" in wanted:
        for parent in list(model.modules()):
            fuse_residual(parent)
    for part, example in _examples(model):
        with many_unchanged(part):
            flow = _fuse_flow(part, example, wanted)
        if "attention" in wanted and part is model:
            _fuse_attention(model, example, flow)
    directly = {"encoder-layer", "residual"}.issubset(wanted)  # it adds in matmuls
    if directly and isinstance(model.__dict__.get("forward"), SlicedForward) and _is_told(model):
        run_directly(model, known, narrow="attention" in wanted and cpu.multiplies_in_tiles())


def _plan(model: nn.Module) -> None:
    """Let short forwards of `model` run as plans, if nothing in it does more than compute an output."""
    forward = model.__dict__.get("forward")
    if isinstance(forward, SlicedForward) and all(map(runs_known_code, model.modules())):
        forward.plans = Plans(model)


def _examples(model: nn.Module) -> Iterator[tuple[nn.Module, Mapping[str, Tensor]]]:
    """The model, or the models it is built around, each with an input that suits it."""
    example = getattr(model, "dummy_inputs", None)
    if example is None:
        for child in model.children():
            yield from _examples(child)
    elif takes_numbers(model):  # transformers' example is of tokens all the same
        with suppress(AttributeError):  # a config that does not say what it takes
            yield model, example_of(model)
    else:
        yield model, example


def _fuse_flow(model: nn.Module, example: Mapping[str, Tensor], wanted: Sequence[str]) -> Flow | None:
    """Fuse what hands tensors from layer to layer, as one forward on `example` shows it; another shows that it runs.

    Returns: what the first one showed. None, too, of images without two layers between which anything could flow: a
    trace keeps all activations.
    """
    if "input_ids" not in example and sum(isinstance(module, Int8Linear) for module in model.modules()) < 2:
        return None
    flow = trace(model, example)
    usual = flow is not None
    if not usual:
        found = ((flow, longer) for longer in _longer(model, example) if (flow := trace(model, longer)) is not None)
        flow, example = next(found, (None, example))
    if flow is None:
        return None
    forward = model.__dict__.get("forward")
    if usual and isinstance(forward, SlicedForward):
        forward.cuts_padding = forward.cuts_padding or ignores_padding(model, example)
        if not _is_told(model):
            _tell_of_known_forwards(model, example, flow, known=forward.known, wanted=wanted)
    undo = [fusion(flow) for name, fusion in FLOW_FUSIONS.items() if name in wanted]
    while undo and not _same_forms(flow, trace(model, example)):
        undo.pop()()
    return flow


def _longer(model: nn.Module, example: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Longer texts than `example`, for models that do something else with short ones."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", 0) if "input_ids" in example else 0
    for length in (128 << i for i in range(6)):
        if length <= most:
            yield {"input_ids": example["input_ids"][:1].repeat(1, length)[:, :length]}


Fusion = Callable[[Flow], Callable[[], None]]  # does it, and returns what undoes it


def _tell_of_known_forwards(
    model: nn.Module, example: Mapping[str, Tensor], flow: Flow, *, known: KnownForward, wanted: Sequence[str]
) -> None:
    """Have layers compute no more than the first token of each row where `model` reads no more of it, and add in place."""
    layers = read_for_first_token(model, example, flow) if "first-token" in wanted else []
    adding = set()
    if "residual" in wanted and all(map(runs_known_code, model.modules())):
        adding = last_readers(model, example, flow)
    for layer in layers:
        layer.first_token = known
    for layer in adding:
        layer.in_place = known


def _is_told(model: nn.Module) -> bool:
    """Whether it was found what layers of `model` may leave out."""
    return any(isinstance(m, Int8Linear) and (m.first_token or m.in_place) is not None for m in model.modules())


def _requantization(flow: Flow) -> Callable[[], None]:
    """Let a layer whose output only another static layer reads hand it int8 codes instead of floats."""
    pairs = [
        (producer, consumer)
        for producer, consumer in flow.direct_pairs()
        if producer.activation == consumer.activation == "static" and producer.shared_matmul is None
    ]
    for producer, consumer in pairs:
        producer.emit_codes_for(consumer)

    def undo() -> None:
        for producer, _ in pairs:
            producer.emit_codes_for(None)

    return undo


def _shared_matmuls(flow: Flow) -> Callable[[], None]:
    """Let layers that are given the very same tensor (query, key and value) multiply, and quantize it, together."""

    def codes(layer: Int8Linear) -> object:
        kind = layer.activation if layer.is_plain else id(layer)  # one with a fusion of its own keeps to itself
        return kind, type(layer), input_codes(layer) if layer.activation == "static" else None

    groups = [SharedMatmul(layers) for layers in flow.common_readers(codes) if type(layers[0]) is Int8Linear]

    def undo() -> None:  # somebody needs the output contiguous
        for group in groups:
            group.dissolve()

    return undo


def _fuse_attention(model: nn.Module, example: Mapping[str, Tensor], flow: Flow | None) -> None:
    """Let a transformers model use `hfq.runtime.fusion.attention` where it would use torch's, on bfloat16 where that is all it reads."""
    if not isinstance(model, PreTrainedModel) or not attention.can_replace(model):
        return
    narrowing = attention.use(model)
    layers = flow.read_by_attention() if flow is not None else []
    layers = [layer for layer in layers if layer.activation == "static" and type(layer) is Int8Linear]
    for layer in layers:
        layer.narrow(narrowing)
    if layers and not _same_forms(flow, trace(model, example)):
        for layer in layers:
            layer.narrow(None)


FLOW_FUSIONS: dict[str, Fusion] = {
    "requantization": _requantization,
    "shared-matmul": _shared_matmuls,
}
# Up to requantization error.
EXACT = (
    "activation", "residual", *FLOW_FUSIONS, "slices", "first-token", "encoder-layer", "plan", "convolutions",
    "compiled-matmul",
)  # fmt: skip
FUSION_SETS: dict[str, tuple[str, ...]] = {
    "exact": EXACT,
    "all": (*EXACT, "compiled-attention", "compiled-residual", "attention"),
    "none": (),
}


def _same_forms(before: Flow | None, after: Flow | None) -> bool:
    return before is not None and after is not None and before.forms == after.forms
