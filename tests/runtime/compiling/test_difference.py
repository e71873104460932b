"""Which outputs of what was compiled count as the model's own."""

import pytest
import torch
from torch import Tensor

from hfq.runtime.compiling.difference import differs

SIZE = 1000


def model(inputs: Tensor) -> Tensor:
    return torch.linspace(1, 2, SIZE) + inputs.sum()


def off_by(share: float, seed: int) -> Tensor:
    """Noise of such a share of the outputs' size."""
    noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    return noise * share * 1.5


@pytest.mark.parametrize(
    ("compiled", "rounded", "is_wrong"),
    [
        (0.1, 0.0, False),
        (0.25, 0.0, True),
        (0.25, 0.2, False),  # all that is rounded moves so far
        (0.25, 0.05, True),
        (1.0, 0.2, True),
        (1.0, 0.8, True),
        (1.0, float("inf"), True),
    ],
)
def test_a_difference_is_measured_by_what_rounding_makes_of_the_model(
    compiled: float, rounded: float, is_wrong: bool
) -> None:
    found = differs(
        lambda x: model(x) + off_by(compiled, 0),
        model,
        torch.zeros(2, 1, 4),
        rounded=lambda x: model(x) + off_by(rounded, 1),
    )
    assert (found is not None) == is_wrong
    assert found is None or found == pytest.approx(compiled, rel=0.1)
