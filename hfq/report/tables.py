"""What `hfq inspect`, `hfq eval` and a finished run show: a checkpoint's layers, sizes and provenance, as tables."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import safe_open

from ..common.errors import SourceError
from ..common.names import INPUT_RANGES, REPORT_FILE
from ..common.reading import read_json
from ..common.redact import printable
from ..source.checkpoint import Checkpoint
from .report import Report
from .view import number, results


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts about a checkpoint, from its files alone: nothing is loaded into a model.

    Raises:
        SourceError: `hfq.json` is there but is not JSON, or a layer's scale is none.
    """
    layers, float_bytes = [], 0
    settings = checkpoint.config.get("quantization_config") or {}
    without_scale = (
        "dynamic" if any(map(_is_dynamic, (settings.get("config_groups") or {}).values())) else "weight-only"
    )
    for path in checkpoint.weights:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names):
                tensor = checkpoint.tensors[name]
                if tensor.dtype != "I8" or not name.endswith(".weight") or len(tensor.shape) < 2:
                    float_bytes += tensor.end - tensor.begin
                    continue
                layers.append(_layer(file, name.removesuffix(".weight"), names, tensor.shape, without_scale))
    for layer in layers:
        if (found := (settings.get(INPUT_RANGES) or {}).get(layer["name"])) is not None:
            layer |= {"kind": "static", "input_scale": found[0], "input_zero_point": found[1]}
    return {
        "checkpoint": checkpoint.info.id,
        "revision": checkpoint.info.revision,
        "architectures": checkpoint.config.get("architectures"),
        "size_mib": checkpoint.size_mib,
        "int8_mib": sum(math.prod(layer["shape"]) for layer in layers) / 2**20,
        "other_mib": float_bytes / 2**20,
        "layers": layers,
        "float_layers": settings.get("ignore") or [],
        "quantization_config": checkpoint.config.get("quantization_config"),
        "provenance": _provenance(checkpoint),
    }


def show(found: Mapping[str, Any]) -> None:
    """Print what `describe` found."""
    console = Console(width=max(Console().width, 140))  # layer names are long, and cut they say nothing
    architectures = ", ".join(found["architectures"] or [])
    console.print(printable(f"{found['checkpoint']}  {architectures}  {found['revision']}"), markup=False)
    console.print(
        f"{found['size_mib']:.1f} MiB: {found['int8_mib']:.1f} int8 weights, {found['other_mib']:.1f} scales and float tensors"
    )
    if not found["layers"]:
        console.print("No layer is int8.")
        return
    table = Table("Layer", "Runs as", "Shape", "Weight scale", "Input scale", "Zero point", box=None)
    for layer in found["layers"]:
        low, high = layer["weight_scale"]
        table.add_row(
            escape(printable(layer["name"])),
            layer["kind"],
            " × ".join(map(str, layer["shape"])),
            f"{low:.2e} … {high:.2e}",
            f"{layer['input_scale']:.4f}" if layer["input_scale"] is not None else "",
            str(layer["input_zero_point"]) if layer["input_zero_point"] is not None else "",
        )
    console.print(table)
    console.print(f"Float: {printable(', '.join(found['float_layers'])) or 'none'}", markup=False)
    config = found["quantization_config"] or {}
    for name, group in (config.get("config_groups") or {}).items():
        scheme, targets = (group.get("format"), group["targets"]) if isinstance(group, dict) else (name, group)
        console.print(printable(f"{name}: {scheme} for {_short(targets)}"), markup=False)
    made = found["provenance"] or {}
    data, base = made.get("dataset"), made.get("checkpoint")
    if isinstance(data, dict) and isinstance(base, dict):  # of a run from a checkpoint, not of fit
        lines = (
            f"Made by hfq {made.get('hfq_version')} on {made.get('created')} from {base.get('id')} ({base.get('revision')})",
            f"Chosen: {made.get('chosen')}; calibrated on {data.get('calibration_samples')} examples of {data.get('id')} "
            f"{data.get('calibration_split')!r}",
        )
        for line in lines:
            console.print(printable(line), markup=False)


def show_result(report: Report, console: Console) -> None:
    """Print the seed's table for a finished run."""
    table = Table("Info Type", "Baseline FP32", "Quantized INT8", "Ratio", box=None)
    for row in results(report):
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.label, number(row.baseline), number(row.quantized), ratio)
    console.print(table)


def describe_runtime() -> dict[str, Any]:
    """What int8 layers run with on this machine: CPU, instruction sets, kernel, fusions, threads."""
    import torch

    from ..measure.hardware import hardware
    from ..runtime.compiling.compile import has_compiler
    from ..runtime.fusion.fuse import wanted_fusions

    fusions = wanted_fusions()
    reported = torch.cpu.get_capabilities()
    wanted = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "dot", "i8mm", "bf16", "sve")
    return {
        **hardware(),
        "instructions": [name for name in wanted if reported.get(name)],
        "onednn_isa_limit": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "hfq_isa": os.environ.get("HFQ_ISA", "native"),
        "fusions": list(fusions),
        "bfloat16_attention": _where_bfloat16(fusions),
        "compiler": has_compiler(),
    }


def _where_bfloat16(fusions: Sequence[str]) -> str:
    """Where attention multiplies bfloat16 numbers."""
    from ..runtime.kernels.cpu import is_compiled, multiplies_in_tiles

    if "attention" in fusions and multiplies_in_tiles():
        return "yes"
    return "where compiled" if is_compiled(fusions) else "no"


def show_facts(found: Mapping[str, Any]) -> None:
    """Print names and values."""
    table = Table(show_header=False, box=None)
    for name, value in found.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else escape(printable(str(value))))
    Console().print(table)


def _is_dynamic(group: Any) -> bool:
    return isinstance(group, dict) and bool((group.get("input_activations") or {}).get("dynamic"))


def _layer(file: Any, name: str, names: set[str], shape: Sequence[int], without_scale: str) -> dict[str, Any]:
    scale = file.get_tensor(f"{name}.weight_scale") if f"{name}.weight_scale" in names else None
    if scale is not None and scale.numel() == 0:
        raise SourceError(f"{name}.weight_scale is empty; expected a scale for each row.")
    static = f"{name}.input_scale" in names
    embedding = scale is not None and f"{name}.bias" not in names and "embedding" in name
    return {
        "name": name,
        "kind": "static" if static else "embedding" if embedding else without_scale,
        "shape": list(shape),
        "weight_scale": [scale.min().item(), scale.max().item()] if scale is not None else [0.0, 0.0],
        "input_scale": _single(file, f"{name}.input_scale") if static else None,
        "input_zero_point": _single(file, f"{name}.input_zero_point") if f"{name}.input_zero_point" in names else None,
    }


def _single(file: Any, name: str) -> float:
    tensor = file.get_tensor(name)
    if tensor.numel() != 1:
        raise SourceError(f"{name} holds {tensor.numel()} numbers; the layout of compressed-tensors has one there.")
    return tensor.item()


def _provenance(checkpoint: Checkpoint) -> dict[str, Any] | None:
    path = checkpoint.path / REPORT_FILE
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path} holds a {type(found).__name__}; expected an object.")
    return found


def _short(targets: list[str]) -> str:
    return ", ".join(targets[:3]) + (f" and {len(targets) - 3} more" if len(targets) > 3 else "")
