"""The committed cards are what the template makes of the committed reports."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat
from support.command import ROOT, forkserver

from hfq.report.report import Report

CARDS = ROOT / "model_cards"
NAMES = sorted(path.stem for path in CARDS.glob("*.json"))


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cards, made by the command from nothing but the reports."""
    folder = tmp_path_factory.mktemp("cards")
    for name in NAMES:
        shutil.copy(CARDS / f"{name}.json", folder)
    subprocess.run(
        [forkserver().programs / "python", "-m", "hfq.report.cards", "--folder", folder],
        check=True,
    )
    return folder


def test_every_card_has_its_report() -> None:
    assert sorted(path.stem for path in CARDS.glob("*.md") if path.name != "README.md") == NAMES
    assert "demo" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_what_its_report_says(name: str, again: Path) -> None:
    committed = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert committed == (again / f"{name}.md").read_text(encoding="utf-8"), "run python -m hfq.report.cards"


@pytest.mark.parametrize("name", NAMES)
def test_its_plots_are_there_and_show_the_same(name: str, again: Path) -> None:
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (CARDS / f"{name}.md").read_text(encoding="utf-8"))
    assert shown == [f"{name}/accuracy_speed.png", f"{name}/layer_sensitivity.png"]
    for path in shown:
        assert (CARDS / path).stat().st_size < 60_000
        committed, drawn = (Image.open(folder / path).convert("L") for folder in (CARDS, again))
        assert committed.size == drawn.size
        # Another matplotlib moves letters by a pixel; other figures change more.
        assert ImageStat.Stat(ImageChops.difference(committed, drawn)).mean[0] < 6


@pytest.mark.parametrize("name", NAMES)
def test_a_report_says_nothing_about_the_machine_it_was_made_on(name: str) -> None:
    text = (CARDS / f"{name}.json").read_text(encoding="utf-8")
    assert not re.search(r'"/|\s/(work|tmp|home|root)/|hf_', text)
    assert Report.from_json(text).met
