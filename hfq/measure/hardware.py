"""The machine that figures were measured on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ..runtime.kernels.selection import select_kernel


def hardware() -> dict[str, Any]:
    """What a timing depends on: the CPU, its cores and threads, memory, and the kernel that was chosen."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "kernel": select_kernel().name,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    numbers = [facts[name] for name in ("CPU implementer", "CPU part") if name in facts]  # all that Linux says on ARM
    return facts.get("model name") or " ".join([platform.machine(), *numbers]) or "unknown"
