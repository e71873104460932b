"""What measuring two models finds, as plain figures. Needs no torch: reports are read where there is none."""

from dataclasses import dataclass, field

from ..tasks.base import Confusion


@dataclass(frozen=True)
class Measurement:
    """One model: freshly loaded in processes of its own or, of `fit`, in memory. None: not measured.

    `accuracy`: the chosen metric's value, also `holdout_accuracy`. `memory_mib`: parameters and buffers. `size_mib`:
    weight files on disk. `peak_memory_mib`: resident peak of a process that loads and runs it, less that of one that
    only imports the libraries. `duration_s`: one pass over the timed batches.
    """

    accuracy: float | None
    duration_s: float | None
    memory_mib: float
    size_mib: float
    peak_memory_mib: float | None = None
    examples_per_s: float | None = None
    holdout_accuracy: float | None = None


@dataclass(frozen=True)
class StockComparison:
    """Int8 kernels beside stock transformers, which dequantizes, on the same `examples` of `split`.

    `agreement`: how alike they answer, in [0, 1], by the task's own measure. `output_difference`: mean absolute
    difference of their outputs. `near_ties`: how much of the agreement is lacking for no more than rounding.
    """

    split: str
    examples: int
    agreement: float
    output_difference: float
    seen_in_tuning: bool
    near_ties: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Both models on the same examples of `split`.

    `agreement`: how alike they answer, in [0, 1], by the task's own measure. `difference`: int8's score less the float
    model's, `interval` its 95 % interval, and `elsewhere` that of the difference on as many other examples. `within`: the probability, given these
    examples, that the loss is within the tolerance. `both_right`, `only_float_right`,
    `only_int8_right`: examples, where each is right or wrong by itself, and `p_value` the exact McNemar test that the
    two are equally often right; else None. `remarks`: the task's own, in sentences; `confusion`: of few labels.
    """

    split: str
    examples: int
    agreement: float
    difference: float
    interval: tuple[float, float]
    seen_in_tuning: bool
    both_right: int | None = None
    only_float_right: int | None = None
    only_int8_right: int | None = None
    p_value: float | None = None
    within: float | None = None
    elsewhere: tuple[float, float] | None = None
    remarks: list[str] = field(default_factory=list)
    confusion: Confusion | None = None
