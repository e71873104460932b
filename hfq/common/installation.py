"""How to install hfq: from its repository, whose address stands in pyproject.toml. Said in one place, for all who say it."""

import re
from importlib.metadata import PackageNotFoundError, metadata

from .resources import resource

_URL = re.compile(r'^Repository = "([^"]+)"$', re.MULTILINE)


def installation(extra: str | None = None) -> str:
    """The command, with an optional extra such as `ray`."""
    name = f"hfq[{extra}]" if extra else "hfq"
    return f"pip install '{name} @ git+{repository()}'"


def repository() -> str:
    """The address of hfq's repository.

    Raises:
        HfqError: this installation has neither metadata nor pyproject.toml.
    """
    try:
        urls = metadata("hfq").get_all("Project-URL") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        urls = []
    for label, _, url in (entry.partition(", ") for entry in urls):
        if label == "Repository":
            return url
    found = _URL.search(resource("pyproject.toml").read_text(encoding="utf-8"))
    assert found  # pyproject.toml is written here
    return found[1]
