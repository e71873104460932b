"""`HFQ_SHARE=1`: processes map the packed weights that the first of them wrote, and answer as without."""

import copy
import gc
import os
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import int8_linears, logits, make_space, tiny, token_batches
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import hfq
from hfq.export.checkpoint import export
from hfq.ptq.convert import quantize_model
from hfq.runtime.compiling.skeleton import take_apart
from hfq.runtime.int8.packed import pack_all, unpack_all
from hfq.runtime.kernels.selection import select_kernel
from hfq.source.checkpoint import pull
from hfq.tuning.candidates import Candidate

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.skipif(sys.platform != "linux", reason="files are mapped by way of /proc"),
    pytest.mark.skipif(select_kernel().name != "onednn", reason="kernels of CPUs without VNNI share nothing"),
]
BATCHES = token_batches(2)
WEIGHTS = 10  # what 13 layers are packed as: two, and three, that read the same input, as one

CHILD = """
import shutil, sys
import hfq, torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
with torch.inference_mode():
    answers = [model(input_ids=ids, attention_mask=ids.ne(0).long()).logits for ids in load_file("ids").values()]
save_file({"logits": torch.cat(answers)}, "logits")
shutil.copy("/proc/self/smaps", "smaps")
"""


@dataclass(frozen=True)
class Exported:
    """A folder with static and dynamic layers, and what the model in it is without sharing."""

    folder: Path
    answers: Tensor
    state: dict[str, Tensor]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    work = tmp_path_factory.mktemp("sharing")
    model = tiny()
    model.save_pretrained(work / "float")
    dynamic = ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense")
    plan = make_space(model, BATCHES).plan(Candidate("static", dynamic_layers=dynamic))
    export(quantize_model(model, plan, ()), plan, pull(str(work / "float")), folder=work / "int8")
    loaded = hfq.load(work / "int8")
    return Exported(work / "int8", logits(loaded, BATCHES), loaded.state_dict())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packed weights are to be shared, not made yet."""
    monkeypatch.setenv("HFQ_SHARE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hfq" / "packed"


def mapped(folder: Path, smaps: Path = Path("/proc/self/smaps")) -> dict[str, int]:
    """The files of `folder` that a process has mapped read-only, and how many bytes of each mapping are its own."""
    found = {}
    for text in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read_text()):
        if match := re.search(rf"^\S+ r--p .* {re.escape(str(folder))}/(\S+)", text):
            own = re.search(r"^Anonymous: +(\d+) kB", text, re.MULTILINE)
            found[match[1]] = int(own[1]) << 10 if own else -1
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_second_process_maps_what_the_first_wrote_and_answers_alike(
    exported: Exported, folder: Path, tmp_path: Path
) -> None:
    first = hfq.load(exported.folder)
    files = {path: path.stat() for path in folder.iterdir()}
    assert len(files) == WEIGHTS
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert torch.equal(logits(first, BATCHES), exported.answers)
    assert mapped(folder) == {path.name: 0 for path in files}, "the first process has no copy of its own"

    save_file({str(number): batch["input_ids"] for number, batch in enumerate(BATCHES)}, tmp_path / "ids")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, exported.folder],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        check=True,
    )
    assert mapped(folder, tmp_path / "smaps") == {path.name: 0 for path in files}
    assert torch.equal(load_file(tmp_path / "logits")["logits"], exported.answers)
    assert {path: path.stat() for path in folder.iterdir()} == files, "it wrote nothing"


def test_shared_weights_are_kept_copied_and_given_back_as_others(exported: Exported, folder: Path) -> None:
    hfq.load(exported.folder)
    model = hfq.load(exported.folder)
    state = model.state_dict()
    assert state.keys() == exported.state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in exported.state.items())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, BATCHES), exported.answers)
    unpack_all(model)
    assert torch.equal(logits(model, BATCHES), exported.answers)
    zeros = {f"{name}.weight": torch.zeros_like(layer.weight) for name, layer in int8_linears(model).items()}
    model.load_state_dict({**state, **zeros})
    assert len(set(logits(model, BATCHES)[:, 0].tolist())) == 1
    model.load_state_dict(state)
    assert torch.equal(logits(model, BATCHES), exported.answers)


def test_file_stays_mapped_as_long_as_a_model_or_what_was_compiled_of_it_reads_it(
    exported: Exported, folder: Path
) -> None:
    gc.collect()
    assert not mapped(folder)
    model = hfq.load(exported.folder)
    parts = take_apart(model)  # what a compiled graph holds
    assert parts
    before = mapped(folder)
    unpack_all(model)
    gc.collect()
    assert mapped(folder) == before
    del parts
    gc.collect()
    assert not mapped(folder)
    pack_all(model)
    assert mapped(folder) == before
    del model
    gc.collect()
    assert not mapped(folder)


def flip(position: int) -> Callable[[bytes], bytes]:
    def flipped(content: bytes) -> bytes:
        return content[:position] + bytes([content[position] ^ 1]) + content[position:][1:]

    return flipped


@pytest.mark.parametrize(
    "damage",
    [flip(0), flip(5), flip(100), flip(5000), lambda x: x[:-1], lambda x: x[:5000], lambda x: x[:7], lambda x: b""],
    ids=["checksum", "length", "descriptor", "weight", "cut", "cut more", "no head", "empty"],
)
def test_damaged_file_is_replaced(exported: Exported, folder: Path, damage: Callable[[bytes], bytes]) -> None:
    first = hfq.load(exported.folder)
    before = contents(folder)
    for name, content in before.items():
        (folder / name).unlink()  # it is mapped
        (folder / name).touch(0o600)
        (folder / name).write_bytes(damage(content))
    assert torch.equal(logits(hfq.load(exported.folder), BATCHES), exported.answers)
    assert contents(folder) == before
    assert torch.equal(logits(first, BATCHES), exported.answers)


def test_file_under_the_name_of_another_is_replaced(exported: Exported, folder: Path) -> None:
    hfq.load(exported.folder)
    before = contents(folder)
    names = sorted(before)
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        (folder / name).unlink()
        (folder / name).touch(0o600)
        (folder / name).write_bytes(before[other])
    assert torch.equal(logits(hfq.load(exported.folder), BATCHES), exported.answers)
    assert contents(folder) == before


def test_file_that_others_may_write_is_replaced(exported: Exported, folder: Path) -> None:
    first = hfq.load(exported.folder)  # whose files are still there, if nameless: their numbers are not used again
    written = {path: path.stat().st_ino for path in folder.iterdir()}
    for path in written:
        path.chmod(0o620)
    for model in (hfq.load(exported.folder), first):
        assert torch.equal(logits(model, BATCHES), exported.answers)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert not {path.stat().st_ino for path in folder.iterdir()} & set(written.values())


def in_place_of_a_folder(folder: Path) -> None:
    folder.parent.parent.write_text("")


def open_to_others(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o770)


def elsewhere(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    (folder.parent / "other").mkdir(mode=0o700)
    folder.symlink_to("other")


@pytest.mark.parametrize("spoil", [in_place_of_a_folder, open_to_others, elsewhere])
def test_folder_that_cannot_be_trusted_or_made_is_not_used(
    exported: Exported, folder: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(folder)
    assert torch.equal(logits(hfq.load(exported.folder), BATCHES), exported.answers)
    assert not folder.is_dir() or not contents(folder)
    assert not mapped(folder)


def test_full_disk_leaves_nothing_half_written(exported: Exported, folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        model = hfq.load(exported.folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(logits(model, BATCHES), exported.answers)
    assert contents(folder) == {}


def without(monkeypatch: pytest.MonkeyPatch, exported: Exported) -> Any:
    monkeypatch.delenv("HFQ_SHARE")
    return hfq.load(exported.folder)


def read_into_memory(monkeypatch: pytest.MonkeyPatch, exported: Exported) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(exported.folder, disable_mmap=True)


@pytest.mark.parametrize("load", [without, read_into_memory])
def test_nothing_is_written_that_nobody_asked_to_share(
    exported: Exported, folder: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]
) -> None:
    assert torch.equal(logits(load(monkeypatch, exported), BATCHES), exported.answers)
    assert not folder.exists()


def test_process_with_another_number_of_threads_has_files_of_its_own(exported: Exported, folder: Path) -> None:
    hfq.load(exported.folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        model = hfq.load(exported.folder)
    finally:
        torch.set_num_threads(threads)
    assert len(contents(folder)) == 2 * WEIGHTS
    assert len(mapped(folder)) >= WEIGHTS
    assert torch.equal(logits(model, BATCHES), exported.answers)


def test_candidates_of_a_search_are_not_written(folder: Path) -> None:
    model = tiny()
    space = make_space(model, BATCHES)
    logits(quantize_model(model, space.plan(Candidate("static")), space.folds), BATCHES)
    assert not folder.exists()
