"""hfq under optimum's names: `optimum-cli hfq`, and a quantizer class."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from support.command import CHECKPOINT, Done, forkserver, hfq, stock_python, timeless, write_outliers, write_slice
from transformers import BertConfig, BertForSequenceClassification

from hfq.common.errors import GoalNotMetError, UsageError
from hfq.common.version import __version__
from hfq.optimum import HfqQuantizer

OPTIMUM_CLI = str(Path(sys.executable).with_name("optimum-cli"))
STOCK = """
import sys, transformers
print(transformers.pipeline("text-classification", model=sys.argv[1])("URGENT! You have won a 1 week FREE prize")[0]["label"])
assert "hfq" not in sys.modules
"""

pytestmark = pytest.mark.usefixtures("forked_workers")


@dataclass(frozen=True)
class Run:
    """What `optimum-cli hfq quantize` printed, and where it wrote `out`."""

    cwd: Path
    arguments: list[str]
    done: Done


def optimum_cli(*arguments: object, cwd: Path) -> Done:
    return forkserver().hfq("hfq", *arguments, cwd=cwd, command="optimum-cli")


def without_figures(text: str) -> list[str]:
    """Lines of progress, without those of the closing table that were measured by a clock."""
    return [line for line in text.splitlines() if not line.startswith((" Duration", " Peak memory", " Throughput"))]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "hfq.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("optimum")
    (folder / "model").symlink_to(CHECKPOINT)
    write_slice(folder / "data", train=60, validation=60)
    arguments = ["quantize", "./model", "--dataset", "./data", "--approach", "dynamic", "--output", "out", "--json"]
    return Run(folder, arguments, optimum_cli(*arguments, cwd=folder))


def test_command_writes_and_prints_what_hfq_does(run: Run) -> None:
    assert run.done.code == 0, run.done.err
    assert run.done.out == (run.cwd / "out" / "hfq.json").read_text()
    (run.cwd / "out").rename(run.cwd / "by-optimum")
    own = forkserver().hfq(*run.arguments, cwd=run.cwd)
    (run.cwd / "out").rename(run.cwd / "by-hfq")
    assert without_figures(run.done.err) == without_figures(own.err)
    assert timeless(report(run.cwd / "by-optimum")) == timeless(report(run.cwd / "by-hfq"))
    weights = [(run.cwd / name / "model.safetensors").read_bytes() for name in ("by-optimum", "by-hfq")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "--help"],
        ["--help"],
        [],
        ["quantize", "./nowhere", "--dataset", "./data"],
        ["quantize", "./nowhere", "--tolerable-loss", "2"],
        ["quantize", "./nowhere", "--no-such-flag"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_help_errors_and_exit_codes_are_those_of_hfq(arguments: list[str], tmp_path: Path) -> None:
    found = optimum_cli(*arguments, cwd=tmp_path)
    assert found == forkserver().hfq(*arguments, cwd=tmp_path)
    assert "Traceback" not in found.err


def test_command_takes_flags_before_the_first_word(tmp_path: Path) -> None:
    assert hfq("hfq", "--version", cwd=tmp_path, command=OPTIMUM_CLI) == Done(0, f"hfq {__version__}\n", "")


def test_quantizer_resumes_after_a_missed_goal_and_stock_transformers_opens_the_result(
    run: Run, tmp_path: Path
) -> None:
    quantizer = HfqQuantizer.from_pretrained(write_outliers(tmp_path / "outliers"))
    settings = {"dataset": str(run.cwd / "data"), "approach": "dynamic", "max_trials": 1, "tolerable_loss": 0}
    settings["columns"] = {"text": ["text"], "label": ["label"]}
    with pytest.raises(GoalNotMetError) as missed:
        quantizer.quantize(tmp_path / "int8", **settings)
    assert not (tmp_path / "int8").exists()

    result = quantizer.quantize(save_dir=tmp_path / "int8", resume=True, allow_loss=True, **settings)
    assert result.folder == tmp_path / "int8"
    assert [asdict(trial) for trial in result.report.trials] == missed.value.details["trials"]  # none ran again
    assert report(result.folder)["quantized"]["accuracy"] == result.report.quantized.accuracy
    opened = subprocess.run([stock_python(), "-c", STOCK, str(result.folder)], capture_output=True, text=True)
    assert opened.stdout in ("spam\n", "ham\n"), opened.stderr

    flags = "--dataset data --column text=text --column label=label --approach dynamic --tolerable-loss 0.0 --max-trials 1 --allow-loss --output int8"
    assert result.report.command == f"hfq quantize outliers {flags}"
    assert f"```bash\n{result.report.command}\n```" in (result.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"output": "elsewhere"}, "'output': the folder is save_dir"),
        ({"checkpoint": "other"}, "'checkpoint': from_pretrained has named it"),
        ({"revision": "main"}, "'revision': it belongs to the checkpoint"),
        ({"token": "x"}, "'token': give it to from_pretrained"),
        ({"push": True}, "'push': nothing is published here"),
        ({"file_prefix": "int8"}, "file_prefix is 'int8'"),
        ({"quantization_config": None}, "'quantization_config' is no key of a recipe"),
        ({"tolerable_loss": 2}, "HfqQuantizer cannot be run: tolerable_loss: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_quantize_cannot_do_is_refused(arguments: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(reason)):
        HfqQuantizer.from_pretrained(CHECKPOINT).quantize(tmp_path / "out", **arguments)
    assert not any(tmp_path.iterdir())


def test_what_from_pretrained_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match=r"file_name is 'model\.onnx'"):
        HfqQuantizer.from_pretrained(CHECKPOINT, "model.onnx")
    with pytest.raises(UsageError, match="no argument 'subfolder'"):
        HfqQuantizer.from_pretrained(CHECKPOINT, subfolder="x")
    model: Any = BertForSequenceClassification(BertConfig(num_hidden_layers=0, hidden_size=12, vocab_size=9))
    with pytest.raises(UsageError, match="BertForSequenceClassification; expected a Hub id or folder"):
        HfqQuantizer.from_pretrained(model)
