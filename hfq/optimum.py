"""hfq as an optimum quantizer: the same pipeline as `hfq quantize`, by optimum's names."""

from pathlib import Path
from typing import Any

from optimum.quantization_base import OptimumQuantizer

from .pipeline import Result
from .pipeline import quantize as run_pipeline
from .recipe import make_recipe
from .resources import resource
from .ui import Reporter

OF_THE_CHECKPOINT = ("revision", "task", "trust_remote_code")


class HfqQuantizer(OptimumQuantizer):
    """Quantizes a checkpoint from the Hub or a folder.

    Example:
        >>> quantizer = HfqQuantizer.from_pretrained("Intel/bert-base-uncased-mrpc")
        >>> quantizer.quantize("./int8", dataset="nyu-mll/glue", subset="mrpc")
    """

    def __init__(self, checkpoint: str, *, token: str | None = None, **settings: Any) -> None:
        self.checkpoint = checkpoint
        self.token = token
        self.settings = settings

    @classmethod
    def from_pretrained(
        cls, model_or_path: str | Path, file_name: str | None = None, *, token: str | None = None, **kwargs: Any
    ) -> "HfqQuantizer":
        """A quantizer of the checkpoint `model_or_path`, a Hub id or folder. `kwargs`: revision, task, trust_remote_code.

        Raises:
            TypeError: another keyword.
            ValueError: `file_name` is given: a checkpoint's weights are all its safetensors files.
        """
        if file_name is not None:
            raise ValueError(f"file_name is {file_name!r}; hfq takes all safetensors files of a checkpoint.")
        unknown = sorted(set(kwargs) - set(OF_THE_CHECKPOINT))
        if unknown:
            raise TypeError(f"from_pretrained has no argument {unknown[0]!r}; expected {', '.join(OF_THE_CHECKPOINT)}.")
        return cls(str(model_or_path), token=token, **kwargs)

    def quantize(self, save_dir: str | Path, file_prefix: str | None = None, **kwargs: Any) -> Result:
        """Search, export to the folder `save_dir`, measure. `kwargs`: the keys of a recipe (`hfq.recipe.Recipe`).

        Raises:
            UsageError: a key or value that a recipe cannot have, naming it; `push` is for `hfq push`.
            ValueError: `file_prefix` is given: stock transformers looks for model.safetensors.
            GoalNotMetError, HfqError: as `hfq.pipeline.quantize` does.
        """
        if file_prefix is not None:
            raise ValueError(f"file_prefix is {file_prefix!r}; transformers looks for model.safetensors.")
        for name in ("push", "to", "private", "create_pr"):
            if name in kwargs:
                raise ValueError(f"{name} is given, but nothing is published here. Use `hfq push {save_dir}`.")
        values = {**self.settings, **kwargs, "checkpoint": self.checkpoint, "output": str(save_dir)}
        recipe = make_recipe(values)
        return run_pipeline(recipe, recipes=resource("pipelines"), ui=Reporter(), token=self.token)
