"""Which split of a dataset is for what."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..common.errors import WrongDataError

EVALUATION = ("validation", "dev", "val", "test")
FIRST_LOOK = 512  # examples that a candidate is evaluated on at least, where there are as many
FEWEST_LEFT = 1.5  # times what was seen: a look at fewer more spares nothing
CALIBRATION = ("train", "corpus")  # of retrieval data, documents


def evaluation_splits(splits: Mapping[str, Any], requested: str | None) -> list[str]:
    """The split that decides whether the goal is met, or several together: more evidence than one. `requested`: with commas.

    Raises:
        WrongDataError: one does not exist or is empty, or it is not clear which.
    """
    if requested is not None:
        names = dict.fromkeys(name.strip() for name in requested.split(","))
        return [_require(name, splits, "--split") for name in names]
    for prefix in EVALUATION:
        for name in splits:
            if name.startswith(prefix):
                return [name]
    if len(splits) == 1:
        return list(splits)
    raise WrongDataError(
        f"Which split to evaluate on is not clear. Splits: {', '.join(splits)}. Name one with --split."
    )


def calibration_split(splits: Mapping[str, Any], requested: str | None, evaluated: Sequence[str]) -> str:
    """The split that calibration examples are drawn from, given those to evaluate on.

    Raises:
        WrongDataError: it does not exist, or is empty.
    """
    if requested is not None:
        return _require(requested, splits, "--calibration-split")
    return next((name for name in CALIBRATION if name in splits), evaluated[0])


def holdout_split(splits: Mapping[str, Any], used: set[str], has_labels: Callable[[Any], bool]) -> str | None:
    """A test split with labels that nothing else reads (the Hub's GLUE test splits have none)."""
    tests = [name for name in splits if name.startswith("test") and name not in used and len(splits[name])]
    return next((name for name in tests if has_labels(splits[name])), None)


def looks(examples: int, batch_size: int) -> list[int]:
    """How many examples of the evaluation split have been seen after each look: as many again each time, in whole batches."""
    end = -(-FIRST_LOOK // batch_size) * batch_size
    ends = []
    while FEWEST_LEFT * end <= examples:
        ends.append(end)
        end *= 2
    return [*ends, examples]


def _require(name: str, splits: Mapping[str, Any], flag: str) -> str:
    if name not in splits:
        raise WrongDataError(f"{flag} {name!r} is not a split of the dataset. Splits: {', '.join(splits)}.")
    if len(splits[name]) == 0:
        raise WrongDataError(f"{flag} {name!r} is empty.")
    return name
