"""What a run found, as plain dataclasses: the content of `hfq.json`, and all that a card may state.

Accuracy is the value of the chosen metric; durations are seconds, memory and sizes MiB. Needs no torch.
"""

import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import SourceError, WrongCheckpointError
from ..common.names import REPORT_FILE
from ..common.reading import parse_json, read_text
from ..common.redact import redact
from ..data.examples import DatasetInfo
from ..explain.explanation import Explanation
from ..measure.figures import Comparison, Measurement, StockComparison
from ..recovery.record import Recovery
from ..source.checkpoint import CheckpointInfo
from ..tasks.base import FIDELITY, Confusion, Trivial
from ..tuning.goal import Goal
from ..tuning.trial import Look, Trial
from .upgrade import SCHEMA_VERSION, upgraded

if TYPE_CHECKING:
    from ..tuning.tuner import Found

_PACKAGES = ("hfq", "torch", "transformers", "compressed-tensors", "datasets", "huggingface_hub", "lightning")


@dataclass(frozen=True)
class Layers:
    """Layer names by how they run. `float_layers` maps a name to why it stays float.

    `weight_only`: int8 weights, float activations. `other`: the type of every further module with parameters: a type
    that has no int8 form.
    """

    static: list[str]
    dynamic: list[str]
    embeddings: list[str]
    float_layers: dict[str, str]
    weight_only: list[str] = field(default_factory=list)
    other: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Everything about one run: of a checkpoint, or by `fit` of an object, which has no `dataset` and no `task`.

    `metric_label`: its name in tables and on axes. `metric_in_points`: whether it is a fraction, whose differences are
    told in percentage points. `checkpoint`: of an object, its class. `library`: which opens the model. `usage`: Python
    that runs it, where it is called `{model}`. `met`: None where nothing was evaluated. `command` repeats the run.
    `decisions`: what the task decided by the float model's answers on the tuning split, such as a threshold.
    `trivial`: what a model that looks at no input scores. `stock_agreement`, `output_difference`: the chosen trial's.
    `held_out_stock` is that on the holdout, where there is one.
    `ranking`: output error on the calibration slice of each candidate that was considered.
    `sensitivity`: output error of each layer alone, as the chosen candidate runs it, relative to its float output.
    `baseline_pass_s`: the float model's forward passes over the evaluation split, timed as a trial's `duration_s` is;
    unlike `baseline.duration_s` it compares with them. `calibration_batches`: of an object.
    `compared_examples`: with stock transformers, on the tuning split; 0: as many as were timed.
    `float32_mib`: what the source's tensors take in float32; of a source in 16 bits, twice its file.
    `explanation`: why the chosen model differs from FP32, where that was asked for.
    `recovery`: the fine-tuning that the weights come from, where post-training quantization missed the goal.
    """

    hfq_version: str
    checkpoint: CheckpointInfo
    metric: str
    metric_label: str
    goal: Goal
    approach: str
    chosen: str
    met: bool | None
    trials: list[Trial]
    baseline: Measurement
    quantized: Measurement
    layers: Layers
    seed: int
    created: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    metric_in_points: bool = True
    decisions: dict[str, float] = field(default_factory=dict)
    task: str | None = None
    pipeline_tag: str | None = None
    library: str = "transformers"
    usage: str = ""
    dataset: DatasetInfo | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    trivial: Trivial | None = None
    timed_examples: int = 0
    compared_examples: int = 0
    batch_size: int = 0
    command: str = ""
    warnings: list[str] = field(default_factory=list)
    stock_agreement: float | None = None
    output_difference: float | None = None
    ranking: dict[str, float] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)
    baseline_pass_s: float | None = None
    held_out_stock: StockComparison | None = None
    calibration_batches: int = 0
    float32_mib: float | None = None
    explanation: Explanation | None = None
    recovery: Recovery | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def of_object(self) -> bool:
        """Whether `fit` made it of a model in memory."""
        return self.dataset is None

    @property
    def of_labels(self) -> bool:
        """Whether its scores compare with labels, and not with what FP32 answers."""
        return self.metric != FIDELITY

    @property
    def tuned(self) -> bool:
        """Whether anything was evaluated."""
        return bool(self.trials)

    @property
    def data(self) -> DatasetInfo:
        """The dataset of a run from a checkpoint."""
        assert self.dataset is not None, "fit knows no dataset"
        return self.dataset

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return redact(json.dumps(asdict(self), indent=2, ensure_ascii=False)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Of this schema version or an earlier one.

        Raises:
            AttributeError, ValueError, TypeError, KeyError: `text` is not a report.
        """
        data = upgraded(parse_json(text))
        explanation, recovery = data.get("explanation"), data.get("recovery")
        dataset, trivial, stock = data.get("dataset"), data.get("trivial"), data.get("held_out_stock")
        return cls(
            **{
                **data,
                "checkpoint": CheckpointInfo(**data["checkpoint"]),
                "dataset": dataset and DatasetInfo(**dataset),
                "goal": Goal(**data["goal"]),
                "trials": [Trial(**row) for row in data["trials"]],
                "baseline": Measurement(**data["baseline"]),
                "quantized": Measurement(**data["quantized"]),
                "comparisons": [_comparison(row) for row in data["comparisons"]],
                "trivial": trivial and Trivial(**trivial),
                "held_out_stock": stock and StockComparison(**stock),
                "layers": Layers(**data["layers"]),
                "explanation": explanation and Explanation.from_dict(explanation),
                "recovery": recovery and Recovery(**{**recovery, "looks": [Look(**row) for row in recovery["looks"]]}),
            }
        )


@dataclass(frozen=True)
class Result:
    """A finished run: the folder with the int8 checkpoint, and its report."""

    folder: Path
    report: Report


def read_report(folder: Path) -> Report:
    """The report of an exported folder: of a run from a checkpoint, or of `fit`.

    Raises:
        WrongCheckpointError: there is none.
        SourceError: it is not one of hfq's.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        raise WrongCheckpointError(
            f"{folder} has no {REPORT_FILE}: it was not written by hfq. Expected the output of `hfq quantize`."
        )
    try:
        return Report.from_json(read_text(path))
    except (AttributeError, OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"{path} is not a report of this hfq version ({error}). Quantize again to renew it."
        ) from error


def layers_of(found: "Found") -> Layers:
    """How the layers of a search's outcome run."""
    schemes = found.plan.layers

    def running(approach: str) -> list[str]:
        return [name for name, scheme in schemes.items() if scheme.approach == approach]

    return Layers(
        static=running("static"),
        dynamic=running("dynamic"),
        weight_only=running("weight-only"),
        embeddings=list(found.plan.embeddings),
        float_layers=found.float_layers,
        other=dict(found.space.layers.other),
    )


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    """Installed versions of what a result depends on, and Python's."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _comparison(row: dict[str, Any]) -> Comparison:
    intervals = {name: tuple(row[name]) for name in ("interval", "elsewhere") if row.get(name)}
    confusion = row.get("confusion")
    return Comparison(**{**row, **intervals, "confusion": Confusion(**confusion) if confusion else None})
