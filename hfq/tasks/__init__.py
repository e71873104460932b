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
    import transformers
    from optimum.exporters.tasks import TasksManager

    architectures = config.get("architectures") or []
    task = requested and TasksManager.map_from_synonym(requested)
    if task is None:
        architecture = getattr(transformers, str(architectures[0]), None) if architectures else None
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
            f"Task {task!r} ({', '.join(architectures)}) is not supported. Expected one of: {', '.join(TASKS)}."
        )
    return task
