"""Which dataset a checkpoint is tuned and measured on, where nobody says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common.errors import WrongDataError
from ..recipe import Recipe, read_recipe
from ..source.checkpoint import Checkpoint


@dataclass(frozen=True)
class DatasetReference:
    """A dataset before it is loaded."""

    id: str
    subset: str | None = None
    split: str | None = None


def find_dataset(checkpoint: Checkpoint, recipe: Recipe, *, recipes: Path) -> DatasetReference:
    """The dataset that was asked for, else the one the card names, else the one of this checkpoint's recipe.

    Raises:
        WrongDataError: none is found; the message lists what was looked at.
    """
    if recipe.dataset:
        return DatasetReference(recipe.dataset, recipe.subset)
    found = (
        _from_model_index(checkpoint.card)
        or _from_datasets(checkpoint.card)
        or _from_recipes(recipe.checkpoint, recipes)
    )
    if found is None:
        raise WrongDataError(
            f"No dataset is known for {recipe.checkpoint}. Looked at: the card's model-index (no result with a dataset "
            f"type), the card's datasets ({checkpoint.card.get('datasets') or 'none'}), recipes in {recipes} (none names "
            "this checkpoint). Pass --dataset."
        )
    return replace(found, subset=recipe.subset) if recipe.subset else found


def _from_model_index(card: Mapping[str, Any]) -> DatasetReference | None:
    for model in card.get("model-index") or []:
        for result in (model or {}).get("results") or []:
            dataset = (result or {}).get("dataset") or {}
            if isinstance(dataset.get("type"), str) and dataset["type"] != "local":  # what our cards call a folder
                subset = dataset.get("config") or dataset.get("args")
                return DatasetReference(
                    dataset["type"], subset if isinstance(subset, str) else None, dataset.get("split")
                )
    return None


def _from_datasets(card: Mapping[str, Any]) -> DatasetReference | None:
    names = card.get("datasets") or []
    names = [names] if isinstance(names, str) else names
    named = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
    return DatasetReference(names[0]) if named else None


def _from_recipes(checkpoint: str, recipes: Path) -> DatasetReference | None:
    for path in sorted(recipes.glob("*.yaml")):
        recipe = read_recipe(path)
        if recipe.checkpoint == checkpoint and recipe.dataset:
            return DatasetReference(recipe.dataset, recipe.subset, recipe.split)
    return None
