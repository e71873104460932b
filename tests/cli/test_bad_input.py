"""What a user does wrong, and what breaks around them: one message that says what to do, and nothing left behind."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from support.command import CHECKPOINT, HFQ, Done, Running, copy_checkpoint, forkserver, hfq, hfq_in, write_slice
from support.factories import make_folder

from hfq.hub.local import LocalHub
from hfq.recipe import read_recipe

Change = Callable[[Path], object]
CLOSED = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slice(tmp_path_factory.mktemp("bad") / "data", train=100, validation=30)


def refused(done: Done, *says: str, code: int = 1) -> None:
    """It failed with one message, which holds each of `says`: the thing that is wrong, and what to do about it."""
    assert done.code == code, done.err
    assert done.out == ""
    *progress, message = done.err.splitlines()
    assert all(line.startswith(("▸ ", "  ")) for line in progress), done.err
    assert message.startswith("hfq: ")
    for text in says:
        assert text in message
    assert os.environ["HF_TOKEN"] not in done.err


# Checkpoints


def edit_config(**values: object) -> Change:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit


def edit_weights(edit: Callable[[dict], object], **config: object) -> Change:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        edit_config(**config)(folder)

    return change


def write(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def remove(*names: str) -> Change:
    def delete(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return delete


def flip_byte(at: int) -> Change:
    def flip(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[at] ^= 0xFF
        file.write_bytes(content)

    return flip


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def forget_classifier(tensors: dict) -> None:
    for name in [name for name in tensors if name.startswith("classifier")]:
        del tensors[name]


def forget_words(tensors: dict) -> None:
    name = "bert.embeddings.word_embeddings.weight"
    tensors[name] = tensors[name][:1000].clone()


def break_classifier(tensors: dict) -> None:
    tensors["classifier.bias"][0] = float("nan")


QUANTIZED = {"quant_method": "compressed-tensors", "config_groups": {}}
WHOLE = ("Expected a", "config.json", "safetensors")
BAD_CHECKPOINTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "without config.json": (remove("config.json"), ("has no config.json", *WHOLE)),
    "with a broken config.json": (write("config.json", '{"a":'), ("config.json cannot be read", "Download it again")),
    "with a list in config.json": (write("config.json", "[]"), ("config.json holds a list", "expected an object")),
    "without weights": (remove("model.safetensors"), ("has no weights", "expected model.safetensors")),
    "with pickle weights only": (to_pickle, ("only pickle weights (pytorch_model.bin)", "Convert it once")),
    "cut off": (truncate, ("model.safetensors is not a whole safetensors file", "Download it again")),
    "with a flipped bit in the header's length": (flip_byte(0), ("not a whole safetensors file", "Download it again")),
    "with a flipped bit in the header": (flip_byte(20), ("not a whole safetensors file", "Download it again")),
    "with weights of another shape": (
        edit_config(intermediate_size=256),
        ("do not fit its config.json", "is [512] and not [256]", "Take both files from the same checkpoint"),
    ),
    "with fewer labels than the config": (
        edit_config(id2label={"0": "ham", "1": "spam", "2": "x"}, label2id={"ham": 0, "spam": 1, "x": 2}),
        ("do not fit its config.json", "classifier.bias is [2] and not [3]"),
    ),
    "without a classifier": (
        edit_weights(forget_classifier),
        ("lacks weights", "classifier.weight", "Expected a checkpoint that was fine-tuned for this task"),
    ),
    "with fewer words than the tokenizer": (
        edit_weights(forget_words, vocab_size=1000),
        ("token ids up to", "only 1000 (vocab_size", "Take both from the same checkpoint"),
    ),
    "with a weight that is no number": (edit_weights(break_classifier), ("NaN", "weights")),
    "without a tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        ("has no tokenizer: expected vocab.txt or tokenizer.json", "Save it there"),
    ),
    "with a broken tokenizer": (
        write("tokenizer.json", "{"),
        ("tokenizer of", "cannot be loaded", "Download it again"),
    ),
    "for another task": (
        edit_config(architectures=["BertForNextSentencePrediction"]),
        ("BertForNextSentencePrediction", "none of the tasks", "text-classification", "hfq.quantization.fit"),
    ),
    "of another kind of model": (
        edit_config(architectures=["T5ForConditionalGeneration"], model_type="t5"),
        ("T5ForConditionalGeneration", "none of the tasks", "text-classification"),
    ),
    "of an unknown architecture": (edit_config(architectures=["FooForBar"]), ("FooForBar", "does not know")),
    "of an unknown model type": (edit_config(model_type="foo"), ("model_type 'foo'", "does not know")),
    "for regression": (edit_config(problem_type="regression"), ("puts out 2 numbers", "regression of one")),
    "with one label": (
        edit_config(id2label={"0": "x"}, problem_type=None),
        ("do not fit its config.json", "classifier"),
    ),
    "for many labels at once": (
        edit_config(problem_type="multi_label_classification"),
        ("column 'label' holds", "any number of labels", "Expected lists of labels"),
    ),
    "that brings its own code": (
        edit_config(auto_map={"AutoModelForSequenceClassification": "own.Model"}),
        ("needs code from its repository", "--trust-remote-code"),
    ),
}


WRONG = (  # none that a command could take, where nothing is damaged
    "without config.json",
    "without weights",
    "with pickle weights only",
    "that brings its own code",
    "for another task",
    "of another kind of model",
    "of an unknown architecture",
    "of an unknown model type",
    "for regression",
)


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_refuses_a_checkpoint(kind: str, cwd: Path, data: Path) -> None:
    change, says = BAD_CHECKPOINTS[kind]
    checkpoint = copy_checkpoint(cwd.parent / "model")
    change(checkpoint)
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", cwd=cwd)
    refused(done, *says, code=2 if kind in WRONG else 1)


def test_eval_refuses_a_checkpoint_for_another_task(cwd: Path, data: Path) -> None:
    change, says = BAD_CHECKPOINTS["for another task"]
    checkpoint = copy_checkpoint(cwd.parent / "model")
    change(checkpoint)
    refused(forkserver().hfq("eval", checkpoint, "--dataset", data, cwd=cwd), *says, code=2)


def test_refuses_a_checkpoint_that_is_quantized_already(cwd: Path, data: Path) -> None:
    checkpoint = copy_checkpoint(cwd.parent / "model")
    edit_config(quantization_config=QUANTIZED)(checkpoint)
    done = forkserver().hfq("quantize", checkpoint, "--dataset", data, "--output", "out", cwd=cwd)
    refused(done, "is quantized already", "Expected the float checkpoint", code=2)


def test_a_quantization_config_that_is_null_is_none(cwd: Path) -> None:
    checkpoint = copy_checkpoint(cwd.parent / "model")
    edit_config(quantization_config=None)(checkpoint)
    refused(forkserver().hfq("bench", checkpoint, cwd=cwd), "model is not quantized", "hfq quantize", code=2)


@pytest.mark.parametrize("key", ["checkpoint", "dataset"])
def test_a_path_beside_a_recipe_is_never_taken_for_a_hub_id(key: str, project: Path) -> None:
    recipe = {"checkpoint": str(CHECKPOINT), "output": "out", key: "../nowhere"}
    (project / "pipelines" / "mine.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    refused(forkserver().hfq("run", "pipelines/mine.yaml", cwd=project), "nowhere does not exist", code=2)
    assert not (project / "out").exists()


@pytest.mark.parametrize("command", ["quantize", "eval", "inspect"])
@pytest.mark.parametrize(
    ("checkpoint", "problem"),
    [("./nowhere", "does not exist"), (str(CHECKPOINT / "config.json"), "is a file"), ("a/b/c", "nor a Hub id")],
)
def test_refuses_what_is_no_checkpoint(command: str, checkpoint: str, problem: str, cwd: Path) -> None:
    refused(forkserver().hfq(command, checkpoint, cwd=cwd), checkpoint, problem, "Hub id", code=2)


# Datasets

HEADER = "text,label\n"
BAD_DATA: dict[str, tuple[str, tuple[str, ...]]] = {
    "without rows": (HEADER, ("split 'validation' is empty",)),
    "without anything": ("", ("validation.csv cannot be read: it is empty", "expected a line")),
    "with other label ids": (HEADER + "a,0\nb,7\n", ("['0', '1', '7']", "0=ham, 1=spam", "--label-column")),
    "with a missing text": (HEADER + "a,0\n,1\n", ("Row 1", "'validation'", "column 'text'", "Mend or remove")),
    "with a missing label": (
        HEADER + "a,0\nb,\n",
        ("'validation'", "without a usable label", "row 1", "Choose a labelled"),
    ),
    "with one label only": (
        HEADER + "a,0\nb,0\n",
        ("Every label of split 'validation' is 'ham'", "nothing is told apart"),
    ),
    "without labels": (HEADER + "a,-1\nb,-1\n", ("'validation'", "without a usable label", "Choose a labelled")),
    "without a label column": ("text\na\nb\n", ("'validation'", "label", "Choose a labelled")),
    "with rows of other lengths": (HEADER + "a,0\nb,1,2,3\n", ("expected 2 fields in line 3, saw 4", "Mend that row")),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_refuses_a_validation_split(kind: str, cwd: Path) -> None:
    content, says = BAD_DATA[kind]
    data = write_slice(cwd.parent / "data", train=100)
    (data / "validation.csv").write_text(content)
    refused(forkserver().hfq("quantize", CHECKPOINT, "--dataset", data, "--output", "out", cwd=cwd), *says)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--text-column", "nope"], ("--text-column 'nope'", "Columns: text, label")),
        (["--text-column", "label"], ("column 'label'", "not a text", "--text-column")),
        (["--label-column", "nope"], ("--label-column 'nope'", "Columns: text, label")),
        (["--column", "text=nope"], ("'nope'", "Columns: text, label")),
        (["--column", "label=nope"], ("'nope'", "Columns: text, label")),
        (["--label-column", "text"], ("Which columns hold the text", "Name them with --text-column")),
        (["--split", "nope"], ("--split 'nope'", "Splits: train, validation")),
        (["--calibration-split", "nope"], ("--calibration-split 'nope'", "Splits: train, validation")),
        (["--subset", "mrpc"], ("'mrpc' not found", "Available: ['default']")),
    ],
    ids=" ".join,
)
def test_refuses_names_that_the_dataset_does_not_have(
    flags: list[str], says: tuple[str, ...], cwd: Path, data: Path
) -> None:
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", data, "--output", "out", *flags, cwd=cwd)
    refused(done, *says, code=2)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data.xlsx", b"x", ("data.xlsx is not a CSV, JSON, Parquet or text file", "Convert it")),
        ("data.parquet", b"\x00\xff\x10" * 30, ("data.parquet cannot be loaded", "Expected a")),
        ("data.json", b'{"a": ', ("data.json cannot be loaded", "JSON parse error", "Expected a")),
        ("data.csv", "text,label\ncafé,0\n".encode("latin-1"), ("data.csv", "line 2 is not UTF-8", "Latin-1", "iconv")),
        (
            "names.csv",
            b"text,label\na,good\nb,bad\n",
            ("['bad', 'good']", "0=ham, 1=spam", "Rename the dataset's labels"),
        ),
        (
            "lists.jsonl",
            b'{"text": "a", "label": [1, 0]}\n{"text": "b", "label": [0, 1]}\n',
            ("'label' holds", "--task multi-label-classification"),
        ),
        ("types.jsonl", b'{"text": "a", "label": 0}\n{"text": 2, "label": 1}\n', ("Row 1", "has 2", "and not a text")),
        ("floats.csv", b"text,label\na,0.5\nb,1.0\n", ("['0.5', '1.0']", "0=ham, 1=spam", "--label-column")),
        ("two.csv", b"a,b,label\nx,y,0\nz,w,1\n", ("with text: a, b", "Name them with --text-column")),
        ("nowhere.csv", None, ("nowhere.csv does not exist", "Expected a")),
        ("folder", None, ("folder does not exist", "Expected a")),
    ],
)
def test_refuses_a_dataset_file(name: str, content: bytes | None, says: tuple[str, ...], cwd: Path) -> None:
    file = cwd.parent / name
    if content is not None:
        file.write_bytes(content)
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", file, "--output", "out", cwd=cwd)
    refused(done, *says, code=2 if name in ("data.xlsx", "two.csv", "nowhere.csv", "folder") else 1)


def test_says_where_it_looked_when_no_dataset_is_known(cwd: Path) -> None:
    checkpoint = copy_checkpoint(cwd.parent / "model")
    (checkpoint / "README.md").unlink()
    done = forkserver().hfq("quantize", checkpoint, "--output", "out", cwd=cwd)
    refused(done, "No dataset is known", "model-index", "datasets (none)", "recipes in", "Pass --dataset", code=2)


# Arguments and recipes


@pytest.mark.parametrize(
    "flags",
    [
        ["--tolerable-loss", "2"],
        ["--tolerable-loss", "-1"],
        ["--batch-size", "0"],
        ["--calibration-samples", "0"],
        ["--threads", "0"],
        ["--max-trials", "0"],
        ["--timeout", "-1"],
        ["--max-length", "1"],
        ["--seed", "99999999999999999999"],
    ],
    ids=" ".join,
)
def test_refuses_a_value_by_its_flag(flags: list[str], cwd: Path, data: Path) -> None:
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", data, *flags, cwd=cwd)
    refused(done, flags[0], "should be", flags[1], code=2)


def test_refuses_a_metric_that_the_task_has_not(cwd: Path, data: Path) -> None:
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", data, "--metric", "bleu", cwd=cwd)
    refused(done, "--metric bleu", "text-classification", "Expected one of: accuracy, f1", code=2)


def test_refuses_more_tokens_than_the_model_takes(cwd: Path, data: Path) -> None:
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", data, "--max-length", 129, cwd=cwd)
    refused(done, "--max-length 129", "at most 128 tokens", code=2)


def test_a_path_may_begin_with_the_home_folder(cwd: Path) -> None:
    home = {"HOME": str(cwd.parent)}
    make_folder(cwd.parent / "out")
    done = forkserver().hfq("report", "~/out", "--output=~/pages/page.html", cwd=cwd, env=home)
    assert done.code == 0, done.err
    assert (cwd.parent / "pages" / "page.html").is_file()


def test_the_output_of_a_recipe_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text("checkpoint: ~/model\noutput: ~/int8\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert (recipe.output_folder, recipe.name) == (tmp_path / "int8", "model")


@pytest.mark.parametrize(
    "line", ["report ./out --output=~nobody-here/x.html", "push ~nobody-here/x", "inspect ~nobody-here/x"]
)
def test_refuses_the_home_folder_of_nobody(line: str, cwd: Path) -> None:
    done = forkserver().hfq(*line.split(), cwd=cwd)
    refused(done, "home folder in ~nobody-here/x", "Write the path out", code=2)


def test_a_token_file_that_cannot_be_read_is_named(cwd: Path) -> None:
    make_folder(cwd.parent / "out")
    env = {"HF_TOKEN": None, "HF_TOKEN_PATH": str(cwd.parent)}
    refused(hfq_in(env, "push", cwd.parent / "out", cwd=cwd), f"Is a directory: {cwd.parent}")


NOT_THERE = {
    "inspect ../empty": "has no config.json",
    "eval ../nowhere --dataset {data}": "../nowhere does not exist",
    "report ../empty": "has no hfq.json",
    "eval {model} --dataset rows.csv": "rows.csv does not exist",
    "eval {model} --dataset ../empty": "any data files",
    "eval {model} --dataset {data} --split nope": "Splits: train, validation",
    "eval {model} --dataset {data} --subset nope": "Name a subset with --subset",
    "eval {model} --dataset {data} --text-column nope": "Columns: text, label",
    "explain {model} --dataset {data} --column label=nope": "Columns: text, label",
    "eval {model} --dataset {data} --task image-classification": "Name one with --column image=NAME",
    "push {int8} --to a+b": "cannot name a repository",
    "report {int8} --output ../file/page.html": "Choose another --output",
}


@pytest.mark.parametrize("line", NOT_THERE)
def test_naming_what_is_not_there_is_wrong_use(line: str, cwd: Path, data: Path) -> None:
    places = {"model": CHECKPOINT, "data": data, "int8": cwd.parent / "int8"}
    if "{int8}" in line:
        make_folder(places["int8"])
    (cwd.parent / "empty").mkdir()
    (cwd.parent / "file").touch()
    done = forkserver().hfq(*line.format(**places).split(), cwd=cwd)
    refused(done, NOT_THERE[line], code=2)


BAD_USAGE = {
    "hfq quantize": "Missing argument 'checkpoint'",
    "hfq quantize x --batch-size many": "--batch-size",
    "hfq quantize x --approach qat": "'auto'",
    "hfq quantize x --colour": "No such option: --colour",
    "hfq quantise x": "Did you mean 'quantize'?",
}


@pytest.mark.parametrize("line", BAD_USAGE)
def test_wrong_usage_ends_with_2_and_shows_the_way_to_the_help(line: str, cwd: Path) -> None:
    done = forkserver().hfq(*line.split()[1:], cwd=cwd)
    assert (done.code, done.out) == (2, "")
    assert BAD_USAGE[line] in done.err
    assert "--help" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1,", ("is not YAML", "Mend it")),
        ("- a", ("holds list", "expected keys and values")),
        ("", ("holds nothing", "expected keys and values")),
        ("dataset: x", ("'checkpoint' is missing",)),
        ("checkpoint: x\ncolour: red", ("'colour' is no key", "checkpoint, revision")),
        ("checkpoint: x\ntolerable_loss: 2", ("tolerable_loss", "should be less than 1 (got 2)")),
        ("checkpoint: x\ntoken: secret", ("holds a token", "--token", "HF_TOKEN")),
        (f"checkpoint: x\nhf: hf_{'a' * 34}", ("holds a token", "--token", "HF_TOKEN")),
    ],
)
def test_refuses_a_recipe(text: str, says: tuple[str, ...], cwd: Path) -> None:
    recipe = cwd.parent / "recipe.yaml"
    recipe.write_text(text)
    done = forkserver().hfq("run", recipe, cwd=cwd)
    refused(done, str(recipe), *says, code=2)
    assert "hf_a" not in done.err
    assert "secret" not in done.err


def test_refuses_a_recipe_that_is_not_there(cwd: Path) -> None:
    refused(forkserver().hfq("run", "nowhere.yaml", cwd=cwd), "nowhere.yaml", "Expected a YAML file", code=2)


# Outputs


def test_refuses_an_output_folder_of_somebody_else(cwd: Path, data: Path) -> None:
    output = cwd.parent / "photos"
    output.mkdir()
    (output / "cat.jpg").write_bytes(b"x")
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", data, "--output", output, cwd=cwd)
    refused(done, f"{output} exists and was not written by hfq", "Choose another --output", code=2)
    assert [file.name for file in output.iterdir()] == ["cat.jpg"]


@pytest.mark.parametrize(("output", "code"), [("file", 2), ("file/out", 1), (".", 2)])
def test_refuses_an_output_that_cannot_be_a_folder(output: str, code: int, cwd: Path, data: Path) -> None:
    (cwd.parent / "file").write_text("x")
    output = output if output == "." else str(cwd.parent / output)
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", data, "--output", output, cwd=cwd)
    refused(done, output, "Choose another", code=code)
    assert "▸ Dataset" not in done.err  # it is known before the work begins


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_refuses_an_output_where_it_may_not_write(cwd: Path, data: Path) -> None:
    folder = cwd.parent / "locked"
    folder.mkdir(mode=0o500)
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", data, "--output", folder / "out", cwd=cwd)
    refused(done, "cannot be written: Permission denied", "Choose another --output")


def test_takes_folders_away_again_that_it_made_for_the_output(cwd: Path) -> None:
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", "./nowhere", "--output", "a/b/out", cwd=cwd)
    refused(done, "nowhere does not exist", code=2)


def test_a_full_disk_leaves_nothing_behind(cwd: Path, data: Path) -> None:
    """A limit on the size of files stands for a small disk where this user may not mount one."""
    output = cwd.parent / "disk"
    output.mkdir()
    may_mount = subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    limit = 'mount -t tmpfs -o size=900k tmpfs "$0"' if may_mount else "ulimit -f 900"
    shell = ["unshare", "--mount", "bash"] if may_mount else ["bash"]
    script = f'{limit} && "$@"; code=$?; ls -A "$0"; exit $code'
    quantize = ["quantize", CHECKPOINT, "--dataset", data, "--approach", "dynamic", "--output", output / "out"]
    done = hfq(*shell[1:], "-c", script, output, HFQ, *quantize, cwd=cwd, command=shell[0])
    refused(done, "cannot be written", "Free space or choose another --output")


def test_two_runs_do_not_share_an_output(tmp_path: Path, data: Path) -> None:
    quantize = ["quantize", CHECKPOINT, "--dataset", data, "--output", "out"]
    with Running(*quantize, cwd=tmp_path) as first:
        while first.runs() and not (tmp_path / "out.hfq-work" / ".lock").exists():
            time.sleep(0.01)
        refused(forkserver().hfq(*quantize, cwd=tmp_path), "Another hfq is writing out", "Wait for it", code=2)
        assert first.runs()
        assert (tmp_path / "out.hfq-work").is_dir()


# The Hub


@pytest.fixture
def repos(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Somebody else's repositories."""
    if HfApi().repo_exists("stranger/pickled"):
        return
    hub.create_repo("stranger/private", private=True)
    hub.create_repo("stranger/gated", gated=True)
    hub.create_repo("stranger/secrets", "dataset", private=True)
    pickled = copy_checkpoint(tmp_path_factory.mktemp("hub") / "model")
    to_pickle(pickled)
    for name, folder in (("private", CHECKPOINT), ("gated", CHECKPOINT), ("open", CHECKPOINT), ("pickled", pickled)):
        hub.commit_folder(f"stranger/{name}", folder)


NOT_GIVEN: dict[str, tuple[str, ...]] = {
    "stranger/nothing": ("stranger/nothing is not on the Hub, or is private", "Check the name", "./nothing"),
    "stranger/private": ("is not on the Hub, or is private", "pass --token"),
    "stranger/gated": ("stranger/gated is gated", "Ask for access on its page"),
    "stranger/pickled": ("only pickle weights (pytorch_model.bin)", "Convert it once"),
    "stranger/open --revision v9": ("has no revision 'v9'", "Expected a branch, tag or commit"),
    "stranger/open --token hf_bad": ("(401)", "Log in again", "another token"),
    "stranger/open": ("ucirvine/sms_spam is not on the Hub", "--dataset", "--token"),
    "stranger/open --dataset nobody/data": ("nobody/data is not on the Hub", "Name another"),
    "stranger/open --dataset stranger/secrets": ("stranger/secrets is not on the Hub, or is private", "pass --token"),
    "./model --revision main": ("is a folder", "revisions exist on the Hub only"),
}


@pytest.mark.parametrize("arguments", NOT_GIVEN)
def test_says_what_the_hub_does_not_give(arguments: str, tmp_path: Path, hub: LocalHub, repos: None) -> None:
    (tmp_path / "model").symlink_to(CHECKPOINT)
    done = forkserver().hfq("quantize", *arguments.split(), "--output", "out", cwd=tmp_path)
    refused(done, *NOT_GIVEN[arguments], code=2 if re.search("[.]/model|pickled|v9", arguments) else 1)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert not any(".bin" in path for _, path, _ in hub.requests)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_says_that_the_hub_fails(status: int, cwd: Path, hub: LocalHub, repos: None) -> None:
    hub.fail("GET", "/api/models/", status, times=100)
    refused(forkserver().hfq("quantize", "stranger/open", cwd=cwd), f"({status})", "Try again later")


@pytest.mark.parametrize(
    "arguments",
    [["quantize", "me/model"], ["quantize", str(CHECKPOINT), "--dataset", "me/data"]],
    ids=["model", "data"],
)
def test_says_that_there_is_no_network(arguments: list[str], cwd: Path) -> None:
    done = hfq_in({"HF_ENDPOINT": CLOSED}, *arguments, "--output", "out", cwd=cwd)
    refused(done, arguments[-1], "could not be reached", "Check the network")


def test_a_proxy_that_no_client_can_use_is_named(cwd: Path) -> None:
    done = hfq_in({"all_proxy": "socks5://127.0.0.1:9"}, "quantize", "me/model", "--output", "out", cwd=cwd)
    refused(done, "The proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names", "'socksio'", "Mend or unset it", code=2)


@pytest.mark.parametrize("to", [[], ["--to", "hfq-user/mine"]], ids=["own name", "--to"])
@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, ("There is no token", "hf auth login", "--token")),
        ("hf_notvalid", ("the token is not valid", "another token with --token")),
        ("hf_töken", ("HF_TOKEN holds characters", "Copy it again")),
    ],
)
def test_a_push_without_a_good_token_ends_before_the_work_begins(
    token: str | None, says: tuple[str, ...], to: list[str], cwd: Path, data: Path
) -> None:
    done = forkserver().hfq(
        "quantize", CHECKPOINT, "--dataset", data, "--output", "out", "--push", *to, cwd=cwd, env={"HF_TOKEN": token}
    )
    refused(done, *says, code=2 if token == "hf_töken" else 1)
    assert "▸" not in done.err
    assert token is None or token not in done.err


@pytest.mark.parametrize("flag", ["hf_with\nnewline", "hf_b\u00e4d"])
def test_never_shows_a_token_that_cannot_be_sent(flag: str, cwd: Path) -> None:
    done = forkserver().hfq("quantize", "stranger/open", "--token", flag, cwd=cwd)
    refused(done, "--token holds characters", "Copy it again", code=2)
    assert "hf_" not in done.err


def test_refuses_to_push_what_hfq_did_not_write(cwd: Path) -> None:
    refused(
        forkserver().hfq("push", CHECKPOINT, cwd=cwd),
        "has no hfq.json",
        "Expected the output of `hfq quantize`",
        code=2,
    )
