"""A process that compiles one graph and ends: `python -m hfq.runtime.compiling.inductor.compiler`, started by `hfq.runtime.compiling.graphs`.

Standard input: a line of JSON, then the model's skeleton. It never sees a weight: tensors that nobody writes to stand in.
"""

import json
import os
import re
import sys
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ....common.silence import exporting
from ...fusion import attention
from ...int8.known_forward import KnownForward
from ...int8.linear import Int8Linear
from ...int8.recording import compiling_ahead
from .. import operations  # noqa: F401 - operations are registered
from ..graphs import FACTS, LIBRARY, REFUSED, digest, dynamic_axes, register_caches
from ..skeleton import put_together


def main() -> None:
    """Compile what standard input asks for, or write why it cannot be compiled."""
    os.umask(0o077)  # what others could have written is not loaded
    request = json.loads(sys.stdin.buffer.readline())
    skeleton = sys.stdin.buffer.read()
    folder = Path(request["folder"])
    torch.set_num_threads(request["threads"])
    attention.register(compiled="compiled-attention" in request["fusions"])
    model = Rebuilt(skeleton, request["names"])
    _ask_compiler()
    try:
        tensors = [_empty(**found) for found in request["tensors"]]
        put_together(
            skeleton, tensors
        )  # imports its classes: transformers registers no output that it meets in tracing
        register_caches()
        inputs = torch.ones_like(_empty(**request["inputs"]))
        compile_graph(model, folder, inputs=inputs, tensors=tensors, fusions=request["fusions"])
    except Exception as error:  # what cannot be traced as one graph ends in any error of torch's
        if _may_pass(error):
            raise
        (folder / REFUSED).write_text(traceback.format_exc(), encoding="utf-8")


def _ask_compiler() -> None:
    """See that there is one that works: else inductor takes the CPU for one without vectors, and the model for too much.

    Raises:
        OSError: it makes no code for this CPU.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and not pick_vec_isa():
        raise OSError(f"{os.environ.get('CXX') or 'The C++ compiler'} does not compile for this CPU, or not at all.")


def _may_pass(error: BaseException | None) -> bool:
    """Whether it is the machine's fault, so that another try may end in another way."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    while error is not None:
        if isinstance(error, CppCompileError | InvalidCxxCompiler | OSError | MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


class Rebuilt(nn.Module):
    """The model as a function of its inputs and its tensors: put together anew while it is traced."""

    def __init__(self, skeleton: bytes, names: list[str]) -> None:
        super().__init__()
        self.skeleton = skeleton
        self.names = names

    def forward(self, inputs: Tensor, tensors: list[Tensor]) -> Any:
        model = put_together(self.skeleton, tensors)
        known = (layer.fused_in for layer in model.modules() if isinstance(layer, Int8Linear))
        with compiling_ahead(), next(filter(None, known), KnownForward()).running():
            return model(**dict(zip(self.names, inputs.unbind(), strict=True)))


def compile_graph(
    model: nn.Module, folder: Path, *, inputs: Tensor, tensors: list[Tensor], fusions: Collection[str]
) -> None:
    """Write a shared library of `model`'s forward into `folder`, with what is to be known of it.

    `inputs`: `[names, batch, length]`, or of images; it is compiled for any length, and for any batch that is not 1.
    `fusions`: as `hfq.runtime.compiling.inductor.rewriting.rewrite` takes them.

    Raises:
        Exception: it cannot be traced as one graph, or calls what only Python computes.
    """
    from torch._inductor import aot_compile

    # Here: torch's private names may be missing, and that is a refusal.
    from . import (
        attention_template,
        lowerings,
        matmul_rows_template,
        norm_template,
        rewriting,
        row_codes_template,
        templates,
    )

    with torch.no_grad():
        program = trace(model, inputs, tensors)
        _, outputs = program.call_spec
        conditions = [guard.replace("L['inputs'].size()", "shape") for guard in program._guards_code]
        if any(re.search("[A-Za-z]", condition.replace("shape", "")) for condition in conditions):
            raise NotImplementedError(f"It depends on more than the shape of its inputs: {conditions}")
        lowerings.register()
        module = program.module(check_guards=False)
        templates.keep_apart()
        attention_template.register()
        row_codes_template.register()
        norm_template.register()
        matmul_rows_template.register()
        rewriting.rewrite(module, fusions=fusions)
        aot_compile(
            module,
            (inputs, tensors),
            options={
                "aot_inductor.output_path": str(folder / LIBRARY),
                "aot_inductor.enable_line_tables": False,
                "aot_inductor.enable_frame_pointer": False,
                "cpp.enable_floating_point_contract_flag": "fast",
                "cpp.use_two_step_variance_threshold": 0,  # whose steps each go over all rows, with a barrier between
                "aot_inductor.precompile_headers": False,  # which takes longer than it saves, and openssl
            },
        )
    _keep_library_only(folder)
    written = pytree.treespec_dumps(outputs)
    facts = {"conditions": conditions, "outputs": written, "sha256": digest(folder, conditions, written)}
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def trace(model: nn.Module, inputs: Tensor, tensors: list[Tensor]) -> torch.export.ExportedProgram:
    """`model`'s forward as one graph, for any length of `inputs`, and for any batch if theirs is not 1."""
    dynamic = dict.fromkeys(dynamic_axes(inputs), torch.export.Dim.DYNAMIC)
    shapes = dynamic, [None] * len(tensors)
    with torch.no_grad(), exporting():
        return torch.export.export(model, (inputs, tensors), dynamic_shapes=shapes, strict=False)


def _keep_library_only(folder: Path) -> None:
    """Delete what the library was made from.

    Raises:
        NotImplementedError: it calls operations that torch has no C function for.
    """
    by_name = any(
        "aoti_torch_proxy_executor_call_function(" in path.read_text(encoding="utf-8")
        for path in folder.glob("*.wrapper.cpp")
    )
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        elif path.name != LIBRARY:
            path.unlink()
    if by_name:
        raise NotImplementedError("It calls an operation that has no C function")


def _empty(size: list[int], stride: list[int], dtype: str) -> Tensor:
    return torch.empty_strided(size, stride, dtype=getattr(torch, dtype))


if __name__ == "__main__":
    main()
