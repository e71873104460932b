"""A recipe: everything a run needs to know, validated. The command line builds one from flags.

A token is never part of it: recipes are committed and published.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .common.errors import UsageError
from .common.files import user_path
from .common.names import is_path
from .common.reading import read_text, read_yaml
from .common.redact import holds_token

LARGEST = 1 << 20  # bytes of a recipe
LONGEST = 4096  # characters of a value, as long as a path may be


class Recipe(BaseModel):
    """What to quantize, on which data, to which goal, and where the result goes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = Field(min_length=1, description="Hub id or folder of the float checkpoint")
    revision: str | None = Field(None, description="branch, tag or commit of the checkpoint")
    task: str | None = Field(None, description="task; found from the checkpoint's architecture when absent")
    dataset: str | None = Field(None, description="Hub id, folder or file (CSV, JSON, Parquet)")
    subset: str | None = Field(None, description="dataset configuration, such as 'mrpc' of nyu-mll/glue")
    split: str | None = Field(None, description="split that decides whether the goal is met")
    calibration_split: str | None = Field(None, description="split the calibration slice is drawn from")
    columns: dict[str, list[str]] = Field(default_factory=dict, description="columns by what the task reads in them")
    text_columns: list[str] = Field(default_factory=list, description="text columns, in the model's order")
    label_column: str | None = Field(None, description="column of labels")
    metric: str | None = Field(None, description="metric that decides; the task's first when absent")
    approach: Literal["auto", "static", "dynamic"] = "auto"
    calibration_samples: int = Field(100, ge=1)
    tolerable_loss: float = Field(0.01, ge=0, lt=1)
    criterion: Literal["relative", "absolute"] = "relative"
    max_trials: int = Field(600, ge=1)
    timeout: float = Field(0, ge=0, description="seconds of tuning; 0 is no limit")
    explore: bool = Field(False, description="evaluate every candidate instead of stopping at the first that passes")
    allow_loss: bool = Field(False, description="save the best trial even when the goal is not met")
    max_length: int | None = Field(None, ge=2, description="tokens; the model's own limit when absent")
    batch_size: int = Field(32, ge=1)
    seed: int = Field(42, ge=0, lt=2**32)
    threads: int | None = Field(None, ge=1)
    accelerator: str = Field("cpu", description="Lightning accelerator of the evaluations")
    devices: int = Field(1, ge=1)
    strategy: str = Field("auto", description="Lightning strategy of the evaluations")
    output: str | None = Field(None, description="folder; '<checkpoint>-int8' when absent")
    push: bool = False
    to: str | None = Field(None, description="repository to push to; '<you>/<checkpoint>-int8' when absent")
    private: bool = False
    create_pr: bool = False
    force: bool = Field(False, description="overwrite a repository that holds another model")
    branch: str | None = Field(None, min_length=1, description="branch to push to; 'main' when absent")
    tag: str | None = Field(None, min_length=1, description="tag for the commit that is pushed")
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        for name, value in self:
            texts = value if isinstance(value, list) else [value]
            if any(len(text) > LONGEST for text in texts if isinstance(text, str)):
                raise ValueError(f"{name} is longer than {LONGEST} characters")
            if not all(text.isprintable() for text in texts if isinstance(text, str)):
                raise ValueError(f"{name} holds a character that cannot be printed: {shortened(value)}")
        if self.strategy == "ddp":
            raise ValueError(
                "strategy 'ddp' starts the whole command again in every process; use 'ddp_spawn', "
                "which starts only the evaluation"
            )
        if self.create_pr and (self.branch or self.tag):
            raise ValueError(
                "a pull request (create_pr) goes to main, and has no commit to tag before it is merged; leave out "
                "'branch' and 'tag', or 'create_pr'"
            )
        return self

    @property
    def publishing(self) -> dict[str, Any]:
        """How a push is made: what `hfq.publish.push_folder` takes by these names."""
        return self.model_dump(include={"private", "create_pr", "force", "branch", "tag"})

    @property
    def name(self) -> str:
        """The checkpoint's name without its owner or folder."""
        return (
            user_path(self.checkpoint.rstrip("/")).resolve().name
            if is_path(self.checkpoint)
            else self.checkpoint.split("/")[-1]
        )

    @property
    def output_folder(self) -> Path:
        return user_path(self.output or f"{self.name}-int8")


def make_recipe(values: dict[str, Any], *, origin: str | None = None) -> Recipe:
    """A validated recipe, of a file (`origin`) or of flags.

    Raises:
        UsageError: naming each wrong key, what it holds and what was expected.
    """
    if "token" in values or any(holds_token(str(value)) for value in values.values()):
        raise UsageError(
            f"{origin or 'A flag other than --token'} holds a token, and recipes are kept and published. "
            "Pass it with --token, or set HF_TOKEN."
        )
    try:
        return Recipe(**values)
    except ValidationError as error:
        problems = [_problem(row, is_flag=origin is None) for row in error.errors()]
        raise UsageError(f"{origin or 'This command'} cannot be run: {'; '.join(problems)}.") from error


def _problem(row: Mapping[str, Any], *, is_flag: bool) -> str:
    if not row["loc"]:
        return row["msg"].removeprefix("Value error, ")
    key = ".".join(map(str, row["loc"]))
    if row["type"] == "missing":
        return f"{key!r} is missing"
    if row["type"] == "extra_forbidden":
        return f"{shortened(key)} is no key of a recipe (keys: {', '.join(Recipe.model_fields)})"
    name = f"--{key.replace('_', '-')}" if is_flag else key
    return f"{name}: {row['msg'].replace('Input', 'it', 1)} (got {shortened(row['input'])})"


def shortened(value: object) -> str:
    """How a value looks in Python, its end cut off if that is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def read_recipe(path: Path) -> Recipe:
    """Read YAML. A checkpoint or dataset that starts with './' or '../' is looked for beside the recipe.

    Raises:
        UsageError: the file is missing, not YAML, or not a recipe.
    """
    try:
        values = read_yaml(read_text(path, limit=LARGEST))
    except OSError as error:
        raise UsageError(
            f"Recipe {path} cannot be read: {error.strerror}. Expected a YAML file; see pipelines/."
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"Recipe {path} is not YAML: {' '.join(str(error).split())}. Mend it; see pipelines/."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(
            f"Recipe {path} holds {type(values).__name__ if values else 'nothing'}; expected keys and values such as 'checkpoint: …'."
        )
    for key in ("checkpoint", "dataset"):
        value = values.get(key)
        if isinstance(value, str) and value.startswith(("./", "../")):
            place = path.parent / value
            values[key] = str(place) if place.is_absolute() else f"./{place}"  # or, if it is missing, a Hub id
    return make_recipe(values, origin=f"Recipe {path}")


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write what differs from the defaults, as YAML that `hfq run` takes. Paths become relative to the recipe."""
    values = recipe.model_dump(exclude_defaults=True)
    for key in ("checkpoint", "dataset"):
        value = values.get(key, "~")
        if is_path(value) and not value.startswith(("/", "~")):
            values[key] = f"./{os.path.relpath(value, path.parent)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"The recipe cannot be written to {path}: {error.strerror}. Choose another --save-recipe."
        ) from error
