"""Tasks: which columns a task reads, how an example becomes tensors, which class loads the model."""

from typing import Any

from ..errors import UnsupportedError
from .text_classification import TextClassification

TASKS = {"text-classification": TextClassification}


def find_task(config: dict[str, Any], requested: str | None) -> str:
    """The task of a checkpoint, by the architecture in its config.json (optimum's `TasksManager`).

    Raises:
        UnsupportedError: the architecture is unknown, has no task, or its task is not one hfq quantizes.
    """
    from optimum.exporters.tasks import TasksManager

    architectures = config.get("architectures") or []
    task = requested and TasksManager.map_from_synonym(requested)
    if task is None:
        architecture = find_architecture(config)
        if architecture is None:
            raise UnsupportedError(
                f"config.json names the architecture {architectures or None}, which transformers does not know. "
                "Pass --task if the checkpoint brings its own code."
            )
        try:
            task = TasksManager.infer_task_from_model(architecture)
        except ValueError as error:
            raise UnsupportedError(f"No task is known for the architecture {architectures[0]}. Pass --task.") from error
    if task not in TASKS:
        raise UnsupportedError(
            f"Task {task!r} ({', '.join(architectures)}) is not supported. Expected one of: {', '.join(TASKS)}. "
            "A model of another task may be quantized in Python: hfq.quantization.fit takes any torch.nn.Module."
        )
    return task


def find_architecture(config: dict[str, Any]) -> type | None:
    """The class that a config.json names, where it is one of transformers' models; a config may name anything."""
    import transformers

    names = config.get("architectures") or [""]
    found = getattr(transformers, names[0], None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None
