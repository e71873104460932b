"""The tree: stages stand in the order in which data flows, and the gate's contract holds it."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.command import ROOT

LINT = Path(sys.executable).with_name("lint-imports")
MOST = 14  # modules in one folder


def test_no_folder_holds_more_modules_than_one_can_keep_in_mind() -> None:
    modules = (path for tree in ("hfq", "tests") for path in (ROOT / tree).rglob("*.py"))
    found = Counter(path.parent for path in modules if path.name != "__init__.py")
    assert {str(folder): count for folder, count in found.items() if count > MOST} == {}


@pytest.mark.skipif(not LINT.exists(), reason="import-linter is not installed beside this Python")
def test_an_import_of_a_later_stage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hfq").symlink_to(ROOT / "hfq")
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    done = subprocess.run([LINT, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (tmp_path / "hfq").unlink()
    for path in (ROOT / "hfq").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    late = tmp_path / "hfq" / "source" / "trust.py"
    late.write_text(late.read_text() + "\nfrom ..report import card  # noqa\n")
    done = subprocess.run([LINT, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "hfq.source is not allowed to import hfq.report" in done.stdout
