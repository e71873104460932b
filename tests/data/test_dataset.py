"""Datasets in the forms in which people have them: read, or refused with the reason and not with that there is one."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from hfq.common.errors import DataError, UsageError, WrongDataError
from hfq.data.dataset import load_splits

ROWS = [{"text": "NA", "label": 0}, {"text": "0123", "label": 1}]
LINES = "\n".join(map(json.dumps, ROWS))
FILES: dict[str, bytes] = {
    "data.JSON": LINES.encode(),
    "data.ndjson": LINES.encode(),
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "with a mark.jsonl": LINES.encode("utf-8-sig"),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "packed.JSON.GZ": gzip.compress(json.dumps({"rows": ROWS}).encode()),
    "under a name.json": json.dumps({"data": ROWS}).encode(),
    "under a name with others.json": json.dumps({"version": "1", "tags": ["a"], "data": ROWS}, indent=2).encode(),
}


def read(path: Path, split: str = "train") -> list[dict[str, Any]]:
    splits, _ = load_splits(str(path), None, token=None)
    return splits[split].to_list()


@pytest.mark.parametrize("name", FILES)
def test_json_files_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert read(tmp_path / name) == ROWS


DATED = [
    {"text": "2020-01-01", "label": "0123", "seen": ["2020-01-01T10:00:00Z"], "by": {"at": "2021-01-01"}},
    {"text": "2020-02-02", "label": "1e5", "seen": ["2020-01-01 11:00:00+01:00"], "by": {"at": "2021-02-02"}},
]


@pytest.mark.parametrize("content", [DATED, {"data": DATED}, None], ids=["list", "under a name", "lines"])
@pytest.mark.parametrize("indent", [None, 1])
def test_text_in_json_is_as_it_is_written(content: Any, indent: int | None, tmp_path: Path) -> None:
    text = json.dumps(content, indent=indent) if content else "\n".join(map(json.dumps, DATED))
    (tmp_path / "data.json").write_text(text)
    assert read(tmp_path / "data.json") == DATED


def test_text_that_looks_like_dates_only_far_into_a_file_is_as_it_is_written(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "more": "x" * (11 << 20)},
        {"text": "2020-01-01", "more": ""},
    ]  # datasets reads 10 MiB at once
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row["text"] for row in read(tmp_path / "data.jsonl")] == ["a", "2020-01-01"]


def test_a_card_says_what_columns_of_json_are(tmp_path: Path) -> None:
    names = "{'0': '0123', '1': 1e5}"
    features = f"  - name: label\n    dtype:\n      class_label:\n        names: {names}\n"
    features += "".join(f"  - name: {name}\n    dtype: string\n" for name in ("text", "seen"))
    rows = [{**row, "seen": row["by"]["at"], "by": None} for row in DATED]
    lines = [json.dumps({key: value for key, value in row.items() if key != "by"}) for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  features:\n{features}---\n")
    assert [(row["label"], row["seen"]) for row in read(tmp_path)] == [(0, "2021-01-01"), (1, "2021-02-02")]


@pytest.mark.parametrize("name", ["train.json", "train.JSON", "train.jsonl.gz"])
def test_json_files_of_a_folder_are_read(name: str, tmp_path: Path) -> None:
    content = json.dumps({"data": ROWS}).encode()
    for split in ("train", "test"):
        (tmp_path / name.replace("train", split)).write_bytes(gzip.compress(content) if "gz" in name else content)
    assert (read(tmp_path), read(tmp_path, "test")) == (ROWS, ROWS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rows = Dataset.from_list(ROWS)
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_what_save_to_disk_wrote_is_read(saved: Path) -> None:
    assert (read(saved), read(saved, "test")) == (ROWS, ROWS[1:])
    assert read(saved / "test") == ROWS[1:]  # a `Dataset` by itself


def test_what_save_to_disk_wrote_holds_its_own_files_only(saved: Path) -> None:
    state = saved / "train" / "state.json"
    file = saved / "train" / json.loads(state.read_text())["_data_files"][0]["filename"]
    shutil.copy(file, saved.parent / "other.arrow")
    state.write_text(state.read_text().replace(file.name, "../../other.arrow"))
    with pytest.raises(DataError, match=r"names .*other\.arrow as its file, which is not inside of it"):
        read(saved)
    state.unlink()
    with pytest.raises(DataError, match=r"not whole, as `save_to_disk` writes it"):
        read(saved)


def test_numbers_are_as_they_are_written(tmp_path: Path) -> None:
    rows = [
        {"text": ", 12345678901234567890, ", "label": -(2**63), "score": 1e25},
        {"text": "", "label": 0, "score": 2},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "data.jsonl") == rows


LONG = ("does not fit into 64 bits", "as text")
BAD: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "latin.jsonl": ('{"text": "é", "label": 0}'.encode("latin-1"), ("line 1", "not UTF-8", "Latin-1", "iconv")),
    "wide.json": (LINES.encode("utf-16"), ("UTF-16", "iconv -f UTF-16 -t UTF-8")),
    "cut.jsonl": (LINES.encode()[:-3], ("JSON parse error", "Expected a")),
    "texts.jsonl": (b'"a"\n"b"\n', ("Line 1 of", 'is "a"; expected an object in each line')),
    "lists.jsonl": (b'{"text": "a"}\n\n["b"]\n', ("Line 3 of", 'is ["b"]; expected an object in each line')),
    # They would be floats, and different labels the same.
    "long.jsonl": (b'{"text": "a", "label": 5}\n{"text": "b", "label": 12345678901234567890}', LONG),
    "long list.json": (b'[\n{"text": "a", "label": [1, -98765432109876543210]}\n]', LONG),
    "long under a name.json": (b'{"data": [{"text": "a", "by": {"id": 9223372036854775808}}]}', LONG),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_a_json_file(name: str, tmp_path: Path) -> None:
    content, says = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    for words in (name, *says):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({"text": "a", "other": 1}, "column names don't match"),
        ({"text": "a", "label": "x"}, "Failed to parse string: 'x' as a scalar of type int64"),
    ],
    ids=["other columns", "another type"],
)
def test_says_why_the_files_of_a_folder_do_not_fit(rows: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "test.jsonl").write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert reason in str(caught.value)


@pytest.mark.parametrize("cache", ["file/cache", "/proc/nowhere/cache"])  # there no folder can be made
def test_a_cache_that_cannot_be_written_is_named(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "validation.csv").write_text("text,label\na,0\n")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / cache))
    with pytest.raises(DataError, match=r"cache, which cannot be written.*Set HF_HOME"):
        load_splits(str(tmp_path / "validation.csv"), None, token=None)


def test_a_file_and_a_saved_folder_have_no_subsets(saved: Path, tmp_path: Path) -> None:
    (file := tmp_path / "rows.jsonl").write_text(LINES)
    for path in (file, saved):
        with pytest.raises(UsageError, match=r"--subset other was given, but .* has no subsets"):
            load_splits(str(path), "other", token=None)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
@pytest.mark.parametrize("name", ["data[1]", "[dD]ata 1", "d?ta1", "*", "data{1}"])
def test_a_file_is_the_one_of_that_name(name: str, kind: str, tmp_path: Path) -> None:
    """To datasets such a name is a pattern, which others have."""
    for stem, word in (("data1", "other"), ("data 1", "other"), (name, "this")):
        rows = {"csv": f"text,label\n{word},0\n", "jsonl": f'{{"text": "{word}"}}\n', "txt": f"{word}\n"}
        (tmp_path / f"{stem}.{kind}").write_text(rows[kind])
    splits, _ = load_splits(str(tmp_path / f"{name}.{kind}"), None, token=None)
    assert splits["train"]["text"][:] == ["this"]


def test_the_files_of_a_folder_with_brackets_in_its_name_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data [1]", "data 1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.csv").write_text(f"text,label\n{name},0\n")
    splits, _ = load_splits(str(tmp_path / "data [1]"), None, token=None)
    assert splits["test"]["text"][:] == ["data [1]"]
    monkeypatch.chdir(tmp_path / "data [1]")
    for here in (".", "test.csv"):
        splits, _ = load_splits(here, None, token=None)
        assert splits.popitem()[1]["text"][:] == ["data [1]"]
    (tmp_path / "data [1]" / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: test.csv\n---\n")
    with pytest.raises(WrongDataError, match="Rename it"):
        load_splits(str(tmp_path / "data [1]"), None, token=None)
