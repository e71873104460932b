"""FP32's outputs are computed once for one content, and what others may have written is not read."""

import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from support.command import CHECKPOINT, DEMO

from hfq.common.ui import Reporter
from hfq.data.session import Session, open_session
from hfq.measure.kept_outputs import Outputs, keeping_outputs
from hfq.recipe import Recipe
from hfq.tasks.base import Batch


class Counted:
    """Outputs that count how often they are asked for."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Outputs:
        self.times += 1
        return [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], 1.5


@pytest.fixture(scope="module")
def session() -> Session:
    recipe = Recipe(checkpoint=str(CHECKPOINT), dataset=str(DEMO / "data"), calibration_samples=4)
    return open_session(recipe, recipes=DEMO, ui=Reporter(), token=None)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path


def batch(number: int) -> list[Batch]:
    return [{"input_ids": torch.tensor([[number, 2, 3]])}]


@pytest.mark.usefixtures("home")
def test_the_same_content_is_computed_once(session: Session) -> None:
    outputs = Counted()
    first, second = (keeping_outputs(session, batch(1), outputs) for _ in range(2))
    assert outputs.times == 1
    assert [row.tolist() for row in first[0]] == [row.tolist() for row in second[0]] == [[1.0, 2.0], [3.0]]
    assert second[1] == 1.5
    keeping_outputs(session, batch(2), outputs)
    assert outputs.times == 2


def test_what_others_may_have_written_or_what_is_damaged_is_computed_anew(session: Session, home: Path) -> None:
    outputs = Counted()
    keeping_outputs(session, batch(1), outputs)
    (file,) = (home / "hfq" / "outputs").glob("*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o666)
    keeping_outputs(session, batch(1), outputs)
    assert outputs.times == 2
    (file,) = (home / "hfq" / "outputs").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    keeping_outputs(session, batch(1), outputs)
    assert outputs.times == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_no_error(session: Session, home: Path) -> None:
    home.chmod(0o500)
    assert keeping_outputs(session, batch(1), Counted())[1] == 1.5
    home.chmod(0o700)
