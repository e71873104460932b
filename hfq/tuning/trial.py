"""What one evaluated candidate gave, and what one look at a model in training."""

from dataclasses import dataclass

STABLE = 0.99  # of the answers; a candidate below it meets the goal by luck of rounding, so the search goes on


@dataclass(frozen=True)
class Trial:
    """One candidate that was evaluated on the evaluation split.

    `duration_s`: its forward passes there. `loss`: as the criterion counts it. `output_error`: squared error of
    the encoder's output on the calibration slice, relative to the float model's output. `stock_agreement`: how alike
    int8 kernels and stock transformers, which dequantizes, answer the same examples, in [0, 1] by the task's own measure,
    and `output_difference` the mean absolute difference of their outputs; None where the goal was missed anyway. `memory_mib`: parameters
    and buffers; `size_mib`: what of them is saved. `stable_from`: the agreement from which on it is no luck of rounding.
    `against`: p-value of the hypothesis that more is lost than may be, and
    `needed` how many examples would decide it, where a confidence was asked for. `examples`: how many it took to decide, where
    that is not all of the split; `accuracy` is then estimated from these, and `duration_s` in proportion. `near_ties`: how
    much of `stock_agreement` is lacking for no more than rounding.
    """

    name: str
    accuracy: float
    duration_s: float
    accepted: bool
    output_error: float | None = None
    loss: float | None = None
    stock_agreement: float | None = None
    output_difference: float | None = None
    memory_mib: float | None = None
    size_mib: float | None = None
    stable_from: float = STABLE
    against: float | None = None
    needed: int | None = None
    examples: int | None = None
    near_ties: float = 0.0


@dataclass(frozen=True)
class Look:
    """A model in training after some steps: mean loss since the look before, and the score of its int8 on the tuning split."""

    steps: int
    loss: float
    score: float
