"""The trial log: one JSON line a result, on disk before the next trial starts, so that a run can be resumed."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from ..common.errors import ExportError
from ..common.redact import redact
from .trial import Look, Trial


class TrialLog:
    """What one run has found so far.

    `trials`: evaluations in order. `looks`: at a model in training. `ranking`: output error on the calibration slice, by
    candidate name. The first line of the file holds what they depend on; with `resume`, a log of the same run goes on
    (`goes_on`), any other is dropped.
    `copy` is given the whole text of the file each time that it has changed.
    """

    def __init__(
        self,
        path: Path,
        *,
        depends_on: Mapping[str, object],
        resume: bool,
        copy: Callable[[str], None] | None = None,
    ) -> None:
        self.path = path
        self._copy = copy or (lambda _: None)
        self.trials: list[Trial] = []
        self.looks: list[Look] = []
        self.ranking: dict[str, float] = {}
        header = {"depends_on": json.loads(json.dumps(depends_on))}
        rows = _read(path, header) if resume else []
        self.goes_on = bool(rows)
        try:
            path.write_text("".join(_line(row) for row in [header, *rows]))
        except OSError as error:
            raise _unwritable(path, error) from error
        self._copy(path.read_text())
        for row in rows:
            self._remember(row)

    @property
    def judged(self) -> int:
        """How many models the tuning split has judged."""
        return len(self.trials) + len(self.looks)

    def rank(self, name: str, output_error: float) -> None:
        """Keep a candidate's output error."""
        self._append({"ranked": name, "output_error": output_error})

    def add(self, trial: Trial) -> None:
        """Keep a finished evaluation, in place of an earlier one of that candidate."""
        self._append({"trial": asdict(trial)})

    def look(self, look: Look) -> None:
        """Keep a look, in place of those at as many steps or more: training has gone on from before them."""
        self._append({"look": asdict(look)})

    def refute(self, trial: Trial, *, accuracy: float, loss: float) -> None:
        """Keep that an accepted trial misses the goal, by what was measured of its export."""
        self.add(replace(trial, accuracy=accuracy, loss=loss, accepted=False, examples=None))

    def evaluated(self, name: str) -> Trial | None:
        """The finished evaluation of that name, if there is one."""
        return next((trial for trial in self.trials if trial.name == name), None)

    def _append(self, row: Mapping[str, object]) -> None:
        try:
            with self.path.open("a") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._copy(self.path.read_text())
        self._remember(row)

    def _remember(self, row: Mapping) -> None:
        if "trial" in row:
            trial = Trial(**row["trial"])
            self.trials = [*(earlier for earlier in self.trials if earlier.name != trial.name), trial]
        elif "look" in row:
            look = Look(**row["look"])
            self.looks = [*(earlier for earlier in self.looks if earlier.steps < look.steps), look]
        else:
            self.ranking[row["ranked"]] = row["output_error"]


def _read(path: Path, header: Mapping[str, object]) -> list[dict]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the line that was being written when the run was killed
    return rows[1:] if rows and rows[0] == header else []


def _line(row: Mapping[str, object]) -> str:
    return redact(json.dumps(row, sort_keys=True)) + "\n"


def _unwritable(path: Path, error: OSError) -> ExportError:
    return ExportError(f"{path} cannot be written: {error.strerror or error}. Free space or choose another --output.")
