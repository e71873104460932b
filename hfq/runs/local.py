"""Running recipes: here, one after the other. `hfq.runs.ray_engine` runs them on a cluster, behind the same interface.

An engine runs; publishing what comes of it is the same for all, in this process.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..common.errors import HfqError
from ..common.ui import Reporter
from ..measure.forks import FORKS, fork_server
from ..recipe import Recipe
from ..report.report import Result
from ..report.tables import show_result
from .recipe_folder import Outcome, outcome_of

Ended = tuple["Run", Result | Exception]
Engine = Callable[[Sequence["Run"]], Generator[Ended, None, None]]


@dataclass(frozen=True)
class Run:
    """A recipe that is to be run. `name`: of its file. `command`: repeats it. `ui`: hears how it goes."""

    name: str
    recipe: Recipe
    command: str
    ui: Reporter = field(default_factory=Reporter)  # of its own: a report holds the warnings of its run


def run_here(runs: Sequence[Run], *, recipes: Path, token: str | None, resume: bool) -> Generator[Ended, None, None]:
    """Run each in this process, up to its result or what it failed with. Nothing is published.

    Args:
        recipes: folder searched for a checkpoint's recipe when one names no dataset.
        token: None for the one `hf auth login` or `HF_TOKEN` left.
        resume: go on with runs that were interrupted or missed their goal; no trial is repeated.
    """
    if FORKS:
        fork_server()  # it imports on the other core, while this process does
    import torch

    from ..pipeline import Execution, quantize

    threads = torch.get_num_threads()
    for run in runs:
        if len(runs) > 1:
            run.ui.stage(f"Recipe {run.name}")
        torch.set_num_threads(threads)  # a recipe's own number is not the next one's
        found: Result | Exception
        try:
            execution = Execution(run.command, resume=resume)
            found = quantize(run.recipe, recipes=recipes, ui=run.ui, token=token, execution=execution)
        except Exception as error:
            found = error
        yield run, found


def run_all(
    recipes: Mapping[Path, Recipe | HfqError],
    engine: Engine,
    *,
    publish: Callable[[Result, Recipe, Reporter], str | None],
    prefixed: bool,
) -> Generator[Outcome, None, None]:
    """Run and publish each recipe, and yield what became of it. One that fails does not stop the others.

    Args:
        recipes: by file, or why it cannot be run.
        publish: does so if it is to be done, and returns what to say of it.
        prefixed: begin each line with the recipe's name, as several run at once.
    """

    def reporter(path: Path) -> Reporter:
        return Reporter(prefix=f"{path.name} │ " if prefixed else "")

    for path, recipe in recipes.items():
        if isinstance(recipe, HfqError):
            ui = reporter(path)
            ui.stage(f"Recipe {path.name}")
            yield _told(outcome_of(recipe, path.name), ui)
    runs = [
        Run(path.name, recipe, f"hfq run {path.name}{' --push' if recipe.push else ''}", reporter(path))
        for path, recipe in recipes.items()
        if isinstance(recipe, Recipe)
    ]
    if not runs:
        return
    with closing(engine(runs)) as ended:
        for run, found in ended:
            try:
                if isinstance(found, Exception):
                    raise found
                run.ui.stage(f"Done: {found.folder}")
                show_result(found.report, run.ui.console)
                published = publish(found, run.recipe, run.ui)
            except Exception as error:  # whatever a library raises about one recipe, the others have their turn
                yield _told(outcome_of(error, run.name), run.ui)
            else:
                state: Literal["published", "done"] = "published" if published else "done"
                yield Outcome(run.name, state, published or f"Done: {found.folder}")


def _told(outcome: Outcome, ui: Reporter) -> Outcome:
    ui.warn(outcome.message)
    return outcome
