"""`hfq explain`, as a user runs it: on a model of which three layers were spoiled, and on what was made of it."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.browser import CHROMIUM, look
from support.command import CHECKPOINT, Done, copy_checkpoint, forkserver, write_slice

SPOILED = [f"bert.encoder.layer.{layer}.output.dense" for layer in (0, 1, 2)]
LARGE = 2e4
PLAIN = ("--approach", "static", "--max-trials", "1", "--allow-loss")


def spoil(to: Path) -> Path:
    """The demo's checkpoint, where a neuron in front of each of `SPOILED` is always `LARGE` and its bias takes that away."""
    folder = copy_checkpoint(to)
    weights = load_file(folder / "model.safetensors")
    for name in SPOILED:
        before = name.replace(".output.dense", ".intermediate.dense")
        weights[f"{before}.weight"][0] = 0
        weights[f"{before}.bias"][0] = LARGE
        weights[f"{name}.bias"] -= LARGE * weights[f"{name}.weight"][:, 0]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    spoil(folder / "spoiled")
    write_slice(folder / "data", train=64, validation=64)
    return folder


@pytest.fixture(scope="module")
def done(workspace: Path) -> Done:
    return forkserver().hfq("explain", "./spoiled", "--dataset", "./data", "--json", cwd=workspace)


@pytest.fixture(scope="module")
def found(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_the_spoiled_layers_come_first_with_what_spoils_them(found: dict[str, Any]) -> None:
    first = found["layers"][:3]
    assert {cause["layer"] for cause in first} == set(SPOILED)
    for cause in first:
        assert cause["activations"]["outlier_channels"][0] == 0
        assert cause["activations"]["high"] == pytest.approx(LARGE)
        assert cause["effect"] > 10 * found["layers"][3]["effect"]
        assert cause["remedies"][0] == {"how": "float", "error": 0.0}
    assert {name for names in found["advice"]["layers"].values() for name in names} == set(SPOILED)
    assert found["advice"]["error"] < found["error"] / 10


def test_what_flips_has_a_margin_and_a_layer(found: dict[str, Any]) -> None:
    assert found["flipped"] >= len(found["flips"]) > 0
    margins = [flip["margin"] for flip in found["flips"]]
    assert margins == sorted(margins, reverse=True)
    assert all(flip["moved"] > flip["margin"] > 0 and flip["text"] for flip in found["flips"])
    assert {flip["layer"] for flip in found["flips"]} <= set(SPOILED)


def test_the_command_it_advises_is_one(workspace: Path, found: dict[str, Any]) -> None:
    words = shlex.split(found["advice"]["command"])
    assert words[0] == "hfq"
    done = forkserver().hfq(*words[1:], *PLAIN, "--output", "mended", "--explain", cwd=workspace)
    assert done.code == 0, done.err
    report = json.loads((workspace / "mended" / "hfq.json").read_text())
    assert not set(SPOILED) & set(report["layers"]["static"])
    assert report["explanation"]["score"] == report["quantized"]["accuracy"]
    assert not any(flip["text"] for flip in report["explanation"]["flips"])
    said = forkserver().hfq(
        "explain", "./mended", "--baseline", "./spoiled", "--dataset", "./data", "--output", "after", cwd=workspace
    )
    assert said.code == 0, said.err
    assert "mended" in said.err


def test_the_page_can_be_read_on_a_phone_and_on_a_desk(workspace: Path, found: dict[str, Any]) -> None:
    page = (workspace / "explain" / "explain.html").read_text()
    assert found["advice"]["command"] in page.replace("&#39;", "'")
    assert (workspace / "explain" / "explain.png").read_bytes().startswith(b"\x89PNG")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here: apt-get install chromium brings it")
    seen = look(workspace / "explain", {str(width): ("explain.html", width) for width in (390, 1280)}, dark=False)
    for frame in seen.frames.values():
        assert frame["needed"] <= frame["width"]
        assert SPOILED[0] in frame["text"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--baseline", "x"], "--baseline is for an INT8 checkpoint"),
        (["--layer", "dynamic=encoder.layer.7"], "the model has no layer 'encoder.layer.7'. Nearest: "),
        (["--layer", "slow=classifier"], "a layer cannot run as 'slow'. Expected one of: float, dynamic"),
        (["--layer", "classifier"], "--layer 'classifier' is not HOW=NAME"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_message(workspace: Path, flags: list[str], words: str) -> None:
    done = forkserver().hfq("explain", CHECKPOINT, "--dataset", "./data", *flags, cwd=workspace)
    assert done.code == 2
    assert words in done.err
