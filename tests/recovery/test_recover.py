"""`hfq quantize --recover`, as a user runs it, on a model that post-training quantization spoils."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import copy_checkpoint, forkserver, write_slice

from hfq.common.names import RECOVERY_FILE, TRIALS_FILE

LARGE = 60.0  # times the largest weight of a row
LAYERS = 3
FLAGS = (
    "--dataset",
    "./data",
    "--layer",
    "static=bert.encoder.*",
    "--max-trials",
    "1",
    "--batch-size",
    "8",
    "--seed",
    "1",
)


def blind(to: Path) -> Path:
    """The demo's checkpoint, where each layer that reads a LayerNorm has got a large part that its inputs never show.

    What a LayerNorm puts out, less its bias and divided by its weight, sums to nothing. A multiple of 1 / weight therefore
    adds a constant, which the bias takes away: the float model is the same, and an input's rounding is multiplied.
    """
    folder = copy_checkpoint(to)
    weights = load_file(folder / "model.safetensors")
    for layer in range(LAYERS):
        prefix = f"bert.encoder.layer.{layer}"
        before = f"bert.encoder.layer.{layer - 1}.output" if layer else "bert.embeddings"
        readers = [(before, f"{prefix}.attention.self.{name}") for name in ("query", "key", "value")]
        for norm, reader in [*readers, (f"{prefix}.attention.output", f"{prefix}.intermediate.dense")]:
            unseen = 1 / weights[f"{norm}.LayerNorm.weight"].double()
            rows = LARGE * weights[f"{reader}.weight"].abs().amax(1).double() / unseen.abs().max()
            rows[::2] *= -1
            weights[f"{reader}.bias"] -= (rows * (unseen * weights[f"{norm}.LayerNorm.bias"]).sum()).float()
            weights[f"{reader}.weight"] += (rows[:, None] * unseen).float()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    blind(folder / "blind")
    write_slice(folder / "data", train=400, validation=300)
    return folder


def test_what_misses_the_goal_meets_it_after_training_and_the_card_says_so(workspace: Path) -> None:
    """What an earlier run left, of another model, is nothing to go on from."""
    left = workspace / "blind-int8.hfq-work"
    left.mkdir()
    save_file({"progress": torch.tensor([400.0, 0.0])}, left / RECOVERY_FILE)
    done = forkserver().hfq("quantize", "./blind", *FLAGS, "--recover", cwd=workspace)
    assert done.code == 0, done.err
    report = json.loads((workspace / "blind-int8" / "hfq.json").read_text())
    recovery, goal = report["recovery"], report["goal"]
    assert report["chosen"] == "static, recovered"
    assert recovery["before"] < goal["baseline"] * (1 - goal["tolerable_loss"]) <= report["quantized"]["accuracy"]
    assert recovery["examples"] == 400
    card = (workspace / "blind-int8" / "README.md").read_text()
    assert f"post-training quantization alone reached {recovery['before']:.4g}" in card


@pytest.mark.parametrize("split", ["validation", "train,validation"])
def test_it_does_not_train_on_what_judges_it(workspace: Path, split: str) -> None:
    flags = ("--recover", "--split", split, "--calibration-split", "validation", "--output", "other")
    done = forkserver().hfq("quantize", "./blind", "--dataset", "./data", *flags, cwd=workspace)
    assert done.code == 2
    assert "--recover trains on another split than 'validation'" in done.err
    assert not (workspace / "other.hfq-work" / TRIALS_FILE).exists()
