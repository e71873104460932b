"""A recipe: everything a run needs to know, validated. The command line builds one from flags.

A token is never part of it: recipes are committed and published.
"""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .common.errors import UsageError
from .common.files import user_path
from .common.names import is_path
from .common.reading import read_text, read_yaml
from .common.redact import holds_token

LARGEST = 1 << 20  # bytes of a recipe
LONGEST = 4096  # characters of a value, as long as a path may be
EXPLAINED = (
    "calibration_split",
    "calibration_samples",
    "tolerable_loss",
    "criterion",
    "layers",
)  # that `hfq explain` takes
SETTINGS = ("pooling", "prompt")  # keys that only some tasks read


@dataclass(frozen=True)
class PushOptions:
    """How a repository is to take an export.

    `private`: it is made private, and a public one is refused. `create_pr`: propose the commit as a pull request.
    `force`: a repository that holds another model may be overwritten. The same commit replaces files of the same name
    and takes away weights, adapters and tokenizer files that transformers would load instead of, or together with, the
    int8 ones. The rest stays, and all of it stays in the repository's history. `branch`: commit to this one, made from
    main if there is none. `tag`: give the commit this name.
    """

    private: bool = False
    create_pr: bool = False
    force: bool = False
    branch: str | None = None
    tag: str | None = None


PUBLISHING = tuple(field.name for field in fields(PushOptions))  # keys that say how a push is made


def _key(default: Any, description: str, *, absent: str | None = None, form: str | None = None, **bounds: Any) -> Any:
    """A key of a recipe, and with it a flag of the command line. `absent`: in words, what holds where it is None.

    `form`: of names by what they are for, how the flag is written.
    """
    said: Any = {name: text for name, text in (("absent", absent), ("form", form)) if text}
    return Field(default, description=description, json_schema_extra=said or None, **bounds)


class Evaluation(BaseModel):
    """What to measure, on which data, and how: the keys of a recipe that `hfq eval` takes too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = _key(..., "Hub id or folder of a checkpoint.", min_length=1)
    revision: str | None = _key(None, "Branch, tag or commit of the checkpoint.")
    task: str | None = _key(None, "Task; `hfq tasks` lists them.", absent="found from the architecture")
    dataset: str | None = _key(
        None, "Hub id, folder or file (CSV, JSON, Parquet, plain text).", absent="what the checkpoint's card names"
    )
    subset: str | None = _key(None, "Dataset configuration, such as mrpc of nyu-mll/glue.")
    split: str | None = _key(
        None, "Split to evaluate on; several with commas, together.", absent="validation, else test"
    )
    columns: dict[str, list[str]] = _key(
        {},
        "Column that the task reads as ROLE, such as text=sentence1; repeat it for more. `hfq tasks` lists the roles.",
        absent="found by name",
        form="ROLE=NAME",
    )
    text_columns: list[str] = _key(
        [], "Text column; repeat it for a pair, in order. Another spelling of --column, such as text=NAME."
    )
    label_column: str | None = _key(None, "Column of labels. Another spelling of --column, such as label=NAME.")
    metric: str | None = _key(None, "Metric that decides; `hfq tasks` lists them.", absent="the task's first")
    pooling: Literal["mean", "cls", "max", "lasttoken"] | None = _key(
        None, "How an encoder's tokens become one vector.", absent="as the checkpoint's modules.json says"
    )
    prompt: str | None = _key(
        None, "Name of the model's prompt to embed texts with.", absent="its default; of retrieval data, its query's"
    )
    max_length: int | None = _key(None, "Longest input in tokens.", absent="the model's limit", ge=2)
    batch_size: int = _key(32, "Examples a batch.", ge=1)
    seed: int = _key(42, "Seed of every random choice.", ge=0, lt=2**32)
    threads: int | None = _key(None, "CPU threads.", absent="torch's", ge=1)
    accelerator: str = _key("cpu", "Lightning accelerator of evaluations.")
    devices: int = _key(1, "Lightning devices of evaluations.", ge=1)
    strategy: str = _key("auto", "Lightning strategy of evaluations.")
    trust_remote_code: bool = _key(False, "Run code from the checkpoint's repository.")

    @property
    def settings(self) -> dict[str, Any]:
        """What only some tasks read."""
        return self.model_dump(include=set(SETTINGS))


class Recipe(Evaluation):
    """What to quantize, on which data, to which goal, and where the result goes.

    The one list of settings: names, types, defaults and descriptions of the command line's flags are those of its keys.
    """

    calibration_split: str | None = _key(None, "Split to calibrate on.", absent="train")
    approach: Literal["auto", "static", "dynamic"] = _key("auto", "Post-training quantization to search.")
    calibration_samples: int = _key(100, "Examples to calibrate on.", ge=1)
    tolerable_loss: float = _key(0.01, "Largest loss of the metric.", ge=0, lt=1)
    criterion: Literal["relative", "absolute"] = _key(
        "relative", "How the loss counts: as a share of the float model's score, or as a difference from it."
    )
    confidence: float | None = _key(
        None,
        "How sure the examples must make it that the loss is tolerable, such as 0.95.",
        absent="the score decides",
        gt=0.5,
        lt=1,
    )
    layers: dict[str, list[str]] = _key(
        {},
        "Run layers as HOW, whatever the search would do: float, dynamic, static or an observer such as mse. A name may hold "
        "*; repeat it for more. `hfq explain` says which.",
        form="HOW=NAME",
    )
    max_trials: int = _key(600, "Most evaluations to spend.", ge=1)
    timeout: float = _key(0, "Most seconds of tuning; 0 is no limit.", ge=0)
    explore: bool = _key(False, "Evaluate every candidate, then choose.")
    recover: bool = _key(
        False, "Where no trial meets the goal, fine-tune with FP32 as the teacher, without labels, and search on."
    )
    explain: bool = _key(False, "Also say in the report why INT8 differs, layer by layer.")
    allow_loss: bool = _key(False, "Save the best trial even if it misses the goal; the card says so.")
    output: str | None = _key(None, "Folder to write.", absent="CHECKPOINT-int8")
    push: bool = _key(False, "Publish the result on the Hub.")
    to: str | None = _key(None, "Repository.", absent="YOU/CHECKPOINT-int8")
    private: bool = _key(False, "Create the repository private.")
    create_pr: bool = _key(False, "Open a pull request instead of committing to main.")
    force: bool = _key(False, "Overwrite a repository that holds another model; its history keeps that.")
    branch: str | None = _key(None, "Branch to push to; made if there is none.", absent="main", min_length=1)
    tag: str | None = _key(None, "Tag for the commit that is pushed.", min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        for name, value in self:
            texts = [text for text in _leaves(value) if isinstance(text, str)]
            if any(len(text) > LONGEST for text in texts):
                raise ValueError(f"{name} is longer than {LONGEST} characters")
            if not all(text.isprintable() for text in texts):
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
    def push_options(self) -> PushOptions:
        """How a push is made."""
        return PushOptions(**self.model_dump(include=set(PUBLISHING)))

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


def flag(key: str) -> str:
    """How the command line spells a key. One that holds several is repeated there, and therefore in the singular."""
    several = get_origin(Recipe.model_fields[key].annotation) in (list, dict)
    return f"--{(key.removesuffix('s') if several else key).replace('_', '-')}"


def command(name: str, recipe: Evaluation) -> str:
    """The command line that gives a recipe to `hfq NAME`, as a shell takes it."""
    values = recipe.model_dump(exclude_defaults=True)
    words = [*name.split(), str(values.pop("checkpoint"))]
    for key, value in values.items():
        several = [f"{use}={one}" for use, of in value.items() for one in of] if isinstance(value, dict) else value
        for one in several if isinstance(several, list) else [several]:
            words += [flag(key)] if one is True else [flag(key), str(one)]
    return shlex.join(words)


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
    name = flag(str(row["loc"][0])) if is_flag else key
    return f"{name}: {row['msg'].replace('Input', 'it', 1)} (got {shortened(row['input'])})"


def _leaves(value: Any) -> list[Any]:
    """What a list, or a dict of lists, is made of; of a dict, its keys too."""
    if isinstance(value, dict):
        return [*value, *(leaf for each in value.values() for leaf in _leaves(each))]
    return value if isinstance(value, list) else [value]


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
