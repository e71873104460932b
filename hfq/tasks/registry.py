"""Which tasks there are, and which one a checkpoint is for.

A task is found by being a module of this folder, or of one in it: nothing lists them.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.errors import HfqError, UnsupportedError, UsageError
from ..recipe import flag
from .base import Task


@cache
def tasks() -> dict[str, type[Task]]:
    """Every task by name, those that are made of another one before it.

    Raises:
        HfqError: a file of this folder cannot be imported.
    """
    package = importlib.import_module(__package__)
    found = pkgutil.walk_packages(package.__path__, f"{__package__}.")
    modules = [_imported(module.name) for module in found if not module.ispkg]
    classes = [value for module in modules for value in vars(module).values() if _is_task(value, module.__name__)]
    return {task.name: task for task in sorted(classes, key=lambda task: (-len(task.__mro__), task.name))}


def describe_tasks() -> list[dict[str, Any]]:
    """What a user chooses from: each task's name, the Hub's, its columns by role, and its metrics, the default first.

    All of them have `fidelity` too, which needs no labels.
    """
    return [
        {
            "name": name,
            "pipeline_tag": task.pipeline_tag,
            "other_tags": list(task.other_tags),
            "columns": dict(task.roles),
            "metrics": _metrics(task),
        }
        for name, task in sorted(tasks().items())
    ]


def make_task(
    config: Mapping[str, Any],
    *,
    name: str | None = None,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Task:
    """The task of a checkpoint with this config.json: the one called `name`, else by its files and its architecture.

    Args:
        name: of a task here, or the Hub's, which several share.
        folder: where the checkpoint is. Without it the task knows no more of it than its config.
        settings: of a recipe, those that only some tasks read.

    Raises:
        UnsupportedError: the architecture is unknown, or is for no task that hfq measures.
        UsageError: a setting is for other tasks, or does not fit the checkpoint.
        SourceError: a file that the task reads is damaged.
    """
    task = find_task(config, name=name, folder=folder)(config)
    task.given = {key: value for key, value in (settings or {}).items() if value is not None}
    for key in task.given:
        if key not in task.settings:
            takes = [name for name, other in tasks().items() if key in other.settings]
            raise UsageError(f"{flag(key)} is nothing that {task.name} reads, but {', '.join(takes)}. Leave it out.")
    return task.bound(folder) if folder else task


def find_task(config: Mapping[str, Any], *, name: str | None = None, folder: Path | None = None) -> type[Task]:
    """The class of that task.

    Raises:
        UnsupportedError: as `make_task`.
    """
    named = _called(name) if name else list(tasks().values())
    for task in named:
        if folder and task.claims(folder, config):
            return task
    architectures = config.get("architectures") or []
    if name is None and find_architecture(config) is None:
        raise UnsupportedError(
            f"config.json names the architecture {architectures or None}, which transformers does not know. "
            f"Pass --task if the checkpoint brings its own code: {', '.join(tasks())}."
        )
    _check_model_type(config)
    loading = [task for task in named if _loads(task.auto_class, architectures)]
    for task in loading or (named if name else []):  # a checkpoint's own code may bring any architecture
        if task.fits(config):
            return task
    if name in tasks():
        return tasks()[name]
    if name:
        return named[-1]  # that the others derive from
    raise UnsupportedError(
        f"The architecture {', '.join(map(str, architectures))} is for none of the tasks that hfq measures: "
        f"{', '.join(tasks())}. Pass --task if it is one of them; `hfq.quantization.fit` takes any model, with a score of your own."
    )


def _check_model_type(config: Mapping[str, Any]) -> None:
    from transformers import CONFIG_MAPPING, __version__

    kind = config.get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING and not config.get("auto_map"):
        raise UnsupportedError(
            f"config.json says model_type {kind!r}, which transformers {__version__} does not know. Upgrade transformers if "
            "the model is newer; else correct config.json."
        )


def find_architecture(config: Mapping[str, Any]) -> type | None:
    """The class that a config.json names, where it is one of transformers' models; a config may name anything."""
    import transformers

    names = config.get("architectures") or [""]
    found = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _imported(name: str) -> ModuleType:
    """A module of this folder.

    Raises:
        HfqError: it fails, with whatever its author's code raises.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise HfqError(
            f"The task file {name.replace('.', '/')}.py cannot be imported: {type(error).__name__}: {error}. Mend it, or "
            "take it out of the folder; HFQ_DEBUG=1 shows the line."
        ) from error


def _is_task(value: Any, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Task) and value.__module__ == module and "name" in vars(value)


def _called(name: str) -> list[type[Task]]:
    """Those with this name, here or on the Hub.

    Raises:
        UnsupportedError: there is none.
    """
    found = [task for task in tasks().values() if name in (task.name, task.pipeline_tag, *task.other_tags)]
    if name in tasks():  # others with its name on the Hub are other models
        found = [task for task in found if task.auto_class == tasks()[name].auto_class]
    if not found:
        near = _nearest(name)
        raise UnsupportedError(
            f"Task {name!r} is not one that hfq measures{f'; did you mean {near}?' if near else '.'} "
            f"Expected one of: {', '.join(tasks())}. `hfq.quantization.fit` takes any model, with a score of your own."
        )
    return found


def _nearest(name: str) -> str | None:
    """The task whose name is most like that one: here, on the Hub, or of transformers' class."""
    names: dict[str, str] = {}
    for task in tasks().values():
        for known in (
            task.name,
            task.pipeline_tag,
            *task.other_tags,
            task.auto_class.removeprefix("AutoModelFor").lower(),
        ):
            names.setdefault(known, task.name)
    near = get_close_matches(name.lower().replace("_", "-"), names, n=1, cutoff=0.5)
    return names[near[0]] if near else None


def _metrics(task: type[Task]) -> list[str]:
    """Their names for a config such as the task's checkpoints have; none if that is no such model."""
    try:
        return list(task(task.example).metrics)
    except (HfqError, LookupError, TypeError):
        return []


def _loads(auto_class: str, architectures: list[str]) -> bool:
    """Whether transformers' auto class has a model of these architectures."""
    import transformers

    names = getattr(transformers, auto_class)._model_mapping._model_mapping.values()
    every = {name for entry in names for name in ([entry] if isinstance(entry, str) else entry)}
    return any(architecture in every for architecture in architectures)
