"""CSV and its kin: every row is read, every cell as it is written; or one message that names the line."""

import gzip
from pathlib import Path

import pytest
from support.command import CHECKPOINT

from hfq.common.errors import DataError
from hfq.data.dataset import load_splits
from hfq.data.examples import load_task_data
from hfq.hub.local import LocalHub
from hfq.recipe import Recipe
from hfq.source.checkpoint import pull
from hfq.tasks.text.text_classification import TextClassification

Rows = list[tuple[str | None, ...]]


def read(path: Path, split: str = "train") -> Rows:
    splits, _ = load_splits(str(path), None, token=None)
    return [tuple(row.values()) for row in splits[split].to_list()]


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


LONE_MARKS = {
    "at the start": ['"so it goes', "fine", '"and on'],
    "at the end": ['a 5 inch disk 5"', "fine"],
    "at the start, then at an end": ['"so it goes', "fine", 'and on"'],
    "alone": ['"', "fine", '""', '"'],
    "around a part": ['"Yes," he said', "fine", 'the "best" of all', '"No" she said'],
    "of many rows": ['"' * (i % 3 == 0) + f"text {i}" + '"' * (i % 7 == 0) for i in range(60)],
}


@pytest.mark.parametrize("separator", ["\t", ";", "|"])
@pytest.mark.parametrize("kind", LONE_MARKS)
def test_lone_quotation_marks_are_part_of_the_text(kind: str, separator: str, tmp_path: Path) -> None:
    rows = [(text, str(i % 2)) for i, text in enumerate(LONE_MARKS[kind])]
    lines = "".join(f"{separator.join(row)}\n" for row in [("text", "label"), *rows])
    file = written(tmp_path / "data.tsv", lines)
    try:
        found = read(file)
    except DataError as error:  # two readings fit, and only a tab is never inside of a text
        assert kind in ("at the start, then at an end", "alone")
        assert separator != "\t"
        assert "line 2" in str(error)
    else:
        assert found == rows


QUOTED = {
    "line breaks": (
        'text,label\n"one\ntwo",0\n"three\r\n\r\nfour",1\n',
        [("one\ntwo", "0"), ("three\r\n\r\nfour", "1")],
    ),
    "separators": ('text,label\n"one, two",0\n"a,b,c",1\n', [("one, two", "0"), ("a,b,c", "1")]),
    "both": ('text,label\n"Dear all, hi\nBye",0\nplain,1\n', [("Dear all, hi\nBye", "0"), ("plain", "1")]),
    "marks": ('text,label\n"say ""hi""",0\n5" disk,1\n', [('say "hi"', "0"), ('5" disk', "1")]),
    "everything": ('"text","label"\n"a","0"\n"b\n,c,""d""","1"\n', [("a", "0"), ('b\n,c,"d"', "1")]),
    "tabs": ('text\tlabel\n"a\tb"\t0\n"c\nd"\t1\n', [("a\tb", "0"), ("c\nd", "1")]),
}


@pytest.mark.parametrize("kind", QUOTED)
def test_quotation_marks_enclose_cells(kind: str, tmp_path: Path) -> None:
    text, rows = QUOTED[kind]
    assert read(written(tmp_path / "data.csv", text)) == rows


WORDS = ["null", "NA", "None", "n/a", "NaN", "nan", "N/A", "#N/A", "True", "FALSE", "0123", "1e5", "1.50", "-1", " x "]


@pytest.mark.parametrize("name", ["data.csv", "folder", "hub"])
def test_cells_are_read_as_they_are_written(name: str, tmp_path: Path, hub: LocalHub) -> None:
    rows: Rows = [(word, word) for word in WORDS]
    text = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder / "train.csv", text)
    written(folder / "validation.csv", text)
    if name == "hub":
        hub.commit_folder("me/words", folder, repo_type="dataset")
        splits, revision = load_splits("me/words", None, token=None)
        assert revision
        assert [tuple(row.values()) for row in splits["validation"].to_list()] == rows
    elif name == "folder":
        assert read(folder, "validation") == rows
    else:
        assert read(written(tmp_path / name, text)) == rows


def test_one_missing_label_changes_no_other(tmp_path: Path) -> None:
    assert read(written(tmp_path / "data.csv", "text,label\na,0\nb,\n,1\n")) == [("a", "0"), ("b", None), (None, "1")]


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "DATA.CSV"])
@pytest.mark.parametrize(("encoding", "end"), [("utf-8", "\r\n"), ("utf-8-sig", "\n"), ("utf-16", "\r\n")])
def test_separator_line_ends_and_encoding_are_found(
    separator: str, name: str, encoding: str, end: str, tmp_path: Path
) -> None:
    text = end.join(separator.join(row) for row in [("text", "label"), ("é. ä", "0"), ("ß", "1")]) + end * 2
    assert read(written(tmp_path / name, text, encoding)) == [("é. ä", "0"), ("ß", "1")]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "data.csv.gz"
    file.write_bytes(gzip.compress(b"text;label\nNA;0\n"))
    assert read(file) == [("NA", "0")]


def test_a_column_that_a_split_lacks_is_empty_there(tmp_path: Path) -> None:
    written(tmp_path / "train.csv", "text,label\na,0\n")
    written(tmp_path / "test.csv", "text\nb\n")
    assert read(tmp_path, "test") == [("b", None)]


def test_the_card_says_what_columns_are(tmp_path: Path) -> None:
    card = "---\ndataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names: {}\n---\n"
    written(tmp_path / "train.csv", "text,label\nNA,spam\nb,0\nc,\n")
    written(tmp_path / "README.md", card.format("{'0': ham, '1': spam}"))
    assert read(tmp_path) == [("NA", 1), ("b", 0), ("c", None)]
    written(tmp_path / "README.md", card.format("{'0': ham, '1': eggs}"))
    with pytest.raises(DataError, match=r"Column 'label' of split 'train' is not what .*declares.*spam.*Mend"):
        read(tmp_path)


def test_the_files_of_a_folder_may_have_names_in_upper_case_and_several_separators(tmp_path: Path) -> None:
    written(tmp_path / "TRAIN.CSV", "text,label\nNA,0\n")
    written(tmp_path / "Validation.TSV", "text\tlabel\nNone\t1\n")
    assert (read(tmp_path), read(tmp_path, "validation")) == ([("NA", "0")], [("None", "1")])


BAD = {
    "more cells": ("text,label\na,0\nb,1,2\n", ("line 3", "expected 2", "saw 3")),
    "fewer cells": ("text,label\n\na,0\nb\n", ("line 4", "expected 2", "saw 1")),
    "fewer cells after a line break": ('text,label\n"a\nb",0\nc\n', ("line 4", "saw 1")),
    "a mark too many": ('text,label\n"a, b",0\n"c,1\n"d, e",0\n', ("line 3", "quotation mark", "twice")),
    "a mark that is not closed": ('text,label\n"a ""b""",0\n"c,1\nd,0\n', ("line 3", "quotation mark")),
    "escaped marks": ('text,label\n"a \\"b\\"",0\nc,1\n', ("line 2", "quotation mark", "twice")),
    "two readings": ('text,label\n"a,0\nb",1\n', ("line 2", "part of the text")),
    "no names": ("good,1\nbad,0\n", ("first line", "'good', '1'", "text,label")),
    "a name twice": ("text,text\na,0\n", ("'text'", "first line")),
    "nothing": ("", ("empty",)),
    "zero bytes": ("text,label\n\0a,0\n", ("UTF-16", "line 2", "iconv")),
}


@pytest.mark.parametrize("kind", BAD)
def test_refuses_a_file(kind: str, tmp_path: Path) -> None:
    text, says = BAD[kind]
    file = written(tmp_path / "data.csv", text)
    with pytest.raises(DataError) as caught:
        read(file)
    for words in (str(file), *says):
        assert words in str(caught.value)


def test_names_the_encoding(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 2 is not UTF-8 \(byte 0xe9\); Latin-1.*iconv"):
        read(written(tmp_path / "data.csv", "text,label\ncafé,0\n", "latin-1"))


LABELS = {
    "ids": (["ham", "spam"], "text,label\na,0\nNA,1\n", [0, 1]),
    "ids that were floats": (["ham", "spam"], "text,label\na,0.0\nNA,1.0\n", [0, 1]),
    "true and false": (["false", "true"], "text,label\na,True\nnull,False\n", [1, 0]),
    "words for nothing": (["NA", "None"], "text,label\na,None\nb,NA\n", [1, 0]),
    "codes": (["0123", "123"], "text,label\na,123\nb,0123\n", [1, 0]),
    "numbers beside the text": (["ham", "spam"], "id,text,ok,label\n007,a,True,1\n8,b,False,0\n", [1, 0]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_a_table_become_the_models_ids(kind: str, tmp_path: Path) -> None:
    names, text, expected = LABELS[kind]
    file = written(tmp_path / "data.csv", text)
    checkpoint = pull(str(CHECKPOINT))
    task = TextClassification({"id2label": dict(enumerate(names))})
    recipe = Recipe(checkpoint=str(CHECKPOINT), dataset=str(file))
    data = load_task_data(checkpoint, recipe, task=task, recipes=tmp_path, token=None)
    assert data.info.columns["text"] == ["text"]
    assert data.evaluation.references == expected
