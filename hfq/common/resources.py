"""Finds the data files that hfq ships: recipes and the card template."""

from pathlib import Path

from .errors import HfqError


def resource(name: str) -> Path:
    """A shipped file or folder by its path from the repository's top, e.g. `model_cards/card.md.jinja`.

    A wheel holds it inside the package; a source checkout holds it beside the package.

    Raises:
        HfqError: it is in neither place.
    """
    package = Path(__file__).parent.parent
    for root in (package, package.parent):
        if (root / name).exists():
            return root / name
    raise HfqError(f"{name} is missing from this installation of hfq ({package}). Install hfq again.")
