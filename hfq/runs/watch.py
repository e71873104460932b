"""`hfq watch`: publish what is new on the sources of a folder of recipes, once or again and again.

What is published already is asked of the Hub each time: nothing is kept here that could be lost or go stale.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..common.errors import GoalNotMetError, HfqError, SourceError, UsageError
from ..common.files import write_text
from ..common.names import is_path
from ..common.redact import redact, remember
from ..common.ui import Reporter
from ..common.version import __version__
from ..publish import COMMIT_TITLE, published_revisions, push_folder, resolve_repo_id
from ..recipe import Recipe, read_recipe
from ..report.report import read_report
from ..source.checkpoint import head_revision
from .recipe_folder import Outcome, clashes, outcome_of, recipe_files, repository_of


@dataclass(frozen=True)
class Watched:
    """A recipe of the folder, and the repository that its result belongs in."""

    path: Path
    recipe: Recipe
    target: str


class Missed:
    """Goals that were missed, so that nobody tries again what cannot succeed; in a file if they are to outlive us.

    A recipe that was changed, or a new revision of its source, is another try.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._messages: dict[str, str] = {}
        if file is not None and file.is_file():
            try:
                self._messages = dict(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise UsageError(f"{file} cannot be read as JSON: {error}. Remove it to start without it.") from error

    def message(self, recipe: Recipe, revision: str) -> str | None:
        """What was said when this goal was missed; None if it was not."""
        return self._messages.get(_digest(recipe, revision))

    def add(self, recipe: Recipe, revision: str, message: str) -> None:
        """Remember one."""
        self._messages[_digest(recipe, revision)] = redact(message)
        if self._file is not None:
            write_text(self._file, json.dumps(self._messages, indent=2, ensure_ascii=False) + "\n")


class Watcher:
    """Brings the published models of a folder of recipes up to date with their sources.

    Args:
        folder: of recipes, or one recipe.
        recipes: folder searched for a checkpoint's recipe when one names no dataset.
        token: None for the one `hf auth login` or `HF_TOKEN` left.
        missed: goals not to try again.

    Raises:
        UsageError: there is no recipe.
    """

    def __init__(self, folder: Path, *, recipes: Path, token: str | None = None, missed: Missed | None = None) -> None:
        self.folder = folder
        self._recipes = recipes
        self._token = token
        remember(token)
        self._missed = missed or Missed()
        self._complete: set[str] = set()  # exports that are whole here, and that the Hub did not take yet
        recipe_files(folder)

    def round(self) -> list[Outcome]:
        """Look at every recipe once. One that fails does not stop the others."""
        watched = self._watched()
        return [self._outcome(path, found) for path, found in watched.items()]

    def update(self, name: str) -> Outcome:
        """Look at one recipe of the folder, by its file name."""
        for path, watched in self._watched().items():
            if path.name == name:
                return self._outcome(path, watched)
        return self._outcome(
            Path(name), UsageError(f"{name} is not in {self.folder} any more: nothing is done for it.")
        )

    def _outcome(self, path: Path, watched: Watched | HfqError) -> Outcome:
        ui = Reporter()  # of its own: a report holds the warnings of its run
        ui.stage(f"Recipe {path.name}")
        try:
            if isinstance(watched, HfqError):
                raise watched
            outcome = self._bring_up_to_date(watched, ui)
        except Exception as error:  # whatever a library raises about one recipe, the others have their turn
            outcome = outcome_of(error, path.name)
        (ui.warn if outcome.exit_code else ui.note)(outcome.message)
        return outcome

    def _bring_up_to_date(self, watched: Watched, ui: Reporter) -> Outcome:
        recipe = watched.recipe
        revision = head_revision(
            recipe.checkpoint,
            revision=recipe.revision,
            token=self._token,
            trust_remote_code=recipe.trust_remote_code,
        )
        source = f"{recipe.checkpoint} at {revision[:19]}"
        current = Outcome(watched.path.name, "current", f"{watched.target} holds {source}: nothing to do")
        if self._is_published(watched, revision):
            return current
        if message := self._missed.message(recipe, revision):
            raise GoalNotMetError(
                f"Not tried again: {source} missed the goal before, and neither it nor the recipe has changed. {message}",
                details={},
            )
        try:
            folder = self._quantized(watched, revision, ui)
        except GoalNotMetError as error:
            self._missed.add(recipe, revision, str(error))
            raise
        ui.stage("Publish")
        if self._is_published(watched, revision):  # by another hfq, while this one was at work
            return current
        pushed = push_folder(
            folder,
            repo_id=watched.target,
            default_name=watched.target,
            token=self._token,
            message=f"{COMMIT_TITLE} {__version__}",
            options=recipe.push_options,
        )
        ui.left_behind(pushed.left, where="published")
        self._complete.discard(_digest(recipe, revision))
        return Outcome(watched.path.name, "published", f"{pushed.url} holds {source}: commit {pushed.commit}")

    def _is_published(self, watched: Watched, revision: str) -> bool:
        return revision in published_revisions(watched.target, watched.recipe.push_options, token=self._token)

    def _quantized(self, watched: Watched, revision: str, ui: Reporter) -> Path:
        """The folder with the export of that revision, made now unless only its push had failed."""
        recipe = watched.recipe
        key = _digest(recipe, revision)
        if key in self._complete and _holds(recipe.output_folder, revision):
            return recipe.output_folder
        resolve_repo_id(None, default_name="any", token=self._token)  # a bad token costs a second now, or a whole run
        import torch  # most rounds need neither it nor the pipeline

        from ..pipeline import Execution, quantize

        pinned = {} if is_path(recipe.checkpoint) else {"revision": revision}
        threads = torch.get_num_threads()
        try:
            result = quantize(
                recipe.model_copy(update={"to": watched.target, **pinned}),
                recipes=self._recipes,
                ui=ui,
                token=self._token,
                execution=Execution(f"hfq run {watched.path.name} --push", resume=True),
            )
        finally:
            torch.set_num_threads(threads)  # a recipe's own number is not the next one's
        self._complete.add(key)
        return result.folder

    def _watched(self) -> dict[Path, Watched | HfqError]:
        """Every recipe of the folder, or why it cannot be run."""
        found: dict[Path, Watched | HfqError] = {}
        for path in recipe_files(self.folder):
            try:
                recipe = read_recipe(path)
                if recipe.tag:
                    raise UsageError(
                        f"Recipe {path} has the tag {recipe.tag!r}, which can name one commit only. Leave it out where "
                        "every new revision is published."
                    )
                found[path] = Watched(path, recipe, repository_of(recipe, lambda: self._owner))
            except HfqError as error:
                found[path] = error
        running = {path: one for path, one in found.items() if isinstance(one, Watched)}
        return found | clashes(
            {path: one.recipe for path, one in running.items()}, to={path: one.target for path, one in running.items()}
        )

    @cached_property
    def _owner(self) -> str:
        """Whose token it is: asked once, as the Hub answers that question only so often."""
        return resolve_repo_id(None, default_name="any", token=self._token).partition("/")[0]


def _holds(folder: Path, revision: str) -> bool:
    """Whether that is an export of that revision."""
    try:
        report = read_report(folder)
    except SourceError:
        return False
    return not report.of_object and report.checkpoint.revision == revision


def _digest(recipe: Recipe, revision: str) -> str:
    return hashlib.sha256(f"{recipe.model_dump_json()}\n{revision}".encode()).hexdigest()
