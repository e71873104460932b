"""The int8 twin of `nn.Linear`, with the tensors compressed-tensors stores on disk."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...common.memory import keep_freed_memory
from ..fusion.first_token import of_first_token
from ..kernels import sharing
from ..kernels.checked import CheckedKernel
from ..kernels.kernel import Epilogue, Kernel, PostOp, added, apply_post_op, quantize_uint8, token_scale
from ..kernels.portable import PortableKernel
from ..kernels.selection import select_kernel
from .gradients import straight_through
from .known_forward import KnownForward
from .narrowing import Narrowing
from .packed import PACKING, PackedModule, frozen, input_codes
from .recording import is_recorded, recorded_codes

if TYPE_CHECKING:
    from .conv import Int8Conv
    from .shared_matmul import SharedMatmul

Activation = Literal["static", "dynamic", "weight-only"]


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
        self._writers: list[Int8Linear] = []  # whose reader this is
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
        for reader in self._reader or ():
            reader._writers.remove(self)
        self._reader = None if consumer is None else (consumer,)
        for reader in self._reader or ():
            reader._writers.append(self)
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
            if self._group is not None and not self._group.is_possible:
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
        for writer in self._writers:  # its codes are of the input scale that this layer had
            writer.unpack()
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

    Of one layer, or of several that read the same input with the same scale: their rows, one after the other. Who
    changes a layer's `bias` or `weight_scale` in place, by bias correction say, changes what is computed.
    """

    def __init__(self, modules: "Sequence[Int8Linear | Int8Conv]", kernel: Kernel) -> None:
        keep_freed_memory()
        first = modules[0]
        self.activation = first.activation
        self.kernel: Kernel = PortableKernel() if self.activation == "weight-only" else kernel
        self.in_features = first.in_features
        rows = [module.weight_rows()[0] for module in modules]
        small = [(module.weight_scale, module.bias) for module in modules]
        with torch.inference_mode(False), torch.no_grad():
            self.scale, self.bias = _joined(small)
        self._unshared = [] if _share(small, self.scale, self.bias) else small
        from_file = all(module._in_file_at is not None for module in modules)
        self.parameter: nn.Parameter | None = None
        plain, codes = first._parameters.get("weight"), rows[0]
        if self.activation == "weight-only" and plain is not None and codes.data_ptr() == plain.data_ptr():
            self.parameter, self.weight = plain, codes  # the embeddings', which are there anyhow
        else:
            self.weight = sharing.pack(self.kernel, rows, self.scale, from_file=from_file)
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
        scale, bias = _joined(self._unshared) if self._unshared else (self.scale, self.bias)
        if self.activation == "weight-only":
            weight = self.weight.to(x.dtype) * scale[:, None].to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
            y = apply_post_op(nn.functional.linear(x, weight, bias), post_op)
            return y if residual is None else added(y, residual)
        if self.activation == "dynamic":
            y = self.kernel.dynamic(x, self.weight, scale, bias, post_op=post_op)
            y = y if y.dtype == x.dtype else y.to(x.dtype)
            return y if residual is None else added(y, residual)
        codes = x if x.dtype == torch.uint8 else quantize_uint8(x.float(), self.input_scale, self.zero_point)
        narrow = not alone and self.narrowing is not None and residual is None and self.narrowing.active
        dtype = torch.bfloat16 if narrow else torch.float32
        output = None if alone else self.output
        y = self.kernel.static(
            codes,
            self.weight,
            scale,
            bias,
            (self.input_scale, self.zero_point),
            Epilogue(post_op, output, residual, in_place, dtype),
        )
        if output or narrow:
            return y
        dtype = self.dtype if x.dtype == torch.uint8 else x.dtype
        return y if y.dtype == dtype else y.to(dtype)

    def unpack(self) -> Tensor:
        return self.as_stored(self.kernel.unpack(self.weight, self.scale, self.in_features))


def packed_linears(model: nn.Module) -> list["PackedLinear"]:
    """What the packed layers of `model` multiply with, each once."""
    found = (module.packed_linear for module in model.modules() if isinstance(module, Int8Linear))
    return list({id(packed): packed for packed in found if packed is not None}.values())


def _joined(small: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Scales and biases of layers, one after the other: float32 `[sum of out]`. Of one layer, its own where they are that."""
    scales = [scale.detach().float().reshape(-1) for scale, _ in small]
    if all(bias is None for _, bias in small):
        return _one(scales), None
    pairs = zip(scales, (bias for _, bias in small), strict=True)
    return _one(scales), _one([torch.zeros_like(x) if bias is None else bias.detach().float() for x, bias in pairs])


def _one(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _share(small: Sequence[tuple[Tensor, Tensor | None]], scale: Tensor, bias: Tensor | None) -> bool:
    """Move the layers' `small` tensors into the memory of `scale` and `bias`, their numbers one after the other.

    Returns: whether they are there. Those of another dtype, and made in inference mode, stay where they are.
    """
    tensors = [tensor for pair in small for tensor in pair if tensor is not None]
    if any(tensor.dtype != torch.float32 or tensor.is_inference() for tensor in tensors):
        return False
    if len(small) > 1:
        sizes = [tensor.numel() for tensor, _ in small]
        biases = [None] * len(small) if bias is None else bias.split(sizes)
        for (own_scale, own_bias), part, bias_part in zip(small, scale.split(sizes), biases, strict=True):
            own_scale.data = part.view_as(own_scale)
            if own_bias is not None and bias_part is not None:
                own_bias.data = bias_part
    return True
