"""What a run found, as plain dataclasses: the content of `hfq.json`, and all that a card may state.

Accuracy is the value of the chosen metric as a fraction; durations are seconds, memory and sizes MiB.
"""

import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import SourceError
from .reading import parse_json, read_text
from .redact import redact

REPORT_FILE = "hfq.json"
CARD_FILE = "README.md"
_PACKAGES = ("hfq", "torch", "transformers", "compressed-tensors", "datasets", "huggingface_hub", "lightning")


@dataclass(frozen=True)
class CheckpointInfo:
    """Where the float model came from. `revision` is a commit sha, or `sha256:…` of a local folder's weights.

    `remote_code`: it brings code of its own. `remote_code_allowed`: --trust-remote-code was given, so that it ran.
    `terms`: what else the metadata of its card say of who may do what with it, as they say it. `license_files`: beside it.
    """

    id: str
    revision: str
    license: str | list[str] | None = None
    language: list[str] = field(default_factory=list)
    remote_code: bool = False
    remote_code_allowed: bool = False
    terms: dict[str, Any] = field(default_factory=dict)
    license_files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DatasetInfo:
    """The data that tuned and measured the model. `revision` is a commit sha on the Hub, else None.

    `holdout_split` is a labelled split that neither calibration nor tuning saw, where there is one.
    """

    id: str
    subset: str | None
    revision: str | None
    split: str
    calibration_split: str
    calibration_samples: int
    text_columns: list[str]
    label_column: str
    label_alignment: str
    examples: int
    holdout_split: str | None = None
    holdout_examples: int = 0
    max_length: int = 0


@dataclass(frozen=True)
class CriterionInfo:
    """The accuracy goal: the largest tolerated loss, relative to the float accuracy or in absolute points."""

    kind: str
    tolerable_loss: float
    higher_is_better: bool = True


@dataclass(frozen=True)
class Trial:
    """One candidate that was evaluated on the whole evaluation split.

    `duration_s`: its forward passes there. `loss`: as the criterion counts it. `output_error`: squared error of
    the encoder's output on the calibration slice, relative to the float model's output. `stock_agreement`: share of
    examples on which int8 kernels and stock transformers, which dequantizes, give the same answer, and
    `logit_difference` their mean absolute difference; None where the goal was missed anyway. `memory_mb`: parameters
    and buffers; `size_mb`: what of them is saved.
    """

    name: str
    accuracy: float
    duration_s: float
    accepted: bool
    output_error: float | None = None
    loss: float | None = None
    stock_agreement: float | None = None
    logit_difference: float | None = None
    memory_mb: float | None = None
    size_mb: float | None = None


@dataclass(frozen=True)
class Measurement:
    """One model, freshly loaded in processes of its own. None: not measured.

    `memory_mb`: parameters and buffers. `size_mb`: weight files on disk. `peak_memory_mb`: resident peak of a
    process that loads and runs it, less that of one that only imports the libraries. `duration_s`: one
    pass over the timed batches.
    """

    accuracy: float
    duration_s: float
    memory_mb: float
    size_mb: float
    peak_memory_mb: float
    examples_per_s: float
    holdout_accuracy: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Both models on the same examples of `split`.

    `interval`: 95 % interval of the accuracy difference (int8 - float), paired bootstrap over examples.
    `p_value`: exact McNemar test that the two are equally often right.
    """

    split: str
    examples: int
    both_right: int
    only_float_right: int
    only_int8_right: int
    agreement: float
    interval: tuple[float, float]
    p_value: float
    seen_in_tuning: bool


@dataclass(frozen=True)
class StockComparison:
    """Int8 kernels beside stock transformers, which dequantizes, on the same `examples` of `split`.

    `agreement`: share of them with the same answer. `logit_difference`: mean absolute difference.
    """

    split: str
    examples: int
    agreement: float
    logit_difference: float
    seen_in_tuning: bool


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
    """Everything about one run. `command` repeats it.

    `stock_agreement` and `logit_difference` are the chosen trial's, which was chosen by them, too; `held_out_stock` is
    the same on the holdout, where there is one.
    `ranking`: output error on the calibration slice of each candidate that was considered.
    `sensitivity`: output error of each layer alone, as the chosen candidate runs it, relative to its float output.
    `baseline_pass_s`: the float model's forward passes over the evaluation split, timed as a trial's `duration_s` is;
    unlike `baseline.duration_s` it compares with them.
    """

    hfq_version: str
    task: str
    checkpoint: CheckpointInfo
    dataset: DatasetInfo
    metric: str
    criterion: CriterionInfo
    approach: str
    chosen: str
    met: bool
    trials: list[Trial]
    baseline: Measurement
    quantized: Measurement
    comparisons: list[Comparison]
    layers: Layers
    majority_accuracy: float
    logit_difference: float | None
    timed_examples: int
    batch_size: int
    seed: int
    command: str
    created: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    stock_agreement: float | None = None
    ranking: dict[str, float] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)
    baseline_pass_s: float | None = None
    held_out_stock: StockComparison | None = None

    def to_json(self) -> str:
        return redact(json.dumps(asdict(self), indent=2, ensure_ascii=False)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Raises `AttributeError`, `ValueError`, `TypeError` or `KeyError` when `text` is not a report."""
        data = parse_json(text)
        stock = data.get("held_out_stock")
        return cls(
            **{
                **data,
                "checkpoint": CheckpointInfo(**data["checkpoint"]),
                "dataset": DatasetInfo(**data["dataset"]),
                "criterion": CriterionInfo(**data["criterion"]),
                "trials": [Trial(**row) for row in data["trials"]],
                "baseline": Measurement(**data["baseline"]),
                "quantized": Measurement(**data["quantized"]),
                "comparisons": [
                    Comparison(**{**row, "interval": tuple(row["interval"])}) for row in data["comparisons"]
                ],
                "layers": Layers(**data["layers"]),
                "held_out_stock": None if stock is None else StockComparison(**stock),
            }
        )


@dataclass(frozen=True)
class FitMeasurement:
    """One model in memory. None: there was nothing to evaluate it with. `duration_s`: of that evaluation."""

    accuracy: float | None
    duration_s: float | None
    memory_mb: float
    size_mb: float


@dataclass(frozen=True)
class FitReport:
    """What `hfq.quantization.fit` did to a model it was given as an object.

    `model`: its class. `tuned`: whether anything was evaluated; `met` is None where nothing was.
    """

    hfq_version: str
    model: str
    approach: str
    chosen: str
    tuned: bool
    met: bool | None
    criterion: CriterionInfo
    trials: list[Trial]
    baseline: FitMeasurement
    quantized: FitMeasurement
    layers: Layers
    calibration_batches: int
    seed: int
    created: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    ranking: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return redact(json.dumps(asdict(self), indent=2, ensure_ascii=False)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "FitReport":
        """Raises `AttributeError`, `ValueError`, `TypeError` or `KeyError` when `text` is not such a report."""
        data = parse_json(text)
        return cls(
            **{
                **data,
                "criterion": CriterionInfo(**data["criterion"]),
                "trials": [Trial(**row) for row in data["trials"]],
                "baseline": FitMeasurement(**data["baseline"]),
                "quantized": FitMeasurement(**data["quantized"]),
                "layers": Layers(**data["layers"]),
            }
        )


def read_report(folder: Path) -> Report | FitReport:
    """The report of an exported folder: of a run from a checkpoint, or of `fit`.

    Raises:
        SourceError: there is none, or it is not one of hfq's.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        raise SourceError(
            f"{folder} has no {REPORT_FILE}: it was not written by hfq. Expected the output of `hfq quantize`."
        )
    try:
        text = read_text(path)
        return Report.from_json(text) if "checkpoint" in parse_json(text) else FitReport.from_json(text)
    except (AttributeError, OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"{path} is not a report of this hfq version ({error}). Quantize again to renew it."
        ) from error


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
