"""One checkpoint, its float model and its data, loaded and batched: what tuning and measuring read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .bounds import bounded
from .data import Examples, TaskData, load_task_data
from .errors import HfqError, SourceError, UsageError
from .evaluation import Engine, Evaluation
from .recipe import Recipe
from .runtime.memory import weights_left_in_file
from .source import Checkpoint, pull
from .tasks import TASKS, find_task
from .ui import Reporter

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Session:
    """`calibration`, `evaluation`, `holdout`: padded batches with `labels`, shortest examples first."""

    recipe: Recipe
    checkpoint: Checkpoint
    task: str
    data: TaskData
    model: nn.Module
    calibration: list[Batch]
    evaluation: list[Batch]
    holdout: list[Batch]

    @property
    def auto_class(self) -> str:
        return TASKS[self.task].auto_class

    def evaluate(self, model: nn.Module, batches: list[Batch]) -> Evaluation:
        """The recipe's metric of `model` on `batches`, by the recipe's engine."""
        from .validation import evaluate

        recipe = self.recipe
        engine = Engine(recipe.accelerator, recipe.devices, recipe.strategy)
        labels = len(self.data.label_names)
        with weights_left_in_file(model):
            return evaluate(model, batches, metric=recipe.metric, num_labels=labels, engine=engine)


def open_session(recipe: Recipe, *, recipes: Path, ui: Reporter, token: str | None, quantized: bool = False) -> Session:
    """Pull the checkpoint, load its data and its model. `quantized`: an int8 checkpoint is welcome.

    Raises:
        HfqError: the checkpoint or the dataset cannot be used.
    """
    ui.stage(f"Checkpoint {recipe.checkpoint}")
    checkpoint = pull(
        recipe.checkpoint, revision=recipe.revision, token=token, trust_remote_code=recipe.trust_remote_code
    )
    if checkpoint.is_quantized and not quantized:
        raise UsageError(
            f"{recipe.checkpoint} is quantized already: config.json has a quantization_config. Expected the float checkpoint that it was made from."
        )
    for warning in checkpoint.warnings:
        ui.warn(warning)
    task_name = find_task(checkpoint.config, recipe.task)
    ui.note(f"{task_name}, {checkpoint.size_mb:.1f} MiB, revision {checkpoint.info.revision[:19]}")

    ui.stage("Dataset")
    task = TASKS[task_name](checkpoint.config)
    data = load_task_data(checkpoint, recipe, task=task, recipes=recipes, token=token)
    info = data.info
    ui.note(f"{info.id}{'/' + info.subset if info.subset else ''}: {info.examples} examples of {info.split!r}")
    ui.note(f"text: {', '.join(info.text_columns)}; label: {info.label_column}, {info.label_alignment}")
    for warning in data.warnings:
        ui.warn(warning)

    def batches(examples: Examples | None) -> list[Batch]:
        return list(examples.batches(data.tokenizer, recipe.batch_size)) if examples else []

    return Session(
        recipe,
        checkpoint,
        task_name,
        data,
        load_model(checkpoint, task.auto_class, trust_remote_code=recipe.trust_remote_code),
        batches(data.calibration),
        batches(data.evaluation),
        batches(data.holdout),
    )


def load_model(checkpoint: Checkpoint, auto_class: str, *, trust_remote_code: bool) -> nn.Module:
    """A float checkpoint in float32, an int8 one with int8 kernels.

    Raises:
        SourceError: its files are not what its config says.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        with bounded(checkpoint):
            model, info = getattr(transformers, auto_class).from_pretrained(
                checkpoint.path,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, all in one message
            )
    except HfqError:
        raise
    except Exception as error:  # transformers raises many types for one cause: these files are not that model
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SourceError(f"transformers cannot load {checkpoint.info.id} as {auto_class}: {message}") from error
    if misfits := sorted(info["mismatched_keys"]):
        shapes = [f"{name} is {list(there)} and not {list(expected)}" for name, there, expected in misfits]
        raise SourceError(
            f"The weights of {checkpoint.info.id} do not fit its config.json: {_few(shapes)}. "
            "Take both files from the same checkpoint."
        )
    if missing := sorted(info["missing_keys"]):
        raise SourceError(
            f"{checkpoint.info.id} lacks weights that {auto_class} needs, which would be random: {_few(missing)}. "
            "Expected a checkpoint that was fine-tuned for this task."
        )
    return model.eval().requires_grad_(False)


def _few(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
