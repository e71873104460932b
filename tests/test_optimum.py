"""hfq under optimum's names: `optimum-cli hfq`, and a quantizer class."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hfq.errors import UsageError
from hfq.optimum import HfqQuantizer

DEMO = Path(__file__).parent.parent / "pipelines" / "demo"
CHECKPOINT, DATA = str(DEMO / "bert-mini-sms-spam"), str(DEMO / "data")


def optimum_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()", "hfq", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_command_quantizes_as_hfq_does(tmp_path: Path) -> None:
    done = optimum_cli("quantize", CHECKPOINT, "--dataset", DATA, "--output", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out" / "hfq.json").read_text()
    assert json.loads(done.stdout) == json.loads(written)
    result = HfqQuantizer.from_pretrained(CHECKPOINT).quantize(tmp_path / "class", dataset=DATA)
    by_command = json.loads(written)
    assert by_command["command"].startswith("hfq quantize")
    assert result.folder == tmp_path / "class"
    assert result.report.chosen == by_command["chosen"]
    assert result.report.quantized.accuracy == by_command["quantized"]["accuracy"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "class")]
    assert weights[0] == weights[1]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "class")
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 2)


def test_help_and_errors_are_those_of_hfq(tmp_path: Path) -> None:
    shown = optimum_cli("quantize", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "--tolerable-loss" in shown.stdout
    failed = optimum_cli("quantize", "./nowhere", cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("hfq: Checkpoint ./nowhere does not exist.")


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file_name is 'model\.onnx'"):
        HfqQuantizer.from_pretrained(CHECKPOINT, "model.onnx")
    with pytest.raises(TypeError, match="subfolder"):
        HfqQuantizer.from_pretrained(CHECKPOINT, subfolder="x")
    quantizer = HfqQuantizer.from_pretrained(CHECKPOINT)
    with pytest.raises(ValueError, match="file_prefix is 'int8'"):
        quantizer.quantize(tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="push is given"):
        quantizer.quantize(tmp_path / "out", push=True)
    with pytest.raises(UsageError, match="calibration_dataset"):
        quantizer.quantize(tmp_path / "out", calibration_dataset=DATA)
    assert not (tmp_path / "out").exists()
