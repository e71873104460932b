"""Which split of a dataset is for what."""

from collections.abc import Callable, Mapping
from typing import Any

from ..common.errors import DataError

EVALUATION = ("validation", "dev", "val", "test")
CALIBRATION = ("train", "corpus")  # of retrieval data, documents


def evaluation_split(splits: Mapping[str, Any], requested: str | None) -> str:
    """The split that decides whether the goal is met.

    Raises:
        DataError: it does not exist, is empty, or is not clear.
    """
    if requested is not None:
        return _require(requested, splits, "--split")
    for prefix in EVALUATION:
        for name in splits:
            if name.startswith(prefix):
                return name
    if len(splits) == 1:
        return next(iter(splits))
    raise DataError(f"Which split to evaluate on is not clear. Splits: {', '.join(splits)}. Name one with --split.")


def calibration_split(splits: Mapping[str, Any], requested: str | None, split: str) -> str:
    """The split that calibration examples are drawn from, given the one to evaluate on.

    Raises:
        DataError: it does not exist, or is empty.
    """
    if requested is not None:
        return _require(requested, splits, "--calibration-split")
    return next((name for name in CALIBRATION if name in splits), split)


def holdout_split(splits: Mapping[str, Any], used: set[str], has_labels: Callable[[Any], bool]) -> str | None:
    """A test split with labels that nothing else reads (the Hub's GLUE test splits have none)."""
    tests = [name for name in splits if name.startswith("test") and name not in used and len(splits[name])]
    return next((name for name in tests if has_labels(splits[name])), None)


def _require(name: str, splits: Mapping[str, Any], flag: str) -> str:
    if name not in splits:
        raise DataError(f"{flag} {name!r} is not a split of the dataset. Splits: {', '.join(splits)}.")
    if len(splits[name]) == 0:
        raise DataError(f"{flag} {name!r} is empty.")
    return name
