"""Retrieval data in the BEIR layout: `corpus.jsonl`, `queries.jsonl`, and `qrels`, which say what is relevant to what.

Thakur et al. 2021, https://github.com/beir-cellar/beir. A row is one text, a document or a query. Each file of qrels is
a split, of all documents and its own queries; the split `corpus`, of documents alone, is there to calibrate on.
"""

import gzip
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import DataError
from ..common.reading import parse_json

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

CORPUS = "corpus"  # also the name of the split of documents alone
QUERIES = "queries"
QRELS = "qrels"
_TEXTS = (".jsonl", ".jsonl.gz")
_TABLES = (".tsv", ".txt", ".tsv.gz", ".trec", ".qrels", "")
_ONLY_SPLIT = "test"

Relevance = dict[str, dict[str, float]]  # by query, by document: how relevant


def is_beir(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return all(_file(folder, name, _TEXTS) for name in (CORPUS, QUERIES))


def load_beir(folder: Path) -> "DatasetDict":
    """Splits of rows `document_id`, `query_id`, of which one is None, `text`, and `relevant` of queries: what to find.

    Raises:
        DataError: a file is missing, empty or damaged, or qrels name a text that is not there.
    """
    import datasets

    documents = _read_texts(folder, CORPUS)
    queries = _read_texts(folder, QUERIES)
    qrels = {split: _read_qrels(path) for split, path in _qrels(folder).items()}
    for split, relevance in qrels.items():
        _check(relevance, documents, queries, where=f"{QRELS} of split {split!r} in {folder}")
    corpus = _dataset([{"document_id": key, "query_id": None, "text": text} for key, text in documents.items()])
    splits = {CORPUS: corpus}
    for split, relevance in qrels.items():
        asked = queries if len(qrels) == 1 else {key: queries[key] for key in relevance}
        rows = [
            {"document_id": None, "query_id": key, "text": text, "relevant": _judged(relevance.get(key, {}))}
            for key, text in asked.items()
        ]
        splits[split] = datasets.concatenate_datasets([corpus, _dataset(rows)])
    return datasets.DatasetDict(splits)


def _dataset(rows: Sequence[Mapping[str, Any]]) -> "Dataset":
    import datasets

    judged = [{"document_id": datasets.Value("string"), "score": datasets.Value("float64")}]
    texts = dict.fromkeys(("document_id", "query_id", "text"), datasets.Value("string"))
    return datasets.Dataset.from_list(
        [{"relevant": None, **row} for row in rows], features=datasets.Features({**texts, "relevant": judged})
    )


def _judged(relevance: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"document_id": key, "score": score} for key, score in relevance.items() if score > 0]


def _file(folder: Path, name: str, suffixes: Sequence[str]) -> Path | None:
    return next((path for suffix in suffixes if (path := folder / f"{name}{suffix}").is_file()), None)


def _qrels(folder: Path) -> dict[str, Path]:
    """Files of qrels by split: those in a folder of that name, else the only one."""
    inside = sorted(path for path in (folder / QRELS).glob("*") if path.is_file() and not path.name.startswith("."))
    if inside:
        return {path.name.split(".")[0]: path for path in inside}
    single = _file(folder, QRELS, _TABLES)
    if single is None:
        raise DataError(
            f"Dataset {folder} has {CORPUS} and {QUERIES}, but no {QRELS}, which say what is relevant. Expected "
            f"{QRELS}.tsv or {QRELS}/test.tsv, with a query's id, a document's id and a score in each line."
        )
    return {_ONLY_SPLIT: single}


def _read_texts(folder: Path, name: str) -> dict[str, str]:
    """Texts by id; a title stands before its document, unless that begins with it."""
    path = _file(folder, name, _TEXTS)
    assert path is not None  # is_beir
    found: dict[str, str] = {}
    for number, line in _lines(path):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"Line {number} of {path} is not JSON ({error}). Mend or remove it.") from error
        key, text = (row.get("_id"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(key, str | int) or not isinstance(text, str):
            raise DataError(f'Line {number} of {path} is {line[:100]!r}; expected {{"_id": …, "text": …}}.')
        if str(key) in found:
            raise DataError(f"Line {number} of {path} has the id {key!r} a second time. Remove one of the two.")
        title = row.get("title")
        titled = isinstance(title, str) and not text.startswith(title)
        found[str(key)] = f"{title} {text}".strip() if titled else text
    if not found:
        raise DataError(f"{path} holds no text, so that there is nothing to find.")
    return found


def _read_qrels(path: Path) -> Relevance:
    """Tab-separated `query-id corpus-id score`, with or without that line, or TREC's `query 0 document score`."""
    found: Relevance = {}
    for number, line in _lines(path):
        cells = [cell.strip() for cell in (line.split("\t") if "\t" in line else line.split())]
        score = _number(cells[-1])
        if score is None and number == 1:
            continue
        if len(cells) not in (3, 4) or score is None:
            raise DataError(
                f"Line {number} of {path} is {line[:100]!r}; expected a query's id, a document's id and a number, with tabs "
                "between them."
            )
        found.setdefault(cells[0], {})[cells[-2]] = score
    if not found:
        raise DataError(f"{path} says of no document that it is relevant.")
    return found


def _check(relevance: Relevance, documents: Mapping[str, str], queries: Mapping[str, str], *, where: str) -> None:
    named = [key for found in relevance.values() for key in found]
    missing = {
        CORPUS: [key for key in dict.fromkeys(named) if key not in documents],
        QUERIES: [key for key in relevance if key not in queries],
    }
    for name, keys in missing.items():
        if keys:
            raise DataError(
                f"{where}: {len(keys)} of the ids are not in {name} (the first: {', '.join(keys[:3])}). Take {CORPUS}, "
                f"{QUERIES} and {QRELS} from the same data."
            )
    if not any(score > 0 for found in relevance.values() for score in found.values()):
        raise DataError(f"{where}: no score is above 0, so that no document is relevant to any query.")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that hold something, with their numbers, from 1."""
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig") as file
        ):
            yield from ((number, line.rstrip("\r\n")) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Expected UTF-8.") from error
