"""hfq as an optimum quantizer: the same pipeline as `hfq quantize`, by optimum's names."""

import shlex
from pathlib import Path
from typing import Any

from optimum.quantization_base import OptimumQuantizer

from .common.errors import UsageError
from .common.resources import resource
from .common.ui import Reporter
from .pipeline import Execution
from .pipeline import quantize as run_pipeline
from .recipe import Recipe, flag, make_recipe
from .report.report import Result

OF_THE_CHECKPOINT = ("revision", "task", "trust_remote_code")
REFUSED = {
    "checkpoint": "from_pretrained has named it",
    **dict.fromkeys(OF_THE_CHECKPOINT, "it belongs to the checkpoint; give it to from_pretrained"),
    "token": "give it to from_pretrained, or set HF_TOKEN",
    "output": "the folder is save_dir",
    **dict.fromkeys(("push", "to", "private", "create_pr"), "nothing is published here; use `hfq push` afterwards"),
}


class HfqQuantizer(OptimumQuantizer):
    """Quantizes a checkpoint from the Hub or a folder.

    Example:
        >>> quantizer = HfqQuantizer.from_pretrained("Intel/bert-base-uncased-mrpc")
        >>> quantizer.quantize("./int8", dataset="nyu-mll/glue", subset="mrpc")
    """

    def __init__(self, checkpoint: str, *, token: str | None = None, **of_the_checkpoint: Any) -> None:
        self.checkpoint = checkpoint
        self.token = token
        self.of_the_checkpoint = of_the_checkpoint

    @classmethod
    def from_pretrained(
        cls, model_or_path: str | Path, file_name: str | None = None, *, token: str | None = None, **kwargs: Any
    ) -> "HfqQuantizer":
        """A quantizer of the checkpoint `model_or_path`, a Hub id or folder. `kwargs`: revision, task, trust_remote_code.

        Nothing is read yet: `quantize` does that, and says what is wrong with the checkpoint.

        Raises:
            UsageError: another keyword, or a model instead of its name; or `file_name`: hfq takes all weights.
        """
        if not isinstance(model_or_path, (str, Path)):
            raise UsageError(
                f"model_or_path is of type {type(model_or_path).__name__}; expected a Hub id or folder. "
                "A model in memory is quantized by hfq.quantization.fit."
            )
        if file_name is not None:
            raise UsageError(f"file_name is {file_name!r}, but hfq takes all safetensors files of a checkpoint.")
        for name in kwargs:
            if name not in OF_THE_CHECKPOINT:
                raise UsageError(
                    f"from_pretrained has no argument {name!r}; expected {', '.join(OF_THE_CHECKPOINT)} or token."
                )
        return cls(str(model_or_path), token=token, **kwargs)

    def quantize(
        self, save_dir: str | Path, file_prefix: str | None = None, *, resume: bool = False, **kwargs: Any
    ) -> Result:
        """Search, export to the folder `save_dir`, measure. `kwargs`: the other keys of a recipe (`hfq.recipe.Recipe`).

        `resume`: go on with a run into `save_dir` that was interrupted or missed its goal; no trial is repeated.

        Raises:
            UsageError: an argument that cannot be used here, with the reason; or `file_prefix`.
            GoalNotMetError, HfqError: as `hfq.pipeline.quantize` does.
        """
        if file_prefix is not None:
            raise UsageError(f"file_prefix is {file_prefix!r}, but transformers looks for model.safetensors.")
        for name in kwargs:
            if name in REFUSED:
                raise UsageError(f"quantize has no argument {name!r}: {REFUSED[name]}.")
        values = {"checkpoint": self.checkpoint, **self.of_the_checkpoint, **kwargs, "output": str(save_dir)}
        recipe = make_recipe(values, origin="HfqQuantizer")
        return run_pipeline(
            recipe,
            recipes=resource("pipelines"),
            ui=Reporter(),
            token=self.token,
            execution=Execution(_command(recipe), resume=resume),
        )


def _command(recipe: Recipe) -> str:
    """The `hfq quantize` that repeats this, for the card; as there, without where things lie on this machine."""
    words = []
    for name, value in recipe.model_dump(exclude_defaults=True).items():
        for each in _each(value):
            text = Path(each).name if str(each).startswith(("/", "~")) else str(each)
            words += [text] if name == "checkpoint" else [flag(name)] if each is True else [flag(name), text]
    return shlex.join(["hfq", "quantize", *words])


def _each(value: Any) -> list[Any]:
    """What a flag is given, each time it is repeated."""
    if isinstance(value, dict):
        return [f"{role}={name}" for role, names in value.items() for name in names]
    return value if isinstance(value, list) else [value]
