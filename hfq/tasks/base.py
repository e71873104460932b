"""The task contract: what every stage asks a task. No stage asks which task it is.

A task is one file in this folder, with a class that derives from `Task`; `hfq/tasks/README.md` says how to write one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..common.errors import DataError, UsageError, WrongDataError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from ..source.checkpoint import Checkpoint

Columns = Mapping[str, Sequence[str]]  # by role, the names of a dataset's columns
Encoding = Mapping[str, Any]  # one example as the model's processor makes it, not padded yet
Batch = dict[str, "Tensor"]  # padded; `labels`, where a task puts them there, never reach the model
Outputs = Sequence["Tensor"]  # one for each example, in the data's order
References = Sequence[Any]  # what is right for each example, in the same order

FIDELITY = "fidelity"  # the metric that every task has: no labels are read, and FP32's outputs are the references


class Metric(ABC):
    """A score of a whole set of examples. It holds no data, and is sent to other processes with its task.

    `label`: its name in tables and on axes. `in_points`: whether it is a fraction, so that differences are told in
    percentage points.
    """

    label: str
    higher_is_better = True
    in_points = True
    of_labels: ClassVar[bool] = True  # else of outputs: it says nothing of what is right

    @property
    def averages_shares(self) -> bool:
        """Whether it is the mean over examples of values in [0, 1], the more the better."""
        return False

    @abstractmethod
    def score(self, outputs: Outputs, references: References) -> float:
        """Its value."""

    def of_some(self, outputs: Outputs, references: References) -> Callable[[list[int]], float]:
        """Its value for some of the examples, by their numbers, of which one may be there twice.

        A number of `len(references)` or more is that of the example so many before, with an output that is the opposite.
        """
        both, twice = [*outputs, *(-output for output in outputs)], [*references, *references]
        return lambda rows: self.score([both[row] for row in rows], [twice[row] for row in rows])


class SumMetric(Metric):
    """A metric of numbers that add up over examples, so that resampling takes no more than adding them again."""

    @abstractmethod
    def numbers(self, outputs: Outputs, references: References) -> "Tensor":
        """float64 `[examples, k]`."""

    @abstractmethod
    def of_sums(self, sums: "Tensor") -> "Tensor":
        """From sums over examples `[..., k]` to the metric `[...]`."""

    def score(self, outputs: Outputs, references: References) -> float:
        return self.of_sums(self.numbers(outputs, references).sum(0)).item()


class Fidelity(Metric):
    """How alike a model answers to FP32, whose outputs are the references, in [0, 1]: agreement, and not accuracy."""

    label = "Agreement with FP32"
    of_labels = False

    def __init__(self, task: "Task") -> None:
        self.task = task

    def score(self, outputs: Outputs, references: References) -> float:
        """Raises `DataError` where the references are of another model than the outputs."""
        for output, reference in zip(outputs, references, strict=True):
            if output.shape != reference.shape and not self.task.discrete:
                raise DataError(
                    f"The float model puts out {list(reference.shape)} where this one puts out {list(output.shape)}: they are "
                    "not one model. Compare with the checkpoint that it was made from."
                )
        return self.task.fidelity(references, outputs)


@dataclass(frozen=True)
class Trivial:
    """What a model that looks at no input scores, and what it does, in words that follow "always"."""

    score: float
    how: str


@dataclass(frozen=True)
class Confusion:
    """How often each label was answered, by what is right: a row for each right label, of the float model and of INT8."""

    labels: list[str]
    baseline: list[list[int]]
    quantized: list[list[int]]


class Alignment(Protocol):
    """From what a dataset holds to what the model means. `how` is said in the log, the report and the card."""

    @property
    def how(self) -> str: ...


@dataclass(frozen=True)
class Processor:
    """What encodes examples. `tool`: transformers' tokenizer or processor. `max_length`: in tokens, 0 for no limit."""

    tool: Any
    max_length: int = 0


class Task(ABC):
    """What a model is for: the columns it reads, how they become tensors, and how its outputs are judged.

    A task is made for one checkpoint, from its config, and bound to its folder. It holds no data, and is sent to other
    processes.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]  # transformers' class that loads the model
    pipeline_tag: ClassVar[str]  # the Hub's name of the task, and that of transformers' pipeline
    other_tags: ClassVar[Sequence[str]] = ()  # what else the Hub calls it: a source's own name is kept
    roles: ClassVar[Mapping[str, str]]  # what its columns are, and what each holds
    example: ClassVar[Mapping[str, Any]] = {}  # what a checkpoint's config says, for `hfq tasks`
    text_role: ClassVar[str] = "text"  # the role that --text-column names
    label_role: ClassVar[str] = "label"  # the role that --label-column names
    settings: ClassVar[Sequence[str]] = ()  # a recipe's keys that it reads, and only such tasks do
    stable_agreement: ClassVar[float] = 0.99  # fidelity of two orders of summation, below which a trial is not trusted
    discrete: ClassVar[bool] = False  # outputs are ids, of tokens or labels: how far apart two are says nothing
    library: str = "transformers"  # which opens the model: the `library_name` of its card

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises `UnsupportedError` where the config says that the model is for something else."""
        self.config = config
        self.given: Mapping[str, Any] = {}  # its settings, where there are some

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint, of an architecture that `auto_class` loads, is for this task."""
        return True

    @classmethod
    def claims(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """Whether files beside config.json say that a checkpoint is for this task, whatever its architecture."""
        return False

    def bound(self, folder: Path) -> "Task":
        """The task as it is for the checkpoint in `folder`, where it needs more of that than config.json says.

        Raises:
            UnsupportedError, UsageError: the checkpoint, or a setting, does not fit the task.
            SourceError: a file is missing or damaged.
        """
        return self

    # Data

    def unfolded(self, rows: "Dataset") -> "Dataset":
        """A split with a row for each example, where a dataset has several in a row.

        Raises:
            DataError: a row holds none.
        """
        return rows

    @abstractmethod
    def processor(self, checkpoint: "Checkpoint", *, max_length: int | None, trust_remote_code: bool) -> Processor:
        """What encodes examples. `max_length`: what was asked for; None for the model's limit.

        Raises:
            DataError: its files are missing or damaged.
            UsageError: the model takes no examples of that length.
        """

    @abstractmethod
    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        """The columns to read for each role, given a dataset's features.

        Raises:
            DataError: a requested column does not exist, or the choice is not clear.
        """

    def inputs(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        """Of those, the columns that the model reads. A task that finds them where there are no labels says so itself.

        Raises:
            DataError: as `columns`.
        """
        columns = self.columns(features, requested)
        return {role: names for role, names in columns.items() if role != self.label_role}

    def lacks_labels(self, features: Mapping[str, Any], requested: Columns) -> bool:
        """Whether a dataset holds what the model reads, and nothing that could be a label."""
        if self.label_role not in self.roles or requested.get(self.label_role):
            return False
        try:
            read = self.inputs(features, requested)
        except DataError:
            return False
        return set(features) <= {name for names in read.values() for name in names}

    @abstractmethod
    def align(self, splits: Sequence["Dataset"], columns: Columns) -> Alignment:
        """How the labels in some splits become the model's.

        Raises:
            DataError: they do not fit; the message holds both sides.
        """

    @abstractmethod
    def references(self, rows: "Dataset", columns: Columns, alignment: Any) -> list[Any]:
        """What is right for each row, in the model's terms; None for a row without a label."""

    @abstractmethod
    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> Sequence[Encoding]:
        """Each row as the model takes it, not padded: a list, or a `Stream` (`stream.py`) of what is too large for one.

        Raises:
            DataError: a row holds something else than its column should.
        """

    @abstractmethod
    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        """Encodings as one padded batch of tensors, each with a row for every example."""

    def length(self, encoding: Encoding) -> int:
        """What examples are sorted by, so that batches hold little padding."""
        return len(encoding["input_ids"])

    def lengths(self, encodings: Sequence[Encoding]) -> Sequence[int]:
        """That of each."""
        return [self.length(encoding) for encoding in encodings]

    # Outputs

    @property
    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """By name, those that compare with labels; the first is the default."""

    def model_inputs(self, batch: Batch) -> Batch:
        """What the model is called with, here and to calibrate it: without labels, for which it would compute a loss."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def calibration_inputs(self, model: "nn.Module", batch: Batch) -> Batch:
        """What the float `model` is called with to calibrate it: with what it wrote so far, where it writes."""
        return self.model_inputs(batch)

    def outputs(self, model: "nn.Module", batch: Batch) -> list["Tensor"]:
        """Run the model. One tensor for each example, of any shape, float or `discrete`; its logits, where a task says nothing else."""
        return list(model(**self.model_inputs(batch)).logits.float().unbind())

    def score(self, metric: str, outputs: Outputs, references: References) -> float:
        """The value of a metric."""
        return self.judge(metric).score(outputs, references)

    def per_example(self, outputs: Outputs, references: References) -> "Tensor | None":
        """`[examples]`, bool: whether each is right. None where only the whole set can be judged."""
        return None

    @abstractmethod
    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """How alike two models answer the same examples, in [0, 1]. 1: a user sees no difference."""

    def margins(self, outputs: Outputs, others: Outputs) -> "Tensor | None":
        """`[examples]`: by how much the answer that `outputs` give is ahead in `others`, of another model; below 0 where that
        gives another. None where an answer is no choice.
        """
        return None

    def excerpt(self, encoding: Encoding, processor: Processor) -> str:
        """An example as a person knows it again; nothing where it is not made of text."""
        return ""

    def remarks(self, metric: Metric, outputs: Outputs, others: Outputs, references: References) -> list[str]:
        """What else the card says of a float model's outputs and another's: whole sentences."""
        return []

    def company(self, model: "nn.Module", batch: Batch, processor: Processor) -> list[str]:
        """What the card says of how much an INT8 model's outputs depend on what else is in a batch: whole sentences."""
        return []

    def confusion(self, outputs: Outputs, others: Outputs, references: References) -> Confusion | None:
        """What a float model and another one take for what, where there are few labels."""
        return None

    def trivial(self, metric: str, references: References) -> Trivial | None:
        """What a model that looks at no input scores; None where that is not known."""
        return None

    def informed(self, alignment: Any) -> "Task":
        """The task as it is for data of that alignment, where a dataset knows what the model does not say."""
        return self

    # Decisions

    @property
    def undecided(self) -> bool:
        """Whether something is left to `decided`."""
        return False

    def decided(self, outputs: Outputs, references: References) -> "Task":
        """The task with what is decided by the float model's outputs on the tuning split, and nothing else."""
        return self

    @property
    def decisions(self) -> Mapping[str, float]:
        """What was decided so, by name: the report and the card have it."""
        return {}

    # Words

    def usage(self, tag: str) -> str:
        """Python that runs the published model, which is called `{model}` there, for its card. `tag`: of the card.

        By transformers' pipeline; where that has none for such models, what loads the model and what encodes its inputs.
        """
        if _has_pipeline(tag, self.auto_class):
            return f'from transformers import pipeline\n\nmodel = pipeline("{tag}", model="{{model}}", device="cpu")'
        return (
            f"from transformers import {self.auto_class}, AutoProcessor\n\n"
            'processor = AutoProcessor.from_pretrained("{model}")\n'
            f'model = {self.auto_class}.from_pretrained("{{model}}")'
        )

    # The same for all

    def tag(self, card: Mapping[str, Any]) -> str:
        """The Hub's name of the task: the one in the metadata of a source's card, if it is one of them."""
        given = card.get("pipeline_tag")
        return next((tag for tag in self.other_tags if tag == given), self.pipeline_tag)

    def metric(self, name: str | None) -> str:
        """A metric's name, or the default's.

        Raises:
            UsageError: the task has no metric of that name.
        """
        every = [*self.metrics, FIDELITY]
        if name is not None and name not in every:
            raise UsageError(f"--metric {name} is none of {self.name}. Expected one of: {', '.join(every)}.")
        return name or every[0]

    def judge(self, metric: str) -> Metric:
        """The metric of that name."""
        return Fidelity(self) if metric == FIDELITY else self.metrics[metric]


def require_columns(names: Sequence[str], features: Mapping[str, Any], flag: str) -> None:
    """Raises `WrongDataError` where a dataset lacks one of these columns, which `flag` named."""
    for name in names:
        if name not in features:
            raise WrongDataError(f"{flag} {name!r} is not a column of the dataset. Columns: {', '.join(features)}.")


def find_column(
    features: Mapping[str, Any],
    requested: Sequence[str],
    *,
    known: Sequence[str],
    held: Sequence[str] = (),
    what: str,
    flag: str,
) -> list[str]:
    """The one column for a role: the one asked for, else the first that is called by a `known` name, else the only of `held`.

    `what`: that the column holds, and `flag`: by which a user names it, for messages.

    Raises:
        WrongDataError: it does not exist, or the choice is not clear.
    """
    require_columns(requested, features, flag)
    if len(requested) > 1:
        raise WrongDataError(
            f"{len(requested)} columns were given for {what}: {', '.join(requested)}. Name one with {flag}."
        )
    found = list(requested) or [name for name in known if name in features][:1] or list(held)
    if len(found) == 1:
        return found
    fitting = f"; that could be it: {', '.join(held)}" if held else ""
    raise WrongDataError(
        f"Which column holds {what} is not clear. Columns: {', '.join(features)}{fitting}. Name it with {flag}."
    )


def _has_pipeline(tag: str, auto_class: str) -> bool:
    """Whether transformers' pipeline of that name loads its models by `auto_class`: by another they would lose their head."""
    from transformers.pipelines import PIPELINE_REGISTRY

    if tag not in PIPELINE_REGISTRY.get_supported_tasks():
        return False
    _, pipeline, _ = PIPELINE_REGISTRY.check_task(tag)
    return auto_class in [known.__name__ for known in pipeline["pt"]]
