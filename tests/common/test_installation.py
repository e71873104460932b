"""How to install hfq is said alike everywhere, from the address in pyproject.toml."""

import re

import pytest
from support.command import ROOT
from support.factories import make_fit_report, make_report

from hfq.common.installation import installation, repository
from hfq.report.card import render_card, render_fit_card

ANY = re.compile(r"pip install (?:-c constraints\.txt )?'?hfq[^\n#]*")


def test_the_address_is_the_one_of_the_project() -> None:
    assert f'Repository = "{repository()}"' in (ROOT / "pyproject.toml").read_text()
    assert installation("ray") == f"pip install 'hfq[ray] @ git+{repository()}'"


@pytest.mark.parametrize("text", [render_card(make_report(), repo_id=None), render_fit_card(make_fit_report())])
def test_a_card_says_how(text: str) -> None:
    assert [found.strip() for found in ANY.findall(text)] == [installation()]


def test_the_readme_says_how() -> None:
    assert [found.strip() for found in ANY.findall((ROOT / "README.md").read_text())] == [installation()]
