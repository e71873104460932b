"""Matmuls of ever other sizes do not fill a process with machine code that it kept for each."""

import subprocess

from support.command import environment, library_python

SIZES = 900
SCRIPT = f"""
import re, torch
from pathlib import Path
from hfq.runtime.kernels.onednn import OneDnnKernel

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
kernel = OneDnnKernel()
scale = torch.ones(64)
packed = kernel.pack(torch.ones(64, 64, dtype=torch.int8), scale)
for rows in (1, {SIZES}):
    kernel.static(torch.ones(rows, 64, dtype=torch.uint8), packed, scale, None, (1.0, 0))
before = resident()
for rows in range(2, {SIZES}):
    kernel.static(torch.ones(rows, 64, dtype=torch.uint8), packed, scale, None, (1.0, 0))
print(resident() - before)
"""


def grown(**variables: str) -> float:
    """MiB that so many sizes leave in a process."""
    done = subprocess.run(
        [library_python(), "-c", SCRIPT], env=environment(variables), capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def test_sizes_that_come_once_are_forgotten() -> None:
    assert grown() < grown(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024") / 1.5
