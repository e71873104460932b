"""Everything hfq raises on purpose. A message names the thing, what was expected and the next step."""

from collections.abc import Mapping
from typing import Any


class HfqError(Exception):
    """Base of every error a user can cause or mend. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(HfqError):
    """Arguments, recipe keys or a combination of them that cannot be run."""

    exit_code = 2


class SourceError(HfqError):
    """The checkpoint cannot be had, read or trusted."""


class WrongCheckpointError(SourceError):
    """What the arguments name is no checkpoint, or a whole one that is none for this command."""

    exit_code = 2


class DataError(HfqError):
    """The dataset cannot be had, or does not fit the task or the checkpoint's labels."""


class WrongDataError(DataError):
    """The arguments name what is not there, a dataset, split or column, or leave open which one is meant."""

    exit_code = 2


class UnsupportedError(HfqError):
    """A task, architecture or layer that hfq does not quantize."""

    exit_code = 2


class ExportError(HfqError):
    """The quantized folder cannot be written, or does not read back as it was written."""


class HubError(HfqError):
    """The Hub refused a request, or could not be reached."""


class GoalNotMetError(HfqError):
    """No trial met the accuracy goal within the limits. `details`: the trials, as data."""

    exit_code = 3

    def __init__(self, message: str, *, details: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is pickled: what `Exception` has does not know the keyword, and this comes back from Ray's workers."""
        return _goal_not_met, (str(self), self.details)


def _goal_not_met(message: str, details: Mapping[str, Any]) -> GoalNotMetError:
    return GoalNotMetError(message, details=details)
