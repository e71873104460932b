"""Where compiled graphs are kept, and whose are loaded: a graph is machine code, and loading one runs it."""

import json
import os
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from ...common.errors import UsageError
from ...common.files import write_text

MADE_WITH = "made-with.json"
Setting = Literal["kept", "off", "background"]


def compile_setting() -> Setting:
    """`HFQ_COMPILE`: whether models run what was compiled for them before, and have compiled what was not, unasked.

    Raises:
        UsageError: it says something else.
    """
    setting: Any = os.environ.get("HFQ_COMPILE") or "kept"
    if setting not in get_args(Setting):
        raise UsageError(f"HFQ_COMPILE is {setting!r}; expected {', '.join(get_args(Setting))}.")
    found: Setting = setting
    return found


def cache_folder() -> Path:
    """Where compiled code is kept: the folder that the user named for inductor's, or one in the Hub client's cache."""
    from huggingface_hub import constants

    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named and "torch._inductor" in sys.modules:  # which writes its own default, a temporary folder, there
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        named = None if named == default_cache_dir() else named
    return Path(named or Path(constants.HF_HOME) / "hfq" / "compiled")


def brought_folder() -> Path | None:
    """Graphs that were exported on another machine: `HFQ_GRAPHS`."""
    named = os.environ.get("HFQ_GRAPHS")
    return Path(named).expanduser() if named else None


def folders() -> list[Path]:
    """Where graphs may be: the cache, in which new ones are put, first."""
    brought = brought_folder()
    return [cache_folder(), *([brought] if brought else [])]


def are_all_empty() -> bool:
    """Whether no graph of any model is there, and none should be: that is known sooner than that there is none of one."""
    return brought_folder() is None and not any(
        entry.is_dir() for folder in folders() if folder.is_dir() for entry in os.scandir(folder)
    )


@contextmanager
def trusted(folder: Path, *names: str) -> Iterator[Path]:
    """The way to `folder` as it is now, if this user or root made it, with all of `names` in it, and nobody else can write there.

    Raises:
        OSError: it cannot be opened; PermissionError: others may have written what is in it.
    """
    if not hasattr(os, "getuid"):
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        here = Path(f"/proc/self/fd/{descriptor}")
        here = here if here.exists() else folder
        found = [os.fstat(descriptor), *(os.lstat(here / name) for name in names)]
        for status in found:
            links = stat.S_ISLNK(status.st_mode)
            if links or status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(
                    f"{folder} may have been written by others. Make it your own: chown -R, and chmod -R go-w."
                )
        yield here
    finally:
        os.close(descriptor)


def export(graphs: Iterable[Path], folder: Path, *, made_with: Mapping[str, Any]) -> None:
    """Copy `graphs`, folders of models in the cache, to where `HFQ_GRAPHS` is to point, for other users to read.

    Raises:
        UsageError: `folder` holds graphs that were made with something else, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = folder / MADE_WITH
        if facts.exists() and json.loads(facts.read_text(encoding="utf-8")) != dict(made_with):
            raise UsageError(f"{folder} holds graphs of other versions or another CPU. Choose another folder.")
        for graph in graphs:
            with tempfile.TemporaryDirectory(prefix=".", dir=folder) as unfinished:
                copy = Path(unfinished) / graph.name
                shutil.copytree(graph, copy, ignore=shutil.ignore_patterns(".*"))
                for path in (copy, *copy.rglob("*")):
                    path.chmod(0o755 if path.is_dir() else 0o644)
                shutil.rmtree(folder / graph.name, ignore_errors=True)
                copy.rename(folder / graph.name)
        write_text(facts, json.dumps(dict(made_with)))
    except (OSError, ValueError) as error:
        raise UsageError(f"Graphs cannot be written to {folder}: {error}") from error


def say_what_differs(name: str, made_with: Mapping[str, Any]) -> None:
    """Tell the user why nothing in `HFQ_GRAPHS` fits a model of the class `name` on this machine."""
    brought = brought_folder()
    if brought is None:
        return
    try:
        there = json.loads((brought / MADE_WITH).read_text(encoding="utf-8"))
        different = [what for what, here in made_with.items() if there.get(what) != here]
        why = "none of them is of this model"
        if different:
            why = "they were made with another " + " and another ".join(
                f"{what} ({there.get(what)}, here {made_with[what]})" if len(str(made_with[what])) < 50 else what
                for what in different
            )
    except (OSError, ValueError, AttributeError) as error:
        why = f"it holds no graphs that `hfq warm --export` wrote ({error})"
    warnings.warn(f"HFQ_GRAPHS={brought} has no graph for {name}: {why}. It runs uncompiled.", stacklevel=2)
