"""Which convolution does whose work: norms folded into it, an activation function and a residual sum in it, and codes
for the next where nobody else reads what it returns.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..int8.conv import Int8Conv
from ..int8.packed import input_codes
from ..kernels.kernel import Codes
from .program import Call, Program
from .steps import Convolution, MaxPool, Operation, PostOp, Quantization, Step

aten = torch.ops.aten
_RELU = PostOp("relu", (), torch.relu_)
_POST_OPS: dict[Any, PostOp] = {
    aten.relu.default: _RELU,
    aten.silu.default: PostOp("swish", (), F.silu),
    aten.hardswish.default: PostOp("hardswish", (), F.hardswish),
}


class Plan:
    """Steps in order, and after each the values that are read no more."""

    def __init__(self, steps: Sequence[Step], outputs: Sequence[int]) -> None:
        self.steps = list(steps)
        self.count = 1 + max((number for step in steps for number in (*step.reads, *step.writes)), default=0)
        last: dict[int, int] = {}
        for position, step in enumerate(steps):
            last |= dict.fromkeys((*step.reads, *step.writes), position)
        last = {number: at for number, at in last.items() if number and number not in outputs}
        self.dead = [[number for number, at in last.items() if at == i] for i in range(len(steps))]
        # A view that an operation returned may be read later than what it is a view of.
        alone = {step.target for step in steps if isinstance(step, Convolution)}
        alone -= {number for step in steps if isinstance(step, Operation) for number in step.reads}
        for step, dead in zip(steps, self.dead, strict=True):
            if isinstance(step, Convolution):
                step.keeps = step.residual not in alone.intersection(dead)

    def run(self, images: Tensor) -> list[Tensor | None]:
        """Values by number, of those that the model returns."""
        values: list[Tensor | None] = [None] * self.count
        values[0] = images
        for step, dead in zip(self.steps, self.dead, strict=True):
            step(values)
            for number in dead:
                values[number] = None
        return values


def planned(program: Program) -> Plan:
    """The steps that compute `program`."""
    return _Planner(program).plan()


class _Planner:
    def __init__(self, program: Program) -> None:
        self.calls = program.calls
        self.outputs = program.outputs
        self.readers: dict[int, list[int]] = defaultdict(list)  # by value, positions of calls
        self.made: dict[int, Call] = {}
        for position, call in enumerate(self.calls):
            for number in call.reads:
                self.readers[number].append(position)
            self.made |= dict.fromkeys(call.outputs, call)
        self.steps: dict[int, Step] = {}  # by the position of the last call that a step computes
        self.done: set[int] = set()  # calls that a step of another call computes
        self.coded: dict[int, Codes] = {}  # values that are kept as codes

    def plan(self) -> Plan:
        for position, call in enumerate(self.calls):
            if position not in self.done:
                at, step = self._convolution(position, call) if _is_convolution(call) else (position, _operation(call))
                self.steps[at] = step
        for step in [step for step in self.steps.values() if isinstance(step, Convolution)]:
            self._emit_codes(step)
        return Plan(self._with_quantizations(), self.outputs)

    def _convolution(self, position: int, call: Call) -> tuple[int, Convolution]:
        """The step of a convolution with all that it can do, and where it is to be: where the last of that was."""
        layer = call.function
        assert isinstance(layer, Int8Conv)
        (source,) = call.reads
        scale = layer.weight_scale.detach().float().reshape(-1)
        offset = None if layer.bias is None else layer.bias.detach().float()
        step = Convolution(layer, source, call.outputs[0], scale, offset)
        if (norm := self._only_reader(step.target)) is not None and _is_norm(self.calls[norm]):
            position = self._take(step, norm)
            factor, shift = _affine(self.calls[norm])
            step.scale = step.scale * factor
            step.offset = shift if step.offset is None else step.offset * factor + shift
        if (total := self._only_reader(step.target)) is not None and _is_sum(self.calls[total]):
            step.residual = next(number for number in self.calls[total].reads if number != step.target)
            position = self._take(step, total)
        if (function := self._only_reader(step.target)) is not None:
            post_op = _post_op(self.calls[function])
            if post_op is not None and (step.residual is None or post_op is _RELU):
                step.post_op = post_op
                position = self._take(step, function)
        return position, step

    def _take(self, step: Convolution, position: int) -> int:
        """Have `step` compute the call at `position`, too."""
        self.done.add(position)
        (step.target,) = self.calls[position].outputs
        return position

    def _only_reader(self, number: int) -> int | None:
        """The position of the one call that reads a value, if it is nobody's but a call's and not taken yet."""
        readers = self.readers[number]
        free = len(readers) == 1 and number not in self.outputs and readers[0] not in self.done
        return readers[0] if free else None

    def _emit_codes(self, step: Convolution) -> None:
        """Have it write codes, if convolutions alone read them, maybe after a maximum, and with the same scale."""
        pools: list[int] = []
        codes = self._codes_read(step.target, pools)
        if step.residual is None and len(codes) == 1 and None not in codes:
            (step.output,) = codes
            assert step.output is not None
            self.coded[step.target] = step.output
            for position in pools:
                call = self.calls[position]
                self.coded[call.outputs[0]] = step.output
                self.steps[position] = MaxPool(call.reads[0], call.outputs[0], _window(call))

    def _codes_read(self, number: int, pools: list[int]) -> set[Codes | None]:
        """What readers of a value quantize it to; None if one does not. `pools`: gets the maxima among them."""
        if number in self.outputs:
            return {None}
        found: set[Codes | None] = set()
        for position in self.readers[number]:
            call = self.calls[position]
            if _is_convolution(call):
                found.add(input_codes(call.function))  # type: ignore[arg-type]
            elif call.function is aten.max_pool2d.default:
                pools.append(position)
                found |= self._codes_read(call.outputs[0], pools)
            else:
                found.add(None)
        return found

    def _with_quantizations(self) -> list[Step]:
        """All steps in order, and before a convolution what makes codes of floats, once for each scale."""
        steps: list[Step] = []
        count = 1 + max((number for call in self.calls for number in call.outputs), default=0)
        made: dict[tuple[int, Codes], int] = {}
        for _, step in sorted(self.steps.items()):
            if isinstance(step, Convolution) and step.source not in self.coded:
                key = step.source, step.inputs
                if key not in made:
                    made[key] = count + len(made)
                    steps.append(Quantization(step.source, made[key], step.inputs))
                step.source = made[key]
            steps.append(step)
        return steps


def _is_convolution(call: Call) -> bool:
    """Whether a step can be made of it: two-dimensional, static, and padded alike on both sides."""
    layer = call.function
    return (
        isinstance(layer, Int8Conv)
        and layer.activation == "static"
        and len(layer.kernel_size) == 2
        and not layer.pads_unevenly
        and len(call.shapes[0]) == 4
        and len(call.reads) == 1
    )


def _is_norm(call: Call) -> bool:
    """Whether it is a batch norm that does the same to every image: scale and shift of each channel."""
    if call.function is not aten.batch_norm.default:
        return False
    mean, variance, training = call.args[3:6]
    return not training and len(call.reads) == 1 and mean is not None and variance is not None


def _affine(call: Call) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies channels with, and what it adds then: float32 `[channels]`."""
    _, weight, bias, mean, variance, _, _, eps, *_ = call.args
    factor = (variance.float() + eps).rsqrt()
    factor = factor if weight is None else factor * weight.detach().float()
    shift = -mean.float() * factor
    return factor, shift if bias is None else shift + bias.detach().float()


def _is_sum(call: Call) -> bool:
    """Whether it adds two values of the same shape."""
    if call.function is not aten.add.Tensor or len(call.args) != 2 or call.kwargs.get("alpha", 1) != 1:
        return False
    return len(call.reads) == 2 and call.reads[0] != call.reads[1]


def _post_op(call: Call) -> PostOp | None:
    if call.function is aten.hardtanh.default:
        bounds = call.args[1:] or (-1.0, 1.0)
        low, high = float(bounds[0]), float(bounds[1])
        return PostOp("hardtanh", (low, high), lambda x: x.clamp_(low, high))
    if call.function is aten.relu6.default:
        return PostOp("hardtanh", (0.0, 6.0), lambda x: x.clamp_(0.0, 6.0))
    return _POST_OPS.get(call.function) if len(call.args) == 1 else None


def _window(call: Call) -> tuple[Any, ...]:
    """Kernel, stride, padding, dilation and whether sizes are rounded up, of a `max_pool2d`."""
    defaults: list[Any] = [[], [0, 0], [1, 1], False]
    kernel, stride, padding, dilation, ceil_mode = [*call.args[1:], *defaults[len(call.args) - 2 :]]
    return kernel, stride or kernel, padding, dilation, ceil_mode


def _operation(call: Call) -> Operation:
    return Operation(call.function, call.args, call.kwargs, call.reads, list(call.outputs))
