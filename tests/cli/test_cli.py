"""The `hfq` command as a user runs it: what it prints, writes, publishes, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command import (
    CHECKPOINT,
    ROOT,
    Done,
    Running,
    copy_checkpoint,
    forkserver,
    hfq,
    stock_python,
    write_outliers,
    write_slice,
)
from support.factories import make_fit_report

from hfq.common.version import __version__
from hfq.hub.local import LocalHub

USER = "hfq-user"
FILES = {"README.md", "config.json", "hfq.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
PLOTS = {"plots/accuracy_speed.png", "plots/layer_sensitivity.png"}
LOAD_AND_RUN = """
import sys, transformers
assert "hfq" not in sys.modules
model = sys.argv[1]
print(transformers.pipeline("text-classification", model=model)("URGENT! You have won a 1 week FREE prize")[0]["label"])
"""


@dataclass(frozen=True)
class Run:
    """A finished `hfq quantize`: where it ran, what it printed, and its report."""

    cwd: Path
    done: Done
    report: dict[str, Any]

    @property
    def weights(self) -> bytes:
        return (self.cwd / "out" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's `model` and a slice of its `data`."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "model").symlink_to(CHECKPOINT)
    write_slice(folder / "data", train=100, validation=100, test=50)
    return folder


@pytest.fixture(scope="module")
def run(workspace: Path) -> Run:
    """The one run that most tests look at. `./model`, `./data` and the recipe's folder are all relative."""
    flags = ["--dataset", "./data", "--output", "out", "--save-recipe", "recipes/mine.yaml", "--json"]
    done = forkserver().hfq("quantize", "./model", *flags, cwd=workspace)
    assert done.code == 0, done.err
    return Run(workspace, done, json.loads((workspace / "out" / "hfq.json").read_text()))


@pytest.fixture
def interrupted(workspace: Path) -> Iterator["Interrupted"]:
    found = Interrupted(workspace)
    yield found
    found.close()


class Interrupted:
    """A run that explores, to be stopped after two trials."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        flags = ["--output", "explored", "--approach", "dynamic", "--explore"]
        self.arguments = ["quantize", "./model", "--dataset", "./data", *flags]
        self.log = cwd / "explored.hfq-work" / "trials.jsonl"

    def stop(self, number: signal.Signals) -> Done:
        with Running(*self.arguments, cwd=self.cwd) as running:
            while running.runs() and len(self.trials()) < 2:
                time.sleep(0.005)
            return running.stop(number)

    def trials(self) -> list[dict[str, Any]]:
        """Finished trials in the log on disk."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line)["trial"] for line in lines if line.startswith('{"trial"') and line.endswith("}")]

    def close(self) -> None:
        for file in self.log.parent.glob("*"):
            file.unlink()
        if self.log.parent.exists():
            self.log.parent.rmdir()


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outliers(tmp_path_factory.mktemp("outliers") / "outliers")


def commits(hub: LocalHub, repo_id: str) -> int:
    """How many there are beside the one that the Hub makes in a new repository."""
    return len(hub.commits(repo_id)) - 1


def secret(done: Done, *folders: Path) -> bool:
    """Whether nothing that was printed or written holds the token."""
    token = os.environ["HF_TOKEN"]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return token not in done.out + done.err and not any(token.encode() in file.read_bytes() for file in files)


# Quantize


def test_writes_an_ordinary_checkpoint_folder_and_nothing_else(run: Run) -> None:
    files = {path.relative_to(run.cwd / "out").as_posix() for path in (run.cwd / "out").rglob("*") if path.is_file()}
    assert files == FILES | PLOTS
    assert {file.name for file in run.cwd.iterdir()} >= {"model", "data", "out", "recipes"}
    assert not (run.cwd / "out.hfq-work").exists()
    ratio = len(run.weights) / (CHECKPOINT / "model.safetensors").stat().st_size
    assert ratio < 0.27


def test_the_report_holds_what_the_run_did(run: Run) -> None:
    report = run.report
    assert report["hfq_version"] == __version__
    assert report["task"] == "text-classification"
    assert report["checkpoint"]["id"] == CHECKPOINT.name
    assert re.fullmatch("sha256:[0-9a-f]{64}", report["checkpoint"]["revision"])
    assert (report["dataset"]["split"], report["dataset"]["calibration_split"]) == ("validation", "train")
    assert (report["dataset"]["examples"], report["dataset"]["calibration_samples"]) == (100, 100)
    assert (report["metric"], report["met"]) == ("accuracy", True)
    assert (report["goal"]["kind"], report["goal"]["tolerable_loss"]) == ("relative", 0.01)
    assert report["approach"] in ("static", "dynamic")
    for trial in report["trials"]:
        assert {"name", "accuracy", "duration_s", "accepted"} <= set(trial)
    assert report["trials"][-1]["accepted"]
    for measured in (report["baseline"], report["quantized"]):
        assert 0 < measured["accuracy"] <= 1
        assert all(measured[key] > 0 for key in ("duration_s", "memory_mib", "size_mib", "peak_memory_mib"))
    assert report["quantized"]["memory_mib"] < 0.3 * report["baseline"]["memory_mib"]
    assert report["quantized"]["size_mib"] == len(run.weights) / 2**20
    assert set(report["sensitivity"]) == set(report["layers"]["static"]) | set(report["layers"]["dynamic"])
    assert all(0 < error < 0.1 for error in report["sensitivity"].values())
    assert report["baseline_pass_s"] > 0


def test_json_on_standard_output_is_the_report_and_progress_is_on_standard_error(run: Run) -> None:
    assert run.done.out == (run.cwd / "out" / "hfq.json").read_text()
    for stage in ("▸ Checkpoint", "▸ Baseline", "▸ Calibration", "▸ Trials", "▸ Export", "▸ Measure", "▸ Done: out"):
        assert stage in run.done.err
    assert all(line.startswith(("▸ ", " ")) for line in run.done.err.splitlines()), "only hfq speaks"


def test_the_saved_recipe_gives_the_same_weights_from_anywhere(run: Run, tmp_path: Path) -> None:
    recipe = run.cwd / "recipes" / "mine.yaml"
    assert set(yaml.safe_load(recipe.read_text())) == {"checkpoint", "dataset", "output"}
    done = forkserver().hfq("run", recipe, cwd=tmp_path)
    assert (done.code, done.out) == (0, ""), done.err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == run.weights


def test_warns_when_the_float_model_is_no_better_than_the_majority(outliers: Path, tmp_path: Path) -> None:
    data = write_slice(tmp_path / "data", train=100)
    rows = (data / "train.csv").read_text().splitlines(keepends=True)
    ham = [row for row in rows if row.endswith(",0\n")]
    (data / "validation.csv").write_text("".join([rows[0], *ham, ham[0].removesuffix("0\n") + "1\n"]))
    done = forkserver().hfq("quantize", outliers, "--dataset", data, *MISSES, cwd=tmp_path)
    assert "! The float model's accuracy is" in done.err
    assert "no better than always answering the most common label (0.98" in done.err


# Interruptions


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_says_so_once_and_keeps_the_trials(
    number: signal.Signals, code: int, interrupted: Interrupted
) -> None:
    done = interrupted.stop(number)
    assert (done.code, done.out) == (code, "")
    assert done.err.count("Interrupted") == 1
    assert "--resume" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert len(interrupted.trials()) >= 2
    assert not (interrupted.cwd / "explored").exists()


def test_a_killed_run_goes_on_without_repeating_a_trial(interrupted: Interrupted) -> None:
    assert interrupted.stop(signal.SIGKILL).code == -signal.SIGKILL
    before = interrupted.trials()
    done = forkserver().hfq(*interrupted.arguments, "--resume", cwd=interrupted.cwd)
    assert done.code == 0, done.err
    trials = json.loads((interrupted.cwd / "explored" / "hfq.json").read_text())["trials"]
    assert trials[: len(before)] == before  # durations too: none ran again
    names = [trial["name"] for trial in trials]
    assert len(names) == len(set(names)) > len(before)
    assert not interrupted.log.parent.exists()


# A goal that is not met

MISSES = ["--approach", "dynamic", "--max-trials", "1", "--tolerable-loss", "0", "--output", "out"]


def test_a_missed_goal_ends_with_3_and_publishes_nothing_unless_it_is_allowed(
    outliers: Path, workspace: Path, tmp_path: Path, hub: LocalHub
) -> None:
    arguments = ["quantize", outliers, "--dataset", workspace / "data", *MISSES, "--push", "--json"]
    done = forkserver().hfq(*arguments, cwd=tmp_path)
    assert done.code == 3
    message = done.err.splitlines()[-1]
    assert "No trial met the goal" in message
    assert "Best of 1: dynamic" in message
    assert "--allow-loss" in message
    found = json.loads(done.out)
    assert (found["met"], found["trials"][0]["accepted"], found["best"]["name"]) == (False, False, "dynamic")
    assert not (tmp_path / "out").exists()
    assert not any(method == "POST" for method, _, _ in hub.requests)

    done = forkserver().hfq(*arguments, "--resume", "--allow-loss", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["met"] is False
    assert report["trials"] == found["trials"]  # it was not repeated
    card = hub.files(f"{USER}/outliers-int8")["README.md"].decode()
    assert "does not meet its accuracy goal" in card


# Looking at a checkpoint


def test_inspect_shows_what_is_int8_and_where_it_came_from(run: Run) -> None:
    done = forkserver().hfq("inspect", "out", cwd=run.cwd)
    assert (done.code, done.err) == (0, "")
    for text in ("BertForSequenceClassification", "embedding", "128 × 512", "Float: classifier", "bert-mini-sms-spam"):
        assert text in done.out
    found = json.loads(forkserver().hfq("inspect", "./out", "--json", cwd=run.cwd).out)
    assert len(found["layers"]) == 22
    assert all(low > 0 for low, _ in (layer["weight_scale"] for layer in found["layers"]))
    assert found["float_layers"] == ["classifier"]
    assert found["int8_mib"] + found["other_mib"] == pytest.approx(found["size_mib"], rel=0.02)  # a header is the rest
    assert found["provenance"] == run.report


def test_inspect_says_that_a_float_checkpoint_has_no_int8_layer(workspace: Path) -> None:
    done = forkserver().hfq("inspect", "./model", cwd=workspace)
    assert done.code == 0
    assert "No layer is int8" in done.out


@pytest.mark.parametrize(("checkpoint", "column"), [("./model", "baseline"), ("./out", "quantized")])
def test_eval_measures_what_the_report_says(checkpoint: str, column: str, run: Run) -> None:
    done = forkserver().hfq("eval", checkpoint, "--dataset", "data", "--split", "validation", "--json", cwd=run.cwd)
    assert done.code == 0, done.err
    found, expected = json.loads(done.out), run.report[column]
    assert {key: found[key] for key in ("accuracy", "size_mib", "memory_mib")} == {
        key: expected[key] for key in ("accuracy", "size_mib", "memory_mib")
    }
    assert (found["examples"], found["split"], found["metric"]) == (100, "validation", "accuracy")
    assert found["duration_s"] > 0


# The Hub


# Bench


def test_bench_measures_every_engine_on_every_shape_and_writes_what_it_found(run: Run) -> None:
    flags = [
        "--baseline",
        "./model",
        "--shapes",
        "2x8,1x16",
        "--rounds",
        "1",
        "--no-compile",
        "--vs",
        "torch",
        "--json",
    ]
    done = forkserver().hfq("bench", "./out", *flags, cwd=run.cwd)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert json.loads((run.cwd / "bench" / "bench.json").read_text()) == found
    engines = {engine["name"]: engine for engine in found["engines"]}
    assert list(engines) == ["fp32", "hfq", "torch"]
    for engine in engines.values():
        assert engine["failure"] is None
        assert list(engine["by_shape"]) == ["2x8", "1x16"]
        for latency in engine["by_shape"].values():
            assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
            assert latency["samples"] == 30
        assert engine["first_answer_s"] > engine["load_s"] > 0 and engine["peak_mib"] > 0
        second = engine["second_process"]
        assert second["first_answer_s"] > second["load_s"] > 0
        assert second["private_mib"] > 0 and second["shared_mib"] >= 0
    assert engines["fp32"]["agreement"] == 1 and engines["fp32"]["error"] == 0
    assert 0 < engines["hfq"]["error"] < 0.5  # int8 did run, and answers nearly the same
    assert engines["hfq"]["size_mib"] < 0.3 * engines["fp32"]["size_mib"]
    table = (run.cwd / "bench" / "bench.md").read_text()
    assert "| 2x8 | hfq |" in table and "| 1x16 | torch |" in table
    assert "A second process" in table and "| engine | load s | first answer s | private MiB | shared MiB |" in table
    assert "Loading, size and peak of torch are of the float checkpoint" in table
    assert found["setup"]["versions"]["torch"] == version("torch") and f"torch {version('torch')}" in table
    assert (run.cwd / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["./out"], "--baseline"),
        (["./model"], "not quantized"),
        (["./out", "--baseline", "./model", "--vs", "tensorrt"], "tensorrt"),
        (["./out", "--baseline", "./model", "--peer-python", "st-onnx"], "is not NAME=PATH"),
        (["./out", "--baseline", "./model", "--peer-python", "st-onnx=./nowhere"], "there is no such program"),
        (
            ["./out", "--baseline", "./model", "--peer-python", f"st-onnx={sys.executable}"],
            "for models of sentence embeddings",
        ),
        (["./out", "--baseline", "./model", "--shapes", "8by16"], "8by16"),
        (["./out", "--baseline", "./nowhere"], "nowhere"),
        (["./out", "--baseline", "./out"], "--baseline out is quantized"),
        (["./out", "--baseline", "./model", "--shapes", "1x16,2x9999"], "9999"),
        (["./out", "--baseline", "./model", "--threads", "0"], "--threads"),
    ],
)
def test_bench_refuses_what_it_cannot_compare(flags: list[str], said: str, run: Run) -> None:
    done = forkserver().hfq("bench", *flags, "--output", "refused", cwd=run.cwd)
    assert done.code in (1, 2)
    assert said in done.err and "Traceback" not in done.err
    assert not (run.cwd / "refused").exists()


@pytest.mark.parametrize(
    "variables, kernel",
    [({"HFQ_ISA": "portable"}, "portable"), ({"HFQ_ISA": "native", "ONEDNN_MAX_CPU_ISA": "SSE41"}, None)],
)
def test_inspect_shows_the_runtime_and_its_limits(variables: dict[str, str], kernel: str | None, run: Run) -> None:
    start = hfq if "ONEDNN_MAX_CPU_ISA" in variables else forkserver().hfq  # which oneDNN reads once
    done = start("inspect", "--runtime", "--json", cwd=run.cwd, env={**variables, "HFQ_FUSIONS": "activation"})
    found = json.loads(done.out)
    assert found["kernel"] in ([kernel] if kernel else ["onednn", "onednn-checked", "portable"])
    assert found["hfq_isa"] == variables["HFQ_ISA"]
    assert found["onednn_isa_limit"] == variables.get("ONEDNN_MAX_CPU_ISA")
    assert found["fusions"] == ["activation"]
    for flags in ([], ["./out", "--runtime"]):
        assert forkserver().hfq("inspect", *flags, cwd=run.cwd).code == 2


def test_push_makes_one_commit_that_stock_transformers_loads(run: Run, hub: LocalHub) -> None:
    repo_id = f"{USER}/pushed"
    for commit_made in (True, False):
        hub.reset()
        done = forkserver().hfq("push", "out", "--to", repo_id, "--token", hub.token, cwd=run.cwd)
        assert (done.code, done.out) == (0, ""), done.err
        assert ("no commit" not in done.err) == commit_made
        assert commits(hub, repo_id) == 1
        assert secret(done, run.cwd / "out", run.cwd / "recipes")
    files = hub.files(repo_id)
    assert set(files) == FILES | PLOTS | {".gitattributes"}
    assert all(f"({path})" in files["README.md"].decode() for path in PLOTS)
    assert files["model.safetensors"] == run.weights
    loaded = subprocess.run([stock_python(), "-c", LOAD_AND_RUN, repo_id], capture_output=True, text=True)
    assert loaded.stdout == "spam\n", loaded.stderr


def test_quantizes_and_publishes_by_hub_id_with_the_data_its_card_names(
    run: Run, hub: LocalHub, tmp_path: Path
) -> None:
    """Only the files that are needed are downloaded, and the revision that was asked for is the one that is used."""
    checkpoint = copy_checkpoint(tmp_path / "model")
    card = checkpoint / "README.md"
    card.write_text(card.read_text().replace("ucirvine/sms_spam", f"{USER}/sms"))
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    (checkpoint / "onnx").mkdir()
    (checkpoint / "onnx" / "model.onnx").write_bytes(b"onnx")
    revision = hub.commit_folder(f"{USER}/sms-bert", checkpoint)
    (checkpoint / "config.json").write_text("{}")
    hub.commit_folder(f"{USER}/sms-bert", checkpoint)
    dataset = hub.commit_folder(f"{USER}/sms", run.cwd / "data", repo_type="dataset")
    hub.reset()

    flags = ["--revision", revision[:12], "--split", "validation", "--push", "--token", hub.token, "--json"]
    done = forkserver().hfq("quantize", f"{USER}/sms-bert", *flags, "--save-recipe", "r.yaml", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["checkpoint"]["id"], report["checkpoint"]["revision"]) == (f"{USER}/sms-bert", revision)
    assert (report["dataset"]["id"], report["dataset"]["revision"]) == (f"{USER}/sms", dataset)
    output = tmp_path / "sms-bert-int8"
    assert (output / "model.safetensors").read_bytes() == run.weights  # as from the folder
    assert commits(hub, f"{USER}/sms-bert-int8") == 1
    assert f"base_model: {USER}/sms-bert" in hub.files(f"{USER}/sms-bert-int8")["README.md"].decode()
    pulled = {path.rpartition("/")[2] for _, path, _ in hub.requests if f"sms-bert/resolve/{revision}" in path}
    assert pulled == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert secret(done, output)
    assert hub.token not in (tmp_path / "r.yaml").read_text()


def test_report_shows_a_folder_and_what_was_published_of_it(run: Run, hub: LocalHub, tmp_path: Path) -> None:
    hub.commit_folder(f"{USER}/shown", run.cwd / "out")
    hub.reset()
    pages = []
    for result in (run.cwd / "out", f"{USER}/shown"):
        done = forkserver().hfq("report", result, "--output", "shown/page.html", cwd=tmp_path)
        assert (done.code, done.out, done.err) == (0, "", "▸ Wrote shown/page.html\n")
        pages.append((tmp_path / "shown" / "page.html").read_text())
    assert pages[0] == pages[1]
    assert "Goal met" in pages[0] and f"{run.report['quantized']['accuracy']:.4g}" in pages[0]
    assert not any(path.endswith(".safetensors") for _, path, _ in hub.requests)


def test_report_needs_a_report(run: Run, workspace: Path, hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("mine")
    hub.commit_folder(f"{USER}/unmeasured", tmp_path)
    fitted = tmp_path / "fitted"
    fitted.mkdir()
    (fitted / "hfq.json").write_text(make_fit_report().to_json())
    for arguments, code, said in (
        ([fitted], 2, "was quantized as an object, by `fit`"),
        (["./out", "--output", "."], 2, "--output . is a folder"),
        ([CHECKPOINT], 2, "has no hfq.json"),
        ([f"{USER}/unmeasured"], 2, f"{USER}/unmeasured has no hfq.json"),
        ([f"{USER}/nowhere"], 1, "is not on the Hub, or is private"),
        (["./model", "--revision", "main"], 2, "revisions exist on the Hub only"),
    ):
        done = forkserver().hfq("report", *arguments, cwd=workspace)
        assert (done.code, done.out) == (code, "") and said in done.err and len(done.err.splitlines()) == 1
    assert not (workspace / "report.html").exists()


def test_finds_the_dataset_in_the_datasets_of_the_card(workspace: Path, hub: LocalHub, tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(tmp_path / "model")
    (checkpoint / "README.md").write_text(f"---\ndatasets:\n- {USER}/listed\n---\n")
    hub.commit_folder(f"{USER}/listing", checkpoint)
    hub.commit_folder(f"{USER}/listed", workspace / "data", repo_type="dataset")
    done = forkserver().hfq("eval", f"{USER}/listing", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["dataset"] == f"{USER}/listed"


def test_the_demo_runs_and_publishes_without_network_or_account(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    proxies = {"HTTP_PROXY": closed, "ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": None, "no_proxy": None}
    nowhere = {"HF_ENDPOINT": closed, "HF_TOKEN": None, **proxies}
    recipe = ROOT / "pipelines" / "demo.yaml"
    done = hfq("run", recipe, "--local-hub", "--json", cwd=tmp_path, env=nowhere)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["met"]
    assert report["quantized"]["accuracy"] > report["trivial"]["score"] + 0.05
    for measured in (report["baseline"], report["quantized"]):
        assert all(measured[key] > 0 for key in ("duration_s", "memory_mib", "size_mib", "peak_memory_mib"))
    assert report["dataset"]["holdout_examples"] == 558
    stock = report["held_out_stock"]
    assert (stock["split"], stock["seen_in_tuning"]) == ("test", False)
    assert 0.99 <= stock["agreement"] <= 1 and stock["examples"] > 200
    assert re.search(r"http://127\.0\.0\.1:\d+/hfq-user/bert-mini-sms-spam-int8 at [0-9a-f]{40}", done.err)
    assert {file.name for file in tmp_path.iterdir()} == {"demo-int8"}


# Help


def test_says_its_version(tmp_path: Path) -> None:
    assert hfq("--version", cwd=tmp_path) == Done(0, f"hfq {__version__}\n", "")


@pytest.mark.parametrize("command", ["quantize", "run", "inspect", "eval", "push"])
def test_the_help_of_a_command_holds_examples(command: str, tmp_path: Path) -> None:
    done = forkserver().hfq(command, "--help", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert f"hfq {command} " in done.out.partition("Examples")[2]
