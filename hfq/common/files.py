"""Writing a file whole or not at all."""

import os
from pathlib import Path

from .errors import UsageError


def write_text(path: Path, text: str) -> None:
    """Write as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write, fsync, and only then give the file its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def user_path(text: str | Path) -> Path:
    """The path with the home folder for a leading `~`, which shells leave as it is in `--output=~/x`, as files do.

    Raises:
        UsageError: it is the home folder of nobody who is known here.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"The home folder in {text} is not known on this machine. Write the path out.") from error
