"""What somebody wrote to do harm: each is refused by one message that names it, in little time and memory.

Every command here may take one GiB more than an idle one, and a minute: what would take terabytes or for ever ends.
"""

import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support.command import CHECKPOINT, DEMO, Done, copy_checkpoint, forkserver, write_slice
from support.factories import make_folder
from support.hostile_hub import HostileHub

from hfq.common.errors import ExportError, HfqError, SourceError
from hfq.common.ui import Reporter
from hfq.data.session import open_session
from hfq.recipe import make_recipe
from hfq.runs.ray_engine import Received, check_received
from hfq.source.checkpoint import pull

Change = Callable[[Path], object]
DEEP = "[" * 100_000 + "]" * 100_000
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
)
WORDS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refused(done: Done, *says: str) -> None:
    """It failed by itself, with one message, which holds each of `says`, and nothing else on standard output."""
    assert done.code in (1, 2), (done.code, done.err[-500:])
    assert done.out == ""
    *progress, message = done.err.splitlines()
    assert all(line.startswith(("▸ ", "  ", "! ")) for line in progress), done.err[-500:]
    assert message.startswith("hfq: ")
    assert "Unexpected" not in message
    assert len(message) < 2000
    for text in says:
        assert text in message


def file(header: object, data: bytes = b"\0" * 8, *, length: int | None = None) -> Change:
    """A safetensors file with any header: JSON, or text as it is."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def config(**values: object) -> Change:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def write(name: str, content: object) -> Change:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / name).write_text(text)


def sparse(name: str, size: int) -> Change:
    """A file that says it is so large, and takes no space here."""

    def make(folder: Path) -> None:
        with (folder / name).open("wb") as stream:
            stream.truncate(size)

    return make


def link(name: str, target: str) -> Change:
    return lambda folder: (folder / name).symlink_to(target)


def index(weight_map: object) -> Change:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        file({"x": WORDS})(folder)
        (folder / "model.safetensors").rename(folder / "b.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return make


def tokenizer(**values: object) -> Change:
    def edit(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def quantized(**values: Any) -> Change:
    return config(quantization_config={"quant_method": "compressed-tensors", **values})


BROKEN = "model.safetensors is not a whole safetensors file"
# By `hfq inspect`, which loads nothing: these are found in the files.
FILES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a header longer than the file": (file({}, length=1 << 40), (BROKEN, "its header should have 1099511627776 bytes")),
    "a header longer than any number": (file({}, length=(1 << 64) - 1), (BROKEN, "18446744073709551615")),
    "a header of 200 MB": (sparse("model.safetensors", 1 << 20), (BROKEN,)),
    "a header that is nested without end": (file(DEEP), (BROKEN, "not a JSON object")),
    "a tensor that is nested without end": (file('{"x": ' + DEEP + "}"), (BROKEN, "nested too deeply")),
    "a header for millions of tensors": (file('{"x": [' + "0," * 2_200_000 + "0]}"), (BROKEN, "131072 tensors")),
    "a tensor twice": (file('{"x": %s, "x": %s}' % ((json.dumps(WORDS),) * 2)), (BROKEN, "one key twice")),
    "tensors that overlap": (file({"x": WORDS, "y": WORDS}), (BROKEN, "'y' begin at 0, and should at 8")),
    "bytes of no tensor": (file({"x": WORDS}, b"\0" * 16), (BROKEN, "have 8 bytes, and the file holds 16")),
    "a tensor outside of the file": (file({"x": {**WORDS, "data_offsets": [8, 16]}}), (BROKEN, "should at 0")),
    "a shape whose product overflows": (
        file({"x": {**WORDS, "shape": [1 << 32, 1 << 32, 2]}}),
        (BROKEN, "'x' of shape", "cannot have 8 bytes"),
    ),
    "a negative shape": (file({"x": {**WORDS, "shape": [-2]}}), (BROKEN, "'x' has a shape that is none")),
    "a shape of fractions": (file({"x": {**WORDS, "shape": [2.0]}}), (BROKEN, "it holds 2.0")),
    "an unknown dtype": (file({"x": {**WORDS, "dtype": "PICKLE"}}), (BROKEN, "unknown dtype 'PICKLE'")),
    "a tensor whose name commands the terminal": (file({"\x1b[2J": WORDS}), (BROKEN, r"'\x1b[2J' is no name")),
    "metadata that is no text": (file({"__metadata__": {"a": []}, "x": WORDS}), (BROKEN, "__metadata__")),
    "an index that leads out of the folder": (index({"x": "../../b.safetensors"}), ("names '../../b.safetensors'",)),
    "an index with an absolute path": (index({"x": "/etc/passwd"}), ("names '/etc/passwd'", "not a safetensors file")),
    "an index that names other tensors": (
        index({"nothing": "b.safetensors"}),
        ("does not fit its shards", "'nothing'"),
    ),
    "an index that is a list": (index(["b.safetensors"]), ("index.json is not an index of shards",)),
    "config.json nested without end": (
        write("config.json", f'{{"a": {DEEP}}}'),
        ("config.json cannot be read", "nested deeper"),
    ),
    "config.json with a number of a million digits": (
        write("config.json", '{"vocab_size": ' + "9" * 1_000_000 + "}"),
        ("config.json cannot be read", "1000000 digits"),
    ),
    "config.json of 4 GB": (sparse("config.json", 4 << 30), ("config.json", "larger than 32 MiB")),
    "tokenizer.json of 4 GB": (sparse("tokenizer.json", 4 << 30), ("tokenizer.json", "larger than 512 MiB")),
    "a vocabulary of 10^12 words": (config(vocab_size=10**12), ("asks for vocab_size 1000000000000",)),
    "10^9 layers": (config(num_hidden_layers=10**9), ("asks for num_hidden_layers 1000000000",)),
    "10^9 labels": (config(id2label=None, num_labels=10**9), ("asks for num_labels 1000000000",)),
    "10^12 hidden units in a part": (config(text_config={"hidden_size": 10**12}), ("asks for hidden_size",)),
    "an attention kernel from the Hub": (
        config(_attn_implementation="kernels-community/flash-attn"),
        ("'kernels-community/flash-attn'", "take the key out"),
    ),
    "an attention kernel from the Hub for a part": (
        config(text_config={"attn_implementation": "mallory/kernel@main:attention"}),
        ("'mallory/kernel@main:attention'",),
    ),
    "weights that another library unpacks": (
        config(quantization_config={"quant_method": "quanto"}),
        ("is quantized by 'quanto'", "compressed-tensors"),
    ),
    "a layer pattern that never ends": (quantized(ignore=["re:(a+)+$"]), ("pattern '(a+)+$'", "for ever")),
    "groups that are no groups": (quantized(config_groups={"a": 1}), ("no transformers config", "config_groups")),
    "an architecture that is no name": (config(architectures={"a": "b"}), ("no transformers config", "architectures")),
    "labels that are no map": (config(id2label=["a", "b"]), ("no transformers config", "id2label")),
    "an adapter of another repository": (
        write("adapter_config.json", {"base_model_name_or_path": "mallory/model"}),
        ("is an adapter", "Merge the two"),
    ),
    "a link to a secret": (
        link("notes.txt", "/etc/passwd"),
        ("notes.txt is a link out of its folder, to /etc/passwd",),
    ),
    "hfq.json nested without end": (write("hfq.json", DEEP), ("hfq.json cannot be read", "nested deeper")),
    "hfq.json that is a list": (write("hfq.json", "[]"), ("hfq.json holds a list",)),
}


@pytest.mark.parametrize("kind", FILES)
def test_refuses_a_checkpoint_with(kind: str, cwd: Path) -> None:
    change, says = FILES[kind]
    checkpoint = copy_checkpoint(cwd.parent / "model")
    change(checkpoint)
    refused(forkserver().hfq("inspect", checkpoint, cwd=cwd, limited=True), *says)


# By `hfq quantize`: these are found when transformers is to act on them.
MODELS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "more words than its weights have": (config(vocab_size=1 << 23), ("config.json of model asks for a model that",)),
    "more layers than its weights have": (config(num_hidden_layers=1 << 20), ("asks for a model that its weights",)),
    "layers as wide as no memory": (config(hidden_size=1 << 24, intermediate_size=1 << 24), ("model",)),
    "an architecture that is a function": (config(architectures=["pipeline"]), ("'pipeline'", "does not know")),
    "an architecture that is a tokenizer": (config(architectures=["BertTokenizer"]), ("does not know",)),
    "a tokenizer that is a model": (
        tokenizer(tokenizer_class="AutoModelForSequenceClassification"), ("tokenizer of model cannot be loaded",)
    ),
    "a tokenizer nested without end": (write("tokenizer.json", DEEP), ("tokenizer of model cannot be loaded",)),
    "code of another repository": (
        config(auto_map={"AutoModelForSequenceClassification": "mallory/code--own.Model"}),
        ("AutoModelForSequenceClassification from mallory/code", "--trust-remote-code"),
    ),
    "a tokenizer with code of its own": (
        tokenizer(auto_map={"AutoTokenizer": ["own.Tokenizer", None]}), ("AutoTokenizer", "--trust-remote-code")
    ),
    "a card that is a bomb": (
        write("README.md", f"---\n{LAUGHS}---\n"), ("No dataset is known for", "datasets (none)")
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_refuses_to_quantize_a_checkpoint_with(kind: str, cwd: Path) -> None:
    change, says = MODELS[kind]
    checkpoint = copy_checkpoint(cwd.parent / "model")
    change(checkpoint)
    data = [] if "card" in kind else ["--dataset", write_slice(cwd.parent / "data", train=20, validation=20)]
    done = forkserver().hfq("quantize", checkpoint, *data, "--output", "out", cwd=cwd, limited=True)
    refused(done, *says)


RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "a billion laughs": (f"checkpoint: x\n{LAUGHS}", ("is not YAML", "aliases written out")),
    "an alias of itself": ("checkpoint: &a [*a]", ("is not YAML", "stands inside what it repeats")),
    "lists without end": (f"checkpoint: {DEEP}", ("is not YAML", "nested deeper")),
    "a Python object": ("checkpoint: !!python/object/apply:os.system [touch owned]", ("is not YAML", "python/object")),
    "a value that its tag denies": ('checkpoint: !!int ""', ("is not YAML", "its tag")),
    "a date that is none": ("checkpoint: 2026-99-99", ("is not YAML", "month")),
    "a path with a null byte": ('checkpoint: "a\\0b"', ("checkpoint holds a character",)),
    "a path as long as no path": (f"checkpoint: ./{'x' * 5000}", ("checkpoint is longer than 4096",)),
    "a name that commands the terminal": ('checkpoint: x\n"\\e[2J": 1', (r"'\x1b[2J' is no key",)),
    "two megabytes": (f"checkpoint: {'x' * (2 << 20)}", ("is not YAML", "larger than 1 MiB")),
    "Jinja": ("checkpoint: './{{ 7 * 7 }}'", ("{{ 7 * 7 }} does not exist",)),
    "a shell command": ("checkpoint: './$(touch owned)'", ("$(touch owned) does not exist",)),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_refuses_a_recipe_with(kind: str, cwd: Path) -> None:
    text, says = RECIPES[kind]
    recipe = cwd.parent / "recipe.yaml"
    recipe.write_text(text)
    refused(forkserver().hfq("run", recipe, cwd=cwd, limited=True), *says)


def card(files: object) -> str:
    settings = {"configs": [{"config_name": "default", "data_files": files}]}
    return f"---\n{json.dumps(settings)}\n---\n"


DATASETS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "a file beside its folder": ({"README.md": card("../secret.csv")}, ("secret.csv", "not inside of it")),
    "a file of this machine": ({"README.md": card(str(DEMO / "data" / "train.csv"))}, ("train.csv", "not inside of it")),
    "a card that is a bomb": ({"README.md": f"---\n{LAUGHS}---\n"}, ("README.md cannot be read", "aliases written out")),
    "a script": ({"data.py": "open('owned', 'w')"}, ("cannot be loaded",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", DATASETS)
def test_refuses_a_dataset_with(kind: str, cwd: Path) -> None:
    files, says = DATASETS[kind]
    (cwd.parent / "secret.csv").write_text("text,label\na,0\nb,1\n")
    data = cwd.parent / "data"
    data.mkdir()
    for name, text in files.items():
        (data / name).write_text(text)
    done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", data, "--output", "out", cwd=cwd, limited=True)
    refused(done, *says)


def test_a_dataset_may_be_named_by_any_way_to_it(cwd: Path) -> None:
    """A card names files inside; the folder is reached by '..' and by a link."""
    data = write_slice(cwd.parent / "data", train=20, validation=20)
    (data / "README.md").write_text(card([{"split": name, "path": f"{name}.csv"} for name in ("train", "validation")]))
    (cwd.parent / "link").symlink_to(data)
    for way in ("../data", "../cwd/../link"):
        done = forkserver().hfq("quantize", CHECKPOINT, "--dataset", way, "--split", "nope", cwd=cwd)
        refused(done, "--split 'nope'", "Splits: train, validation")


def test_refuses_to_publish_what_a_link_points_to(cwd: Path) -> None:
    folder = make_folder(cwd.parent / "model-int8")
    (folder / "notes.txt").symlink_to("/etc/passwd")
    done = forkserver().hfq("push", folder, "--to", "hfq-user/stolen", cwd=cwd, limited=True)
    refused(done, "notes.txt is a link out of its folder, to /etc/passwd")


ESCAPES = ("../../evil.json", "/tmp/evil.json", "..\\..\\evil.json", "evil\0.json", "C:evil.json", "e" * 300 + ".json")


@pytest.mark.parametrize("shown", ["always", "later"])
@pytest.mark.parametrize("name", ESCAPES, ids=lambda name: ascii(name)[:20])
def test_a_file_of_the_hub_cannot_leave_its_folder(
    name: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub that lists such a file openly, and one that shows it only to the client that downloads."""
    files = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
    home = tmp_path / "a" / "b" / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    with HostileHub(files, listed=[name] if shown == "always" else [], hidden=[name]) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        if shown == "always":
            with pytest.raises(SourceError, match=r"lists a file called .*(evil|eeee)"):
                pull("mallory/model")
        else:
            with suppress(SourceError):  # the client leaves it out, or ends
                pull("mallory/model")
            assert "/" not in name or list(home.rglob("config.json"))  # what is in no folder was downloaded
    outside = [path for path in tmp_path.rglob("*") if not path.is_relative_to(home) and path.is_file()]
    assert outside == []
    assert not Path("/tmp/evil.json").exists()
    assert not list(home.rglob("*evil*"))


def test_a_commit_of_the_hub_cannot_be_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    with HostileHub({}, sha="../../../owned") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        with pytest.raises(SourceError, match="no commit"):
            pull("mallory/model")


@pytest.mark.parametrize("told", [{"listed": ["{precious}"]}, {"sha": "../../../.."}])
def test_a_dataset_of_the_hub_cannot_reach_files_of_this_machine(
    told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not as the Hub lists it is taken for damaged, and deleted in the cache: but nowhere else."""
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    recipe = make_recipe({"checkpoint": str(CHECKPOINT), "dataset": "mallory/model"})
    listed = [name.format(precious=precious) for name in told.get("listed", [])]
    with HostileHub({}, **{**told, "listed": listed}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        with pytest.raises(HfqError, match=r"lists a file called|no commit"):
            open_session(recipe, recipes=tmp_path, ui=Reporter(), token=None)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil.json", "plots/../../evil.json"])
def test_a_worker_of_a_cluster_cannot_write_outside_of_the_export(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="leads out of"):
        Received(tmp_path / "export").file(name)
    assert list(tmp_path.iterdir()) == []
    assert not Path("/tmp/evil.json").exists()


def test_what_a_worker_of_a_cluster_made_is_read_as_a_strangers(tmp_path: Path) -> None:
    export = make_folder(tmp_path / "export", weights=b"no header")
    recipe = make_recipe({"checkpoint": str(CHECKPOINT)})
    with pytest.raises(SourceError, match="not a whole safetensors file"):
        check_received(export, recipe)


def test_a_snapshot_of_the_hub_may_be_made_of_links(tmp_path: Path) -> None:
    """As the Hub's client keeps one: every file is a link to a blob beside the snapshots."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in CHECKPOINT.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    assert pull(str(snapshot)).config["model_type"] == "bert"


def test_the_flag_is_recorded_and_whether_there_was_code_to_run(tmp_path: Path) -> None:
    model = copy_checkpoint(tmp_path / "model")
    infos = [pull(str(model)).info, pull(str(model), trust_remote_code=True).info]
    tokenizer(auto_map={"AutoTokenizer": ["own.Tokenizer", None]})(model)
    infos.append(pull(str(model), trust_remote_code=True).info)
    assert [(info.remote_code_allowed, info.remote_code) for info in infos] == [
        (False, False),
        (True, False),
        (True, True),
    ]
