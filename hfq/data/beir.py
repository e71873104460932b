"""Retrieval data in the BEIR layout: `corpus.jsonl`, `queries.jsonl`, and `qrels`, which say what is relevant to what.

Thakur et al. 2021, https://github.com/beir-cellar/beir. A row is one text, a document or a query. Each file of qrels is
a split, of all documents and its own queries; the split `corpus`, of documents alone, is there to calibrate on.
`candidates.tsv`, a query's id and a document's in each line, or a run as TREC has it, says what a reranker is to rank.
"""

import gzip
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import DataError
from ..common.reading import parse_json

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

CORPUS = "corpus"  # also the name of the split of documents alone
QUERIES = "queries"
QRELS = "qrels"
CANDIDATES = "candidates"
_TEXTS = (".jsonl", ".jsonl.gz")
_TABLES = (".tsv", ".jsonl", ".txt", ".tsv.gz", ".trec", ".qrels", "")
_COLUMNS = ("query-id", "corpus-id", "score")
_ONLY_SPLIT = "test"
_OF_RUN = 6  # columns of a TREC run: query, Q0, document, rank, score, name

Relevance = dict[str, dict[str, float]]  # by query, by document: how relevant


def is_beir(folder: Path) -> bool:
    """Whether a folder has this layout, or two thirds of it."""
    there = [_file(folder, CORPUS, _TEXTS), _file(folder, QUERIES, _TEXTS), _qrels(folder)]
    return sum(map(bool, there)) > 1


def load_beir(folder: Path) -> "DatasetDict":
    """Splits of rows `document_id`, `query_id`, of which one is None, `text`, and of queries `relevant`, what to find, and
    `candidates`, if any.

    Raises:
        DataError: a file is missing, empty or damaged, or qrels name a text that is not there.
    """
    documents, queries = (_read_texts(folder, name) for name in (CORPUS, QUERIES))
    qrels = {split: _read_qrels(path) for split, path in _qrels(folder).items()}
    if not qrels:
        raise DataError(
            f"Dataset {folder} has {CORPUS} and {QUERIES}, but no {QRELS}, which say what is relevant. Expected "
            f"{QRELS}.tsv or {QRELS}/test.tsv, with a query's id, a document's id and a score in each line."
        )
    return _joined(documents, queries, qrels, candidates=_read_candidates(folder), where=str(folder))


def is_qrels(splits: "DatasetDict") -> bool:
    """Whether these are the qrels of a dataset whose texts are in others of its subsets, as MTEB publishes them."""
    return all(set(_COLUMNS) <= set(rows.features) for rows in splits.values())


def join_beir(qrels: "DatasetDict", load: "Callable[[str], DatasetDict]", *, name: str) -> "DatasetDict":
    """The same of a dataset's subsets, of which `load` gives each by its name.

    Raises:
        DataError: as `load_beir`.
    """
    found = {}
    for subset in (CORPUS, QUERIES):
        rows = [(str(number), row) for part in load(subset).values() for number, row in enumerate(part)]
        found[subset] = _texts(rows, where=f"Row {{}} (from 0) of {subset} in {name}", source=f"{subset} in {name}")
    judged: dict[str, Relevance] = {}
    for split, rows in qrels.items():
        for query, document, score in zip(*(rows[column] for column in _COLUMNS), strict=True):
            judged.setdefault(str(split), {}).setdefault(str(query), {})[str(document)] = float(score)
    return _joined(found[CORPUS], found[QUERIES], judged, candidates={}, where=name)


def _joined(
    documents: Mapping[str, str],
    queries: Mapping[str, str],
    qrels: Mapping[str, Relevance],
    *,
    candidates: Mapping[str, list[str]],
    where: str,
) -> "DatasetDict":
    import datasets

    for split, relevance in qrels.items():
        _check(relevance, documents, queries, where=f"{QRELS} of split {split!r} in {where}")
    ranked = {key: dict.fromkeys(found, 1.0) for key, found in candidates.items()}
    _check(ranked, documents, queries, where=f"{CANDIDATES} in {where}")
    corpus = _dataset([{"document_id": key, "query_id": None, "text": text} for key, text in documents.items()])
    splits = {CORPUS: corpus}
    for split, relevance in qrels.items():
        asked = queries if len(qrels) == 1 else {key: queries[key] for key in relevance}
        rows = [
            {
                "document_id": None,
                "query_id": key,
                "text": text,
                "relevant": _judged(relevance.get(key, {})),
                "candidates": candidates.get(key),
            }
            for key, text in asked.items()
        ]
        splits[split] = datasets.concatenate_datasets([corpus, _dataset(rows)])
    return datasets.DatasetDict(splits)


def _dataset(rows: Sequence[Mapping[str, Any]]) -> "Dataset":
    import datasets

    judged = [{"document_id": datasets.Value("string"), "score": datasets.Value("float64")}]
    texts = dict.fromkeys(("document_id", "query_id", "text"), datasets.Value("string"))
    lists = {"relevant": judged, "candidates": [datasets.Value("string")]}
    return datasets.Dataset.from_list(
        [{**dict.fromkeys(lists), **row} for row in rows], features=datasets.Features({**texts, **lists})
    )


def _judged(relevance: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"document_id": key, "score": score} for key, score in relevance.items() if score > 0]


def _file(folder: Path, name: str, suffixes: Sequence[str]) -> Path | None:
    return next((path for suffix in suffixes if (path := folder / f"{name}{suffix}").is_file()), None)


def _qrels(folder: Path) -> dict[str, Path]:
    """Files of qrels by split: those in a folder of that name, else the only one, if there is one."""
    inside = sorted(path for path in (folder / QRELS).glob("*") if path.is_file() and not path.name.startswith("."))
    if inside:
        return {path.name.split(".")[0]: path for path in inside}
    single = _file(folder, QRELS, _TABLES)
    return {_ONLY_SPLIT: single} if single else {}


def _read_texts(folder: Path, name: str) -> dict[str, str]:
    """Texts by id; a title stands before its document, unless that begins with it."""
    path = _file(folder, name, _TEXTS)
    if path is None:
        raise DataError(
            f"Dataset {folder} has {QUERIES if name == CORPUS else CORPUS} and {QRELS}, but no {name}. Expected {name}.jsonl, "
            'with {"_id": …, "text": …} in each line.'
        )
    return _texts(_parsed(path), where=f"Line {{}} of {path}", source=str(path))


def _texts(rows: Iterable[tuple[str, Any]], *, where: str, source: str) -> dict[str, str]:
    """`rows`: numbered. `where`: one of them in messages, `{}` standing for its number; `source`: all of them."""
    found: dict[str, str] = {}
    for number, row in rows:
        key, text = (row.get("_id", row.get("id")), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(key, str | int) or not isinstance(text, str):
            raise DataError(f'{where.format(number)} is {str(row)[:100]}; expected {{"_id": …, "text": …}}.')
        if str(key) in found:
            raise DataError(f"{where.format(number)} has the id {key!r} a second time. Remove one of the two.")
        title = row.get("title")
        titled = isinstance(title, str) and not text.startswith(title)
        found[str(key)] = f"{title} {text}".strip() if titled else text
    if not found:
        raise DataError(f"{source} holds no text, so that there is nothing to find.")
    return found


def _parsed(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        try:
            yield str(number), parse_json(line)
        except ValueError as error:
            raise DataError(f"Line {number} of {path} is not JSON ({error}). Mend or remove it.") from error


def _read_qrels(path: Path) -> Relevance:
    """Tab-separated `query-id corpus-id score`, with or without that line, or TREC's `query 0 document score`."""
    found: Relevance = {}
    for number, line in _lines(path):
        cells = _cells(line)
        score = _number(cells[-1])
        has_width = len(cells) in (3, 4)
        if score is None and has_width and number == 1 and not line.startswith("{"):
            continue
        if not has_width or score is None:
            raise DataError(
                f"Line {number} of {path} is {line[:100]!r}; expected a query's id, a document's id and a number, with tabs "
                "between them."
            )
        judged = found.setdefault(cells[0], {})
        if judged.setdefault(cells[-2], score) != score:
            raise DataError(
                f"Line {number} of {path} gives document {cells[-2]} the score {score:g} for query {cells[0]}, and a line before "
                f"it {judged[cells[-2]]:g}. Remove one of the two."
            )
    if not found:
        raise DataError(f"{path} says of no document that it is relevant.")
    return found


def _read_candidates(folder: Path) -> dict[str, list[str]]:
    """Documents by query, in the order of the file; nothing if there is none."""
    path = _file(folder, CANDIDATES, _TABLES)
    found: dict[str, list[str]] = {}
    for number, line in _lines(path) if path else ():
        cells = line.split("\t") if "\t" in line else line.split()
        if len(cells) < 2:
            raise DataError(f"Line {number} of {path} is {line[:100]!r}; expected a query's id and a document's.")
        if number == 1 and cells[0].strip().lower() in ("query-id", "query_id", "qid"):
            continue
        found.setdefault(cells[0].strip(), []).append(cells[2 if len(cells) == _OF_RUN else 1].strip())
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
    if named and not any(score > 0 for found in relevance.values() for score in found.values()):
        raise DataError(f"{where}: no score is above 0, so that no document is relevant to any query.")


def _cells(line: str) -> list[str]:
    """Of a line of text, or of one of JSON with MTEB's names."""
    if line.startswith("{"):
        try:
            row = parse_json(line)
        except ValueError:
            return [line]
        return [str(row.get(name, "")) for name in _COLUMNS]
    return [cell.strip() for cell in (line.split("\t") if "\t" in line else line.split())]


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
