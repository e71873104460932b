"""Which int8 kernel runs on this CPU: the fastest that computes exactly, found by trying."""

import math
import os
import platform
import time
import warnings
from functools import lru_cache

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ...common.errors import UsageError
from .checked import CheckedKernel, saturates_in_pairs
from .kernel import Kernel, quantize_uint8
from .onednn import OneDnnKernel
from .portable import PortableKernel


@lru_cache(maxsize=1)
def select_kernel() -> Kernel:
    """The fastest kernel that is exact here.

    Without VNNI, u8 x s8 multiply-adds saturate at 16 bits, and whether they do depends on the CPU, on oneDNN's build
    and on `ONEDNN_MAX_CPU_ISA`. So the largest codes are multiplied once and the sum is checked; if it saturates as
    `CheckedKernel` knows to mend, that one runs. On other CPUs than x86 oneDNN may be exact and slow: see
    `_onednn_is_fast`. `HFQ_ISA=portable` forces the portable kernel.

    Raises:
        UsageError: `HFQ_ISA` holds something else.
    """
    wanted = os.environ.get("HFQ_ISA", "native")
    if wanted not in ("native", "portable"):
        raise UsageError(f"HFQ_ISA is {wanted!r}; expected 'native' (the default) or 'portable'.")
    # The first to ask may be a layer in a forward that somebody takes down, where packed weights do not work.
    with _disable_current_modes():
        return _select(wanted)


def _select(wanted: str) -> Kernel:
    with warnings.catch_warnings():  # torch warns once that quantized tensors will go; quantize_uint8 knows
        warnings.simplefilter("ignore", UserWarning)
        quantize_uint8(torch.zeros(1), 1.0, 0)
    if wanted == "native" and torch.backends.mkldnn.is_available():
        for kernel, is_exact in ((OneDnnKernel(), _onednn_is_exact), (CheckedKernel(), saturates_in_pairs)):
            if is_exact() and _onednn_is_fast():
                return kernel
    return PortableKernel()


def _onednn_is_exact() -> bool:
    rows, columns, depth = 4, 16, 64
    weight = torch.full((columns, depth), 127, dtype=torch.int8)
    scale = torch.ones(columns)
    kernel = OneDnnKernel()
    try:
        codes = quantize_uint8(torch.full((rows, depth), 255.0), 1.0, 0)
        y = kernel.static(codes, kernel.pack(weight, scale), scale, None, (1.0, 0))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((y == 255 * 127 * depth).all())


def _onednn_is_fast() -> bool:
    """Whether oneDNN has code of its own for int8 on this CPU, as on any x86.

    Where it has none, as on ARM, its reference multiplies number by number, and float products of the same codes are
    faster. Neither the CPU nor oneDNN says so, and a later one may have such code, hence it is tried.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        return True
    weight, scale = torch.ones(256, 256, dtype=torch.int8), torch.ones(256)
    codes = torch.ones(64, 256, dtype=torch.uint8)
    seconds: dict[str, float] = {}
    for kernel in (OneDnnKernel(), PortableKernel()):
        packed = kernel.pack(weight, scale)
        for _ in range(3):  # the first sets up, and the fastest counts
            start = time.perf_counter()
            kernel.static(codes, packed, scale, None, (1.0, 0))
            seconds[kernel.name] = min(seconds.get(kernel.name, math.inf), time.perf_counter() - start)
    return seconds["onednn"] < seconds["portable"]
