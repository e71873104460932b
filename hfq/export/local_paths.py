"""Configs say which folder a model was trained or read in. Nobody else has it, and its name may be a person's."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common.files import write_text
from ..common.reading import read_json

_NAMES_FILE = re.compile(r".*(path|file|dir|folder)")
_ABSOLUTE = re.compile(r"([/~\\]|[A-Za-z]:[\\/]|file:).*")
_RELATIVE = re.compile(r"\.{1,2}([/\\].*)?")  # only where no file of the checkpoint can be meant


def without_local_paths(config: Any) -> Any:
    """A config without what names a file or folder of the machine that it comes from, such as `_name_or_path`."""
    if isinstance(config, list):
        return [without_local_paths(value) for value in config]
    if not isinstance(config, dict):
        return config
    return {key: without_local_paths(value) for key, value in config.items() if not _is_local(key, value)}


def copy_config(source: Path, to: Path) -> None:
    """Copy a file of a checkpoint: as it is, or, if it is a config that names such a file or folder, without that.

    Raises:
        OSError: it cannot be read or written.
    """
    config = None
    if source.name.endswith(("config.json", "map.json")):
        with suppress(ValueError):  # whoever reads it says what is wrong with it
            config = read_json(source)
    if (kept := without_local_paths(config)) != config:
        write_text(to, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    else:
        shutil.copyfile(source, to)


def _is_local(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or not isinstance(value, str) or not _NAMES_FILE.fullmatch(key):
        return False
    return bool(_ABSOLUTE.fullmatch(value) or (key.endswith("name_or_path") and _RELATIVE.fullmatch(value)))
