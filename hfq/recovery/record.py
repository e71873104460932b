"""What a report says of a recovery. Needs no torch."""

from dataclasses import dataclass, field

from ..tuning.trial import Look


@dataclass(frozen=True)
class Recovery:
    """A fine-tuning. `before`: the best score without it. `examples`: of `split`, read without their labels."""

    split: str
    examples: int
    before: float
    looks: list[Look] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.looks[-1].steps if self.looks else 0
