"""The folder a run writes: whole under its name or not there at all, with a work folder beside it meanwhile.

Needs no torch: with `hfq run --engine ray` it is filled by a process that may have none.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .common.errors import ExportError, GoalNotMetError, SourceError, UsageError
from .common.names import CARD_FILE, EXPORT, PLOTS, REPORT_FILE, TRIALS_FILE
from .hub.repository import OURS
from .report.report import Report, read_report
from .source.contents import left_behind, list_names, read_contents

_WRITTEN = ("config.json", REPORT_FILE, CARD_FILE)  # and weights and plots, as `OURS` has them


def check_output(output: Path) -> None:
    """Refuse what a run cannot write to, before it begins.

    Raises:
        UsageError: that is no possible name, or something that hfq did not write has it.
    """
    if output.name in ("", ".."):
        raise UsageError(f"--output {output} is no name for a new folder. Choose another.")
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT_FILE).is_file():
        raise UsageError(f"{output} exists and was not written by hfq. Choose another --output, or remove it.")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file. Choose another --output.")


def work_of(output: Path) -> Path:
    """The work folder of an output folder, beside it, so that the last step is a rename."""
    return output.with_name(f"{output.name}.hfq-work")


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """The work folder, for one run at a time.

    A run that fails takes it away again. It stays if it was there before, or if the run was interrupted or missed
    its goal after trials had begun: `--resume` reads its trial log.
    """
    work = work_of(output)
    created = [folder for folder in (work, *work.parents) if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"Another hfq is writing {output}. Wait for it, or choose another --output.") from error
    except OSError as error:
        _remove(created)
        raise ExportError(f"{output} cannot be written: {error.strerror}. Choose another --output.") from error
    try:
        yield work
    except BaseException as error:
        shutil.rmtree(work / EXPORT, ignore_errors=True)
        resumable = isinstance(error, GoalNotMetError) or not isinstance(error, Exception)
        if not (resumable and (work / TRIALS_FILE).exists()):
            _remove(created)
        raise
    finally:
        lock.release()


def finish(output: Path, work: Path) -> None:
    """Give the finished folder in `work` its name; an earlier export under that name is removed only afterwards.

    What somebody else had put there stays there.

    Raises:
        ExportError: it cannot have that name.
    """
    finished, earlier = work / EXPORT, work / "earlier"
    try:
        if output.exists():
            output.rename(earlier)
            _keep_foreign(earlier, finished)
        finished.rename(output)
    except OSError as error:
        if earlier.exists() and not output.exists():
            earlier.rename(output)
        raise ExportError(f"{output} cannot be written: {error.strerror}.") from error
    shutil.rmtree(work)


def split_export(folder: Path, report: Report) -> tuple[list[str], list[str]]:
    """The files of an exported folder that hfq wrote or that belong to a checkpoint, and the names of the others.

    Raises:
        SourceError: its modules.json is damaged, or names a folder elsewhere.
    """
    of = None if report.of_object else report.checkpoint
    contents = read_contents(
        folder, code=of is not None and of.remote_code, license_link=of and of.terms.get("license_link")
    )
    names = list_names(folder, contents, also=[PLOTS])
    ours = [name for name in names if name in contents or name in _WRITTEN or OURS.fullmatch(name)]
    return ours, left_behind(names, ours)


def _keep_foreign(earlier: Path, finished: Path) -> None:
    """Move what hfq did not write from the earlier export into the finished one."""
    try:
        _, foreign = split_export(earlier, read_report(earlier))
    except SourceError:  # of another version of hfq, or damaged
        return
    for name in foreign:
        if not (finished / name).exists():
            (finished / name).parent.mkdir(parents=True, exist_ok=True)
            (earlier / name).rename(finished / name)


def _remove(created: Sequence[Path]) -> None:
    """Take away a new folder and those that were made to hold it, deepest first, unless they hold something else."""
    for folder in created[:1]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in created[1:]:
        with suppress(OSError):
            folder.rmdir()
