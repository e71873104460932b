"""What a run tells a person while it works. Always on standard error, so that standard output stays data."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .redact import printable, redact

Item = TypeVar("Item")


@dataclass
class Reporter:
    """Stages, notes, warnings and progress bars. `warnings` collects what `warn` said, for the report.

    `prefix` begins each line: it says who speaks where several runs do at once. `verbose`: say names, not numbers only.
    """

    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True))
    warnings: list[str] = field(default_factory=list)
    prefix: str = ""
    verbose: bool = field(default_factory=lambda: bool(os.environ.get("HFQ_VERBOSE")))

    def stage(self, text: str) -> None:
        self._print(f"[bold cyan]▸[/] [bold]{_plain(text)}[/]")

    def note(self, text: str) -> None:
        self._print(f"  {_plain(text)}")

    def warn(self, text: str) -> None:
        self.warnings.append(redact(text))
        self._print(f"[bold yellow]! {_plain(text)}[/]")

    def left_behind(self, names: Sequence[str], *, where: str) -> None:
        """Say which files were not taken along, if there are any. `where`: they are not there."""
        if names:
            files = "1 file or folder" if len(names) == 1 else f"{len(names)} files and folders"
            named = ", ".join(names) if self.verbose else "-v names them"
            self.note(f"not {where}, as no loader needs them and they are no licence: {files} ({named})")

    def track(self, items: Iterable[Item], *, text: str, total: int | None = None) -> Iterator[Item]:
        """Iterate with a bar that goes away when it is done; no bar where nobody watches."""
        if not self.console.is_terminal or os.environ.get("HFQ_NO_PROGRESS"):
            yield from items
            return
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield from progress.track(items, total=total, description=text)

    def _print(self, text: str) -> None:
        self.console.print(f"{_plain(self.prefix)}{text}")


def _plain(text: str) -> str:
    return printable(text).replace("[", r"\[")
