"""A task's data: examples to calibrate on, to evaluate on and, where there are some, that nothing else sees."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, overload

from ..common.errors import DataError, UsageError, WrongDataError
from ..common.names import is_path
from ..recipe import Recipe, flag
from ..source.checkpoint import Checkpoint
from ..tasks.base import FIDELITY, Alignment, Batch, Columns, Encoding, Processor, References, Task
from ..tasks.stream import Stream
from ..tasks.text.tokens import is_text
from .dataset import load_splits
from .reference import find_dataset
from .splits import calibration_split, evaluation_splits, holdout_split, looks

if TYPE_CHECKING:
    from datasets import Dataset, Features

TRAINING = 10_000  # examples at most that --recover trains on
NO_TEXT = r"^\s*([+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|(?i:true|false))\s*$"


@dataclass(frozen=True)
class DatasetInfo:
    """The data that tuned and measured the model. `revision` is a commit sha on the Hub, else None.

    `split`: several with commas, where they were evaluated together. `columns`: by role. `alignment`: how its labels became the model's. `holdout_split` is a labelled split that neither
    calibration nor tuning saw, where there is one. `max_length`: in tokens, 0 for no limit.
    """

    id: str
    subset: str | None
    revision: str | None
    split: str
    calibration_split: str
    calibration_samples: int
    columns: dict[str, list[str]]
    alignment: str
    examples: int
    holdout_split: str | None = None
    holdout_examples: int = 0
    max_length: int = 0


@dataclass(frozen=True)
class Examples:
    """Encoded examples, shortest first so that batches hold little padding, and what is right for each.

    Those of an evaluation split that a candidate need not see whole are drawn at random for each of the `looks` (how many
    have been seen after it), and shortest first within it.

    Where no labels are read, nothing is known to be right before the float model has answered: None for each.
    `rows`: where each is in its split.
    """

    encodings: Sequence[Encoding]
    references: References
    rows: Sequence[int] = ()
    looks: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.encodings)

    def part(self, start: int, end: int) -> "Examples":
        """Some of them, in order."""
        return Examples(self.encodings[start:end], self.references[start:end], self.rows[start:end])

    def batches(self, task: Task, processor: Processor, batch_size: int) -> Sequence[Batch]:
        """Padded tensors, each with a row for every example: all of them, or of a `Stream` one after the other."""
        found = Batches(self.encodings, task, processor, batch_size)
        return found if isinstance(self.encodings, Stream) else list(found)


@dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """Batches that are made when they are asked for."""

    encodings: Sequence[Encoding]
    task: Task
    processor: Processor
    size: int

    def __len__(self) -> int:
        return -(-len(self.encodings) // self.size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.task.collate(self.encodings[index * self.size : (index + 1) * self.size], self.processor)

    @property
    def examples(self) -> int:
        """How many they hold together."""
        return len(self.encodings)


@dataclass(frozen=True)
class TaskData:
    """What a run reads. `metric`: the name of the one that decides. `holdout`: labelled examples that neither calibration
    nor tuning sees, or None. `training`: further examples of the calibration split, without references, where a recipe
    wants to `recover`.
    """

    info: DatasetInfo
    task: Task
    metric: str
    processor: Processor
    calibration: Examples
    evaluation: Examples
    holdout: Examples | None
    training: Examples | None = None
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class NoLabels:
    """The alignment where no labels are read."""

    how: str = "none are read"


def load_task_data(checkpoint: Checkpoint, recipe: Recipe, *, task: Task, recipes: Path, token: str | None) -> TaskData:
    """Load, align and encode.

    Raises:
        DataError: the dataset cannot be found or read, or does not fit the checkpoint.
    """
    reference = find_dataset(checkpoint, recipe, recipes=recipes)
    splits, revision = load_splits(reference.id, reference.subset, token=token)
    names = evaluation_splits(splits, recipe.split or reference.split)
    split, calibration = ",".join(names), calibration_split(splits, recipe.calibration_split, names)
    for name in (*names, calibration):
        if len(splits[name]) == 0:
            raise DataError(f"Split {name!r} is empty.")
    read = {name: task.unfolded(splits[name]) for name in dict.fromkeys((*names, calibration))}
    features, requested = told_apart(read[names[0]]), _requested(recipe, task)
    lacking = recipe.metric is None and task.lacks_labels(features, requested)
    of_labels = not lacking and recipe.metric != FIDELITY
    columns = (task.columns if of_labels else task.inputs)(features, requested)
    for name, rows in read.items():
        _require_columns(rows, name, columns)
    alignment: Alignment = NoLabels()
    if of_labels:
        alignment = task.align(list(read.values()), columns)
        task = task.informed(alignment)
    metric = task.metric(recipe.metric) if of_labels else FIDELITY
    processor = task.processor(checkpoint, max_length=recipe.max_length, trust_remote_code=recipe.trust_remote_code)
    chosen = read[calibration].shuffle(seed=recipe.seed)
    chosen = chosen.select(range(min(recipe.calibration_samples, len(chosen))))
    reader = _Reader(task, columns, alignment, processor)
    in_looks = task.judge(metric).averages_shares and recipe.devices == 1
    evaluated = reader.examples(_together([read[name] for name in names]), split, recipe if in_looks else None)
    calibrated = reader.examples(chosen, calibration)
    unseen = holdout_split(splits, {*names, calibration}, lambda rows: reader.judges(rows))
    held_out = reader.examples(task.unfolded(splits[unseen]), unseen) if unseen else None
    local = is_path(reference.id)
    info = DatasetInfo(
        id=Path(reference.id).resolve().name if local else reference.id,
        subset=reference.subset,
        revision=revision,
        split=split,
        calibration_split=calibration,
        calibration_samples=len(calibrated),
        columns={role: list(names) for role, names in columns.items() if names},  # triplets have no labels
        alignment=alignment.how,
        examples=len(evaluated),
        holdout_split=unseen,
        holdout_examples=len(held_out) if held_out else 0,
        max_length=processor.max_length,
    )
    training = None
    if recipe.recover:
        if calibration in names:
            raise UsageError(
                f"--recover trains on another split than {calibration!r}, by which it is judged. Name one with --calibration-split."
            )
        rows = read[calibration].shuffle(seed=recipe.seed)
        training = reader.unjudged(rows.select(range(min(TRAINING, len(rows)))))
    warnings = [*([_without_labels(info)] if lacking else []), *reader.warnings, *_warnings(info, recipe)]
    return TaskData(info, task, metric, processor, calibrated, evaluated, held_out, training, warnings)


def _together(parts: "Sequence[Dataset]") -> "Dataset":
    """The rows of several splits."""
    from datasets import concatenate_datasets

    if len(parts) == 1:
        return parts[0]
    try:
        return concatenate_datasets(list(parts))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"The splits that --split names have not the same columns: {error}. Name one of them."
        ) from error


@dataclass(frozen=True)
class _Reader:
    """Rows to examples."""

    task: Task
    columns: Columns
    alignment: Alignment
    processor: Processor
    warnings: list[str] = field(default_factory=list)

    def examples(self, rows: "Dataset", split: str, looked_at: Recipe | None = None) -> Examples:
        """`looked_at`: by whose seed and batch size examples are drawn, where a part of them may decide."""
        references, kept = self._labelled(rows)
        if len(kept) < len(rows):
            self.warnings.append(
                f"{len(rows) - len(kept)} of the {len(rows)} examples of {split!r} have the label -1, which says that there "
                "is none. They do not count."
            )
            rows = rows.select(kept)
        if None in references and self._of_labels:
            row = rows.select_columns(list(self.columns[self.task.label_role]))[references.index(None)]
            labels = list(row.values())
            raise DataError(
                f"Split {split!r} has examples without a usable label (first: row {references.index(None)}, from 0: "
                f"{', '.join(map(repr, labels))}). Choose a labelled split, or --metric fidelity, agreement with FP32."
            )
        found = self._sorted(rows, references, looked_at)
        return replace(found, rows=[kept[row] for row in found.rows])

    def unjudged(self, rows: "Dataset") -> Examples:
        """Examples whose labels are not read."""
        return self._sorted(rows, [None] * len(rows))

    def _sorted(self, rows: "Dataset", references: References, looked_at: Recipe | None = None) -> Examples:
        encodings = self.task.encode(rows, self.columns, self.processor)
        places, ends = list(range(len(encodings))), [len(encodings)]
        if looked_at and len(ends := looks(len(encodings), looked_at.batch_size)) > 1:
            random.Random(looked_at.seed).shuffle(places)  # noqa: S311 (a sample, not a secret)
        length = self.task.lengths(encodings).__getitem__
        order = [row for start, end in pairwise([0, *ends]) for row in sorted(places[start:end], key=length)]
        sorted_ = encodings.ordered(order) if isinstance(encodings, Stream) else [encodings[row] for row in order]
        return Examples(sorted_, [references[row] for row in order], order, ends)

    def judges(self, rows: "Dataset") -> bool:
        """Whether a split has the columns and, where they are read, the labels."""
        try:
            rows = self.task.unfolded(rows)
            if any(name not in rows.features for names in self.columns.values() for name in names):
                return False
            return None not in self._labelled(rows)[0] or not self._of_labels
        except DataError:  # that split is not asked for: it may hold what it likes
            return False

    @property
    def _of_labels(self) -> bool:
        return not isinstance(self.alignment, NoLabels)

    def _labelled(self, rows: "Dataset") -> tuple[list[object], Sequence[int]]:
        """What is right for each row, without the few that say -1, and the rows that are left.

        SNLI says -1 where annotators did not agree.
        """
        references, names = self._references(rows), self.columns.get(self.task.label_role, ())
        every = range(len(rows))
        if None not in references or not self._of_labels or len(names) != 1:
            return references, every
        kept = [row for row, label in enumerate(rows[names[0]]) if label not in (-1, "-1")]
        if 2 * len(kept) < len(rows):  # it is no split to judge by
            return references, every
        return [references[row] for row in kept], kept

    def _references(self, rows: "Dataset") -> list[object]:
        return self.task.references(rows, self.columns, self.alignment) if self._of_labels else [None] * len(rows)


def told_apart(rows: "Dataset") -> "Features":
    """The columns, where one that is stored as text and holds nothing but numbers, or true and false, is no text."""
    import pyarrow.compute
    from datasets import Features, Value

    def holds_text(name: str) -> bool:
        column = rows.data.column(name)
        return not pyarrow.compute.all(pyarrow.compute.match_substring_regex(column, NO_TEXT), min_count=0).as_py()

    columns = rows.features.items()
    return Features({name: Value("null") if is_text(kind) and not holds_text(name) else kind for name, kind in columns})


def _requested(recipe: Recipe, task: Task) -> dict[str, list[str]]:
    """Columns that were asked for, by role; `text_columns` and `label_column` are other spellings of two roles.

    Raises:
        UsageError: the task reads nothing in that role, or it is named in both spellings.
    """
    found = dict(recipe.columns)
    if unknown := [role for role in found if role not in task.roles]:
        raise UsageError(
            f"columns: {', '.join(unknown)} is nothing that {task.name} reads. Expected some of: {', '.join(task.roles)}."
        )
    labels = [recipe.label_column] if recipe.label_column else []
    for key, role, names in (
        ("text_columns", task.text_role, recipe.text_columns),
        ("label_column", task.label_role, labels),
    ):
        if names and role not in task.roles:
            raise UsageError(f"{flag(key)} is nothing that {task.name} reads. Leave it out.")
        if names and role in found:
            raise UsageError(f"{flag(key)} and {flag('columns')} {role}=… say the same. Leave one of them out.")
        if names:
            found[role] = names
    return found


def _require_columns(rows: "Dataset", split: str, columns: Columns) -> None:
    for name in (name for names in columns.values() for name in names):
        if name not in rows.features:
            raise WrongDataError(f"Split {split!r} has no column {name!r}. Columns: {', '.join(rows.features)}.")


def _without_labels(info: DatasetInfo) -> str:
    return (
        f"{info.id} has no labels (columns: {', '.join(name for names in info.columns.values() for name in names)}). The "
        "score is agreement with FP32 (--metric fidelity), and not accuracy."
    )


def _warnings(info: DatasetInfo, recipe: Recipe) -> list[str]:
    found = []
    if info.calibration_samples < recipe.calibration_samples:
        found.append(
            f"Split {info.calibration_split!r} has {info.calibration_samples} examples, fewer than "
            f"--calibration-samples {recipe.calibration_samples}."
        )
    if info.calibration_split in info.split.split(","):
        found.append(
            f"Calibration and evaluation both read split {info.calibration_split!r}: its accuracy is not independent of calibration."
        )
    if info.alignment.startswith("by position"):
        found.append(f"Labels were aligned {info.alignment}.")
    return found
