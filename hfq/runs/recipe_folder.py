"""What the commands that take many recipes share: which ones there are, and what became of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from ..common.errors import GoalNotMetError, HfqError, UsageError
from ..common.redact import redact
from ..publish import resolve_repo_id
from ..recipe import Recipe, read_recipe

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe. `exit_code` is what `hfq run` would have ended with."""

    recipe: str
    state: Literal["published", "current", "done", "missed", "failed"]
    message: str
    exit_code: int = 0


def recipe_files(folder: Path) -> list[Path]:
    """The recipes in a folder, by name; or the one that was named itself.

    Raises:
        UsageError: there is none.
    """
    if folder.is_file():
        return [folder]
    found = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES and path.is_file())
    if not found:
        what = "holds no recipe" if folder.is_dir() else "does not exist"
        raise UsageError(f"{folder} {what}. Expected a folder with YAML files such as pipelines/demo.yaml.")
    return found


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if all is published; 3 if only goals were missed; else the gravest of the others' codes."""
    return min((outcome.exit_code for outcome in outcomes if outcome.exit_code), default=0)


def read_recipes(
    given: Sequence[Path], *, push: bool, publish_all: bool, token: str | None
) -> dict[Path, Recipe | HfqError]:
    """Every recipe of these files and folders, or why it cannot be run. `to` is filled in where one is published.

    Args:
        push: publish each of them, whatever it says itself.
        publish_all: the same, on another Hub than the recipes mean.
        token: None for the one `hf auth login` or `HF_TOKEN` left.

    Raises:
        UsageError: there is no recipe.
        HubError: some are to be published, and the token is not one to do that with.
    """
    found: dict[Path, Recipe | HfqError] = {}
    owner = cache(lambda: resolve_repo_id(None, default_name="any", token=token).partition("/")[0])
    for path in dict.fromkeys(path for one in given for path in recipe_files(one)):
        try:
            recipe = read_recipe(path)
            if recipe.push or push or publish_all:
                owner()  # a bad token costs seconds now, minutes later
                recipe = recipe.model_copy(update={"push": recipe.push or push, "to": repository_of(recipe, owner)})
            found[path] = recipe
        except UsageError as error:
            found[path] = error
    recipes = {path: one for path, one in found.items() if isinstance(one, Recipe)}
    return found | clashes(recipes, to={path: str(one.to) for path, one in recipes.items() if one.push or publish_all})


def repository_of(recipe: Recipe, owner: Callable[[], str]) -> str:
    """`owner/name` that a recipe's result is published as. `owner`: whose token it is, asked only where that counts.

    Raises:
        UsageError: that is no possible name.
    """
    name = recipe.to or f"{recipe.name}-int8"
    return resolve_repo_id(name if "/" in name else f"{owner()}/{name}", default_name=name, token=None)


def outcome_of(error: Exception, name: str) -> Outcome:
    """What became of a recipe that ended with `error`, without a token in it."""
    if isinstance(error, HfqError):
        state: Literal["missed", "failed"] = "missed" if isinstance(error, GoalNotMetError) else "failed"
        return Outcome(name, state, redact(str(error)), error.exit_code)
    return Outcome(name, "failed", redact(f"{type(error).__name__}: {error}"), HfqError.exit_code)


def clashes(recipes: Mapping[Path, Recipe], *, to: Mapping[Path, str]) -> dict[Path, HfqError]:
    """Recipes that would replace each other's results. `to`: the repositories of those that are published.

    Each may have a branch of its own in one repository.
    """
    found: dict[Path, HfqError] = {}
    places: dict[str, Mapping[Path, object]] = {
        "to": {path: _place(target.casefold(), recipes[path].branch) for path, target in to.items()},
        "output": {path: recipe.output_folder.resolve() for path, recipe in recipes.items()},
    }
    for key, place in places.items():
        for path, where in place.items():
            others = [other.name for other in place if other != path and place[other] == where]
            if others:
                found[path] = UsageError(
                    f"{path.name} has the same {key!r} as {' and '.join(others)} ({where}): each would replace "
                    f"what the other made. Give each its own {key!r}."
                )
    return found


def _place(repository: str, branch: str | None) -> str:
    return repository if branch in (None, "main") else f"{repository}, branch {branch}"
