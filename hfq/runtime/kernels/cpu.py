"""What this CPU multiplies, and what oneDNN is told of it."""

import os
from collections.abc import Sequence

import torch


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX-512 BF16, AMX): without them it is emulated."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def multiplies_in_tiles() -> bool:
    """Whether this CPU has AMX for bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) and not onednn_is_limited()


def can_compile() -> bool:
    """Whether `hfq.runtime.compiling.inductor.attention_template` runs here: its products are oneDNN's, which may be told of another CPU."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and not onednn_is_limited()


def onednn_settings() -> list[str]:
    """What the user told oneDNN that decides layouts and machine code, as `NAME=value`."""
    told = (f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("ONEDNN_", "DNNL_")))
    return [setting for setting in told if "CACHE_CAPACITY" not in setting]


def onednn_is_limited() -> bool:
    """Whether oneDNN is told of a lesser CPU."""
    return any(os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))


def compiles_to_bfloat16() -> bool:
    """Whether attention that is compiled multiplies bfloat16 numbers; else float32."""
    return multiplies_bfloat16() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def is_compiled(fusions: Sequence[str]) -> bool:
    """Whether `hfq.compile` compiles attention here, too, given the fusions that are wanted."""
    return "compiled-attention" in fusions and can_compile()
