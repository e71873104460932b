"""Int8 twins of `nn.Linear` and `nn.Embedding`, with the tensors compressed-tensors stores on disk.

A module's `state_dict` is its checkpoint entry, whatever layout the kernel keeps the weight in.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing.context import get_spawning_popen
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ...common.memory import drop_file_pages, keep_freed_memory
from ..fusion.first_token import of_first_token
from ..kernels import sharing
from ..kernels.checked import CheckedKernel
from ..kernels.kernel import (
    Epilogue,
    Kernel,
    PortableKernel,
    PostOp,
    added,
    apply_post_op,
    quantize_uint8,
    token_scale,
)
from ..kernels.selection import select_kernel
from .gradients import straight_through
from .known_forward import KnownForward
from .narrowing import Narrowing

Activation = Literal["static", "dynamic", "weight-only"]
PACKING = threading.RLock()  # a weight is packed once, even if the first two requests come at the same time


class PackedModule(nn.Module):
    """A module that hands its int8 `weight` to a kernel and keeps no second copy of it.

    State and attributes show the plain weight all the same.
    """

    weight_scale: nn.Parameter
    weight_shape: tuple[int, ...]
    _packed: "PackedWeight | None"
    _in_file_at: int | None = None  # address of a weight that lies in a mapped checkpoint file

    def make_packed(self) -> "PackedWeight | None":
        """The weight in the layout of this CPU's kernel; None where the plain weight is what runs."""
        raise NotImplementedError

    def pack(self) -> Any:
        """Hand the weight over, and return what it became. The first forward does it, unless `pack_all` did."""
        with PACKING:
            if self._packed is None and not self.has_plain_weight:
                return self.make_packed()
            if self._packed is None and (packed := self.make_packed()) is not None:
                self.hand_over(packed)
            return self._packed

    @property
    def has_plain_weight(self) -> bool:
        """Whether it is the module's parameter; else torch computes it anew for each forward, from parametrizations or a mask."""
        return self._packed is not None or "weight" in self._parameters

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module's. Who puts another parameter beside the weight, a mask say, wants to find it as it was."""
        if self.__dict__.get("_packed") is not None:
            self.free_weight()
        super().register_parameter(name, param)

    def free_weight(self) -> None:
        """Have the weight for itself, as a plain parameter."""
        self.unpack()

    def hand_over(self, packed: "PackedWeight") -> None:
        """Take `packed` in the place of the plain weight."""
        self._packed = packed  # first: another thread may look at the weight
        weight = self._parameters.pop("weight")
        if weight is not None and weight.data_ptr() == self._in_file_at:
            drop_file_pages(weight)

    def unpack(self) -> None:
        """Take the weight back as a plain parameter."""
        if self._packed is not None:
            self._parameters["weight"] = frozen(self._packed.unpack())
            self._packed = None

    def __getattr__(self, name: str) -> Any:
        packed: PackedWeight | None = self.__dict__.get("_packed")
        if name == "parametrizations":  # whoever asks for them looks for the weight next, among parameters
            self.free_weight()
        if name == "weight" and packed is not None:
            return frozen(packed.unpack())  # for model code that looks at a weight's dtype or device
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the plain weight: packed tensors are opaque and belong to this CPU."""
        state = self.__dict__.copy()
        if self._packed is not None:
            weight = frozen(self._packed.unpack())
            started = get_spawning_popen() is not None
            state["_parameters"] = {**self._parameters, "weight": _ByValue(weight) if started else weight}
            state["_packed"] = None
        return state

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedModule":
        moved = fn(self.weight_scale)
        if moved.device != self.weight_scale.device or moved.dtype != self.weight_scale.dtype:
            self.unpack()  # what was packed was made from the tensors as they were
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._packed is not None:
            destination[f"{prefix}weight_scale"] = None  # keeps its place, which is before the weight's
            destination[f"{prefix}weight"] = self._packed.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args)


class _ByValue:
    """A weight that is written into the pickle for a process that is being started.

    torch would hand over a descriptor of its memory, when all is pickled: too late for a tensor made for the pickle.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __reduce__(self) -> tuple[Any, ...]:
        return _weight_of, (self._weight.detach().numpy(),)


class PackedWeight(Protocol):
    """What a kernel computes with. `unpack` gives the int8 weight back, bit for bit."""

    def unpack(self) -> Tensor: ...


class Int8Linear(PackedModule):
    """`y = x W^T + b` with int8 weights (per output channel) and int8 activations, or float ones with "weight-only".

    State: `weight` int8 `[out, in]`, `weight_scale` float32 `[out, 1]`, `bias` float `[out]` or absent;
    with static activations also `input_scale` float32 `[1]` and `input_zero_point` int8 `[1]`.
    `post_op`: an activation function computed with the matmul (`hfq.runtime.fusion`); not part of the state.
    `first_token`: the forwards in which its outputs are read for no further token (`hfq.runtime.fusion.first_token`).
    `in_place`: the forwards in which what is added to its outputs is read by nobody afterwards (`hfq.runtime.fusion.residual`).
    `narrowing`: says whether they are bfloat16 whatever the input is (`hfq.runtime.int8.narrowing`).
    `fused_in`: the forwards in which it does the work of others at all; in any other it computes what a Linear does.
    A gradient flows through it (`hfq.runtime.int8.gradients`), and none to its tensors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        activation: Activation,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.weight_shape, scale_shape = self.stored_shapes(in_features, out_features)
        # Scales come first: who asks a model's first parameter for its dtype gets a float.
        self.weight_scale = frozen(torch.empty(scale_shape, device=device))
        self.weight = frozen(torch.empty(self.weight_shape, dtype=torch.int8, device=device))
        if activation == "static":
            self.input_scale = frozen(torch.empty(1, device=device))
            self.input_zero_point = frozen(torch.empty(1, dtype=torch.int8, device=device))
        self.register_parameter("bias", frozen(torch.empty(out_features, device=device)) if bias else None)
        self.post_op: PostOp | None = None
        self.first_token: KnownForward | None = None
        self.in_place: KnownForward | None = None
        self.narrowing: Narrowing | None = None
        self.fused_in: KnownForward | None = None
        self._reader: tuple[Int8Linear] | None = None  # in a tuple: it is another module's child, not ours
        self._group: SharedMatmul | None = None
        self._packed: Any = None  # PackedLinear or _Slice

    def forward(self, x: Tensor, residual: Tensor | None = None, *, in_place: bool = False) -> Tensor:
        """float `[.., in]` to the same dtype, `[.., out]`. uint8 is taken as the codes of this layer's input scale.

        `residual`, float `[.., out]`, is added to the result; only where the layer `is_plain`. `in_place`: nobody reads
        it any more, so the sum may take its memory.
        """
        if not torch.is_grad_enabled():
            return self._compute(x, residual, in_place)
        if x.requires_grad or (residual is not None and residual.requires_grad):
            if residual is not None or (self.fused_in or KnownForward()).fuses:
                raise RuntimeError(
                    "A gradient is wanted of an input that hfq did not see, in a forward whose layers are fused. "
                    "Load the model with HFQ_FUSIONS=none in the environment."
                )
            return straight_through(x, self, lambda x: self._compute(x, None, False))
        with torch.no_grad():
            return self._compute(x, residual, False)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """float32 `[.., in]` of `[.., out]`."""
        codes, scale = self.weight_rows()
        return (gradient * scale) @ codes.float()

    def _compute(self, x: Tensor, residual: Tensor | None, in_place: bool) -> Tensor:
        alone = self.fused_in is not None and not self.fused_in.fuses
        if is_recorded() and (alone or self.is_plain):
            return self._recorded(x)
        packed = self._packed or self.pack()
        if alone:
            products: Tensor = packed.alone(x)
            return products
        if self.first_token is not None and self.first_token.under_way:
            return of_first_token(lambda x, residual: packed(x, self.post_op, residual, in_place), x, residual)
        y: Tensor = packed(x, self.post_op, residual, in_place)
        return y

    def _recorded(self, x: Tensor) -> Tensor:
        """Its output, from its tensors alone and in operations that run anywhere. Sums are float32's."""
        with unrecorded() if self._packed is not None else nullcontext():
            weight = self.weight_rows()[0].float()
        scale = self.weight_scale.reshape(-1)
        if self.activation == "weight-only":
            y = nn.functional.linear(x.float(), weight) * scale
        elif self.activation == "dynamic":
            row_scale = token_scale(x.float())
            y = nn.functional.linear((x.float() / row_scale).round().clamp(-128, 127), weight) * scale * row_scale
        else:
            y = nn.functional.linear(recorded_codes(self, x), weight) * (scale * self.input_scale)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def emit_codes_for(self, consumer: "Int8Linear | None") -> None:
        """Return uint8 codes of `consumer`'s input scale from now on, instead of floats; None: floats again."""
        self._reader = None if consumer is None else (consumer,)
        self.unpack()  # the consumer's scale is read when this layer is packed

    def narrow(self, narrowing: Narrowing | None) -> None:
        """Have `narrowing` say whether to return bfloat16; None: never."""
        self.narrowing = narrowing
        self.unpack()

    @property
    def is_plain(self) -> bool:
        """Floats out, no activation function and a matmul of its own: nothing is fused with what it returns."""
        return self.post_op is None and self._reader is None and self._group is None

    @property
    def returns_codes(self) -> bool:
        """Whether its output is another layer's uint8 codes."""
        return self._reader is not None

    @property
    def shared_matmul(self) -> "SharedMatmul | None":
        """The matmul that it shares with layers that read the same tensor."""
        return self._group

    @property
    def packed_linear(self) -> "PackedLinear | None":
        """What it multiplies with, maybe together with others; None before it is packed."""
        packed: PackedLinear | None = self._packed if self._group is None else self._group._packed
        return packed

    def pack(self) -> Any:
        with PACKING:
            if self._group is not None and not all(module.has_plain_weight for module in self._group.modules):
                self._group.dissolve()
            if self._group is None:
                return super().pack()
            if self._packed is None:
                self._group.pack()
            return self._packed

    def make_packed(self) -> "PackedLinear":
        return PackedLinear([self], select_kernel())

    def unpack(self) -> None:
        super().unpack()
        if self._group is not None:
            self._group.release()

    def free_weight(self) -> None:
        if self._group is not None:
            self._group.dissolve()
        self.unpack()

    def weight_rows(self) -> tuple[Tensor, Tensor]:
        """int8 `[out, in]` and float32 `[out]`, as kernels take them.

        Raises:
            TypeError: the weight is not int8 any more.
        """
        if self.weight.dtype != torch.int8:
            raise TypeError(
                f"The weight of an {type(self).__name__} became {self.weight.dtype}: an int8 weight times a mask of int8 "
                "stays one. Prune or parametrize the float model, then quantize it."
            )
        return self.weight.detach(), self.weight_scale.detach().float().reshape(-1)

    @staticmethod
    def stored_shapes(in_features: int, out_features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of `weight` and `weight_scale` in the state."""
        return (out_features, in_features), (out_features, 1)

    @staticmethod
    def as_stored(weight: Tensor) -> Tensor:
        """The layout in which `weight` int8 `[out, in]` is kept in the state."""
        return weight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation}, post_op={self.post_op}"
        )


class PackedLinear:
    """Weights in their kernel's layout, with the scales as the kernel wants them.

    Of one layer, or of several that read the same input with the same scale: their rows, one after the other.
    """

    def __init__(self, modules: Sequence[Int8Linear], kernel: Kernel) -> None:
        keep_freed_memory()
        first = modules[0]
        self.activation = first.activation
        self.kernel: Kernel = PortableKernel() if self.activation == "weight-only" else kernel
        self.in_features = first.in_features
        rows = [module.weight_rows() for module in modules]
        self.scale = torch.cat([scale for _, scale in rows])
        self.bias = None
        if any(module.bias is not None for module in modules):
            self.bias = torch.cat([_bias(module) for module in modules])
        from_file = all(module._in_file_at is not None for module in modules)
        self.weight = sharing.pack(self.kernel, [codes for codes, _ in rows], self.scale, from_file=from_file)
        if isinstance(self.kernel, CheckedKernel) and not self.weight.is_mkldnn:
            self.kernel = PortableKernel()
        self.as_stored = first.as_stored  # a function, not a method: what a module owns is not to own the module
        self.dtype = first.weight_scale.dtype  # of outputs for codes, which have no float dtype to keep
        if self.activation == "static":
            self.input_scale, self.zero_point = input_codes(first)
        self.output = input_codes(first._reader[0]) if first._reader else None
        self.narrowing = first.narrowing if all(module.narrowing for module in modules) else None

    def alone(self, x: Tensor) -> Tensor:
        """float `[.., out]`, whatever it is to be for others."""
        return self._products(x, None, None, False, alone=True)

    def __call__(
        self, x: Tensor, post_op: PostOp | None, residual: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        return self._products(x, post_op, residual, in_place)

    def _products(
        self, x: Tensor, post_op: PostOp | None, residual: Tensor | None, in_place: bool, *, alone: bool = False
    ) -> Tensor:
        if self.activation == "weight-only":
            weight = self.weight.to(x.dtype) * self.scale[:, None].to(x.dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            y = apply_post_op(nn.functional.linear(x, weight, bias), post_op)
            return y if residual is None else added(y, residual)
        if self.activation == "dynamic":
            y = self.kernel.dynamic(x, self.weight, self.scale, self.bias, post_op=post_op)
            y = y if y.dtype == x.dtype else y.to(x.dtype)
            return y if residual is None else added(y, residual)
        codes = x if x.dtype == torch.uint8 else quantize_uint8(x.float(), self.input_scale, self.zero_point)
        narrow = not alone and self.narrowing is not None and residual is None and self.narrowing.active
        dtype = torch.bfloat16 if narrow else torch.float32
        output = None if alone else self.output
        y = self.kernel.static(
            codes,
            self.weight,
            self.scale,
            self.bias,
            (self.input_scale, self.zero_point),
            Epilogue(post_op, output, residual, in_place, dtype),
        )
        if output or narrow:
            return y
        dtype = self.dtype if x.dtype == torch.uint8 else x.dtype
        return y if y.dtype == dtype else y.to(dtype)

    def unpack(self) -> Tensor:
        return self.as_stored(self.kernel.unpack(self.weight, self.scale, self.in_features))


class _Slice:
    """One layer's columns of a matmul that it shares: the first layer to be given a tensor computes it for all."""

    def __init__(self, shared: "SharedMatmul", start: int, stop: int) -> None:
        self.shared = shared
        self.start, self.stop = start, stop

    def __call__(
        self, x: Tensor, post_op: PostOp | None, residual: Tensor | None = None, in_place: bool = False
    ) -> Tensor:
        y = self.shared(x, self.start)[..., self.start : self.stop]
        return y if residual is None else y + residual

    def alone(self, x: Tensor) -> Tensor:
        """Of what `x` is now: the layers before may have been given it before somebody changed it."""
        return self.shared.products(x)[..., self.start : self.stop].contiguous()

    def unpack(self) -> Tensor:
        return self.shared.unpack()[
            self.start : self.stop
        ].clone()  # without the storage of all, which pickles would hold


class SharedMatmul:
    """One matmul of several layers, which are always given the same tensor and have equal input scales.

    It keeps the products of the last input until each layer has taken its columns. A thread has its own.
    """

    def __init__(self, modules: Sequence[Int8Linear]) -> None:
        self.modules = tuple(modules)
        self._packed: PackedLinear | None = None
        self._last = threading.local()
        for module in modules:
            module.unpack()
            module._group = self

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.modules, self._packed, self._last = state["modules"], None, threading.local()

    def pack(self) -> None:
        """Pack the rows of all layers as one weight."""
        self._packed = PackedLinear(self.modules, select_kernel())
        for module, start in zip(self.modules, self.starts, strict=True):
            if module._packed is None:
                module.hand_over(_Slice(self, start, start + module.out_features))

    def products(self, x: Tensor) -> Tensor:
        """float `[.., in]` to `[.., sum of out]`: what all layers return, side by side."""
        packed = self._packed
        if packed is None or any(module._packed is None for module in self.modules):  # one has a new weight
            with PACKING:
                if any(module._packed is None for module in self.modules):
                    self.pack()
                packed = self._packed
        assert packed is not None
        return packed(x, None)

    def unpack(self) -> Tensor:
        """The rows of all layers, int8 `[sum of out, in]`."""
        assert self._packed is not None
        return self._packed.unpack()

    def release(self) -> None:
        """Let go of the packed rows once every layer has taken its own back."""
        if all(module._packed is None for module in self.modules):
            self._packed = None

    def dissolve(self) -> None:
        """Give each layer back a matmul of its own."""
        for module in self.modules:
            module.unpack()
        for module in self.modules:
            module._group = None

    @property
    def is_used(self) -> bool:
        """Whether the layers have no matmuls of their own again."""
        return self.modules[0]._group is self

    @property
    def starts(self) -> list[int]:
        """The first column of each layer."""
        return [sum(module.out_features for module in self.modules[:i]) for i in range(len(self.modules))]

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        last = self._last
        if getattr(last, "input", None) is not x or layer in last.served:
            last.input, last.products, last.served = x, self.products(x), set()
        last.served.add(layer)
        products = last.products
        if len(last.served) == len(self.modules):
            last.input = last.products = None  # keep no activations alive between forwards
        return products


class Int8Embedding(nn.Module):
    """Embedding with int8 rows: `weight` int8 `[rows, dim]`, `weight_scale` float32 `[rows, 1]`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.weight_scale = frozen(torch.empty(num_embeddings, 1, device=device))  # first, as in `Int8Linear`
        self.weight = frozen(torch.empty(num_embeddings, embedding_dim, dtype=torch.int8, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """integer ids `[..]` to float `[.., dim]`, in the dtype of the scales."""
        rows = nn.functional.embedding(ids, self.weight).to(self.weight_scale.dtype)
        return rows.mul_(nn.functional.embedding(ids, self.weight_scale))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def memory_mib(model: nn.Module) -> float:
    """Parameters and buffers in memory, MiB. A packed weight counts as the int8 weight it holds."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[id(tensor)] = tensor.numel() * tensor.element_size()
    packed = sum(
        math.prod(m.weight_shape) for m in model.modules() if isinstance(m, PackedModule) and m._packed is not None
    )
    return (sum(seen.values()) + packed) / 2**20


def state_mib(model: nn.Module) -> float:
    """What of a model is saved, MiB."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 2**20


def pack_all(model: nn.Module) -> None:
    """Pack every int8 layer now, so that the first forward is as fast as the second."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.pack()
    select_kernel().end_block()


def packed_linears(model: nn.Module) -> list["PackedLinear"]:
    """What the packed layers of `model` multiply with, each once."""
    found = (module.packed_linear for module in model.modules() if isinstance(module, Int8Linear))
    return list({id(packed): packed for packed in found if packed is not None}.values())


def unpack_all(model: nn.Module) -> None:
    """Take every weight back from its kernel, one after the other: the state then holds no second copy of them."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.unpack()


def note_files(model: nn.Module, mapped: Sequence[range]) -> None:
    """Have int8 layers know which of their weights lie in `mapped` files: packing lets go of those pages."""
    for module in model.modules():
        if isinstance(module, PackedModule) and module._packed is None:
            address = module.weight.data_ptr()
            module._in_file_at = address if any(address in file for file in mapped) else None


def _bias(module: Int8Linear) -> Tensor:
    return torch.zeros(module.out_features) if module.bias is None else module.bias.detach().float()


def input_codes(module: PackedModule) -> tuple[float, int]:
    """Scale and zero point of `module`'s input as uint8 codes: the int8 zero point on disk is shifted by 128."""
    return module.input_scale.item(), int(module.input_zero_point.item()) + 128


def _weight_of(numbers: Any) -> nn.Parameter:
    return frozen(torch.from_numpy(numbers))


def is_recorded() -> bool:
    """Whether somebody takes down what is computed, to run it elsewhere: packed weights are of no use there."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() and not _ahead.of_packed)


class _Ahead(threading.local):
    of_packed = False


_ahead = _Ahead()


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """For the length of the block, what is exported is to be compiled for the packed weights of this machine."""
    _ahead.of_packed = True
    try:
        yield
    finally:
        _ahead.of_packed = False


def recorded_codes(module: PackedModule, x: Tensor) -> Tensor:
    """Codes of `x` without their zero point, float32."""
    zero_point = module.input_zero_point.float()
    return ((x.float() / module.input_scale).round() + zero_point).clamp(-128, 127) - zero_point


@contextmanager
def unrecorded() -> Iterator[None]:
    """For the length of the block, what is computed is a constant to whoever records."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
