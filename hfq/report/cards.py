"""The cards in model_cards/, from the reports that are kept beside them: `python -m hfq.report.cards [OUT …]`.

Each NAME.json is the hfq.json of a run; NAME.md and the plots in NAME/ are made from it, and again when a template
changes. OUT is the folder of a run whose report is to be kept from now on, as OUT's name without `-int8`.
"""

import argparse
import shutil
from pathlib import Path

from ..common.files import write_text
from ..common.names import REPORT_FILE
from ..common.resources import resource
from . import plots
from .card import render_card
from .report import Report


def main() -> None:
    """Keep the reports on the command line, then write every card."""
    parser = argparse.ArgumentParser(prog="python -m hfq.report.cards", description=__doc__)
    parser.add_argument("out", type=Path, nargs="*", help="folder of a finished run")
    parser.add_argument("--folder", type=Path, default=resource("model_cards"), help="where the cards are")
    given = parser.parse_args()
    for out in given.out:
        shutil.copyfile(out / REPORT_FILE, given.folder / f"{out.resolve().name.removesuffix('-int8')}.json")
    for kept in sorted(given.folder.glob("*.json")):
        print(write_card(kept))


def write_card(kept: Path) -> Path:
    """Write the card and the plots of a kept report. Returns the card's path."""
    report = Report.from_json(kept.read_text(encoding="utf-8"))
    drawn = plots.write(report, kept.parent, under=kept.stem)
    card = kept.with_suffix(".md")
    write_text(card, render_card(report, repo_id=None, plots=drawn))
    return card


if __name__ == "__main__":
    main()
