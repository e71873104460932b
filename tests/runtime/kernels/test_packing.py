"""A weight that is packed without oneDNN's help is what oneDNN makes of it, and one it would lay out in another way is its own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hfq.runtime.kernels.native import bytes_of
from hfq.runtime.kernels.onednn import OneDnnKernel
from hfq.runtime.kernels.packing import WORTHWHILE, descriptor_of, pack
from hfq.runtime.kernels.selection import select_kernel
from hfq.runtime.kernels.weight_memory import WeightMemory

SHAPES = [(256, 256), (832, 320), (64, 4096), (320, 252), (300, 512), (256, 254), (70_000, 1), (64, 64)]

pytestmark = pytest.mark.skipif(select_kernel().name != "onednn", reason="other kernels pack in their own way")


def weight_of(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(shape[0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_onednn_makes(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    found, expected = pack(weight, WeightMemory()), torch.ops.onednn.qlinear_prepack(weight, None)
    assert descriptor_of(found) == descriptor_of(expected)
    size = torch.ops.mkldnn._nbytes(expected)
    assert torch.ops.mkldnn._nbytes(found) == size
    assert torch.equal(bytes_of(found, size), bytes_of(expected, size))


def test_it_is_used_where_the_layout_is_known() -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("oneDNN has other layouts for other CPUs")
    assert WORTHWHILE <= 256 * 256
    assert hasattr(pack(weight_of(256, 256), WeightMemory()), "_content")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zero_point", [0, 77])
def test_products_are_exact(shape: tuple[int, int], zero_point: int) -> None:
    weight, scale = weight_of(*shape), torch.ones(shape[0])
    codes = torch.randint(0, 256, (5, shape[1]), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    kernel = OneDnnKernel()
    y = kernel.static(
        codes,
        pack(weight, WeightMemory()),
        scale,
        None,
        (1.0, zero_point),
    )
    assert torch.equal(y.double(), (codes.double() - zero_point) @ weight.double().t())


def test_part_of_a_weight_that_begins_anywhere_is_packed_as_well() -> None:
    memory = weight_of(256 * 256 + 3, 1).view(-1)
    part = memory[3:].view(256, 256)
    kernel, scale = OneDnnKernel(), torch.ones(256)
    assert torch.equal(kernel.unpack(pack(part, WeightMemory()), scale, 256), part)


def resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def test_weights_of_models_that_are_gone_take_no_memory() -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not Path("/proc/self/status").exists():
        pytest.skip("weights share memory where their layout is known, and Linux says how much is resident")
    kernel, scale, kept = OneDnnKernel(), torch.ones(2048), []
    weights = [weight_of(2048, 2048) for _ in range(6)]
    kernel.pack(weights[0], scale)
    before = resident_mib()
    for _ in range(6):  # each time a model of 24 MiB that goes, and one of 4 that stays
        gone = [kernel.pack(weight, scale) for weight in weights]
        kernel.end_block()
        kept.append(kernel.pack(weights[0], scale))
        kernel.end_block()
        del gone
    assert resident_mib() - before < 6 * 4 + 40
    assert all(torch.equal(kernel.unpack(packed, scale, 2048), weights[0]) for packed in kept)
