"""Reports that earlier versions of hfq wrote, as this one would have written them."""

from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 2
_LABELS = {"f1": "F1", "matthews_correlation": "Matthews correlation"}


def upgraded(data: Mapping[str, Any]) -> dict[str, Any]:
    """The content of an hfq.json, in the form that `SCHEMA_VERSION` names.

    Raises:
        ValueError: a later version of hfq wrote it.
        AttributeError, TypeError, KeyError: it is no report.
    """
    version = data.get("schema_version", 1)
    if version > SCHEMA_VERSION:
        raise ValueError(f"it has schema version {version}, and this hfq knows {SCHEMA_VERSION}: update hfq")
    return dict(data) if version == SCHEMA_VERSION else _from_first(data)


def _from_first(data: Mapping[str, Any]) -> dict[str, Any]:
    """hfq 0.1 had two forms, of runs and of `fit`, figures in MiB that were called mb, and one task."""
    found = dict(data)
    of_object = "checkpoint" not in found
    for name in ("baseline", "quantized"):
        found[name] = _mebibytes(found[name])
    found["trials"] = [_differences(_mebibytes(row)) for row in found["trials"]]
    metric = "score" if of_object else found["metric"]
    criterion = dict(found.pop("criterion"))
    found["metric"] = metric
    found["metric_label"] = _LABELS.get(metric, metric.replace("_", " ").capitalize())
    found["metric_in_points"] = not of_object
    found["goal"] = {**criterion, "baseline": found["baseline"]["accuracy"]}
    found["schema_version"] = SCHEMA_VERSION
    if of_object:
        found["checkpoint"] = {"id": found.pop("model"), "revision": "in memory"}
        found["comparisons"] = []
        del found["tuned"]
        return found
    dataset = dict(found["dataset"])
    dataset["columns"] = {"text": dataset.pop("text_columns"), "label": [dataset.pop("label_column")]}
    dataset["alignment"] = dataset.pop("label_alignment")
    found["dataset"] = dataset
    found["comparisons"] = [
        {**row, "difference": (row["only_int8_right"] - row["only_float_right"]) / max(1, row["examples"])}
        for row in found["comparisons"]
    ]
    found["pipeline_tag"] = tag = found["task"]
    found["usage"] = f'from transformers import pipeline\n\nmodel = pipeline("{tag}", model="{{model}}", device="cpu")'
    found["trivial"] = {"score": found.pop("majority_accuracy"), "how": "answering the most common label"}
    return _differences(found)


def _mebibytes(row: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name.removesuffix('_mb')}_mib" if name.endswith("_mb") else name: value for name, value in row.items()}


def _differences(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"output_difference" if name == "logit_difference" else name: value for name, value in row.items()}
