"""A dataset's rows, by split, from the Hub, a folder or a file: read by `datasets`, and tables of text by `hfq.data.rows`."""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..common.errors import DataError, HfqError, UsageError, WrongDataError
from ..common.files import user_path
from ..common.names import is_path
from ..common.reading import check_yaml, read_json, read_text
from ..hub.download import fetch_file, find_damaged, head, list_files, snapshot_folder, undamaged
from ..source.checkpoint import is_network_error
from ..source.metadata import LONGEST_CARD
from ..source.trust import check_names
from .beir import is_beir, is_qrels, join_beir, load_beir
from .tables import find_encoding

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, DatasetDict, Features

CARD = "README.md"
READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes
_LONGEST_REASON = 400  # characters
_NO_SUBSET = ("BuilderConfig ", "Config name is missing")
_SAYS_NOTHING = "An error occurred while generating the dataset"


def load_splits(name: str, subset: str | None, *, token: str | None) -> "tuple[DatasetDict, str | None]":
    """The splits of a dataset, and the commit it is at if it comes from the Hub.

    Raises:
        WrongDataError: there is none of that name here, or no such subset.
        DataError: it cannot be read; the message says why.
    """
    from datasets.data_files import EmptyDatasetError
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        splits, revision = _load(name, subset, token)
        if subset is None and is_qrels(splits):
            splits = join_beir(splits, lambda other: _load(name, other, token)[0], name=name)
        return splits, revision
    except HfqError:
        raise
    except RepositoryNotFoundError as error:
        raise DataError(
            f"Dataset {name} is not on the Hub, or is private. Name another with --dataset; for a private one "
            "pass --token or set HF_TOKEN."
        ) from error
    except Exception as error:  # datasets raises dozens of types; the user needs one message
        for cause in _causes(error):
            if isinstance(cause, HfqError):
                raise cause from error
            if is_network_error(cause):
                raise DataError(
                    f"The Hub could not be reached for dataset {name}: {_reason(cause)}. Check the network."
                ) from error
            if _is_of_cache(cause):
                raise DataError(
                    f"Dataset {name} is prepared in the cache, which cannot be written: {_reason(cause)}. Set HF_HOME to a "
                    "folder that can."
                ) from error
        if isinstance(error, ValueError) and str(error).startswith(_NO_SUBSET):
            raise WrongDataError(f"Dataset {name}: {_reason(error)}. Name a subset with --subset.") from error
        raise (WrongDataError if isinstance(error, EmptyDatasetError) else DataError)(
            f"Dataset {name} cannot be loaded: {_reason(error)}. "
            "Expected a Hub id, a folder, or a CSV, JSON or Parquet file, of rows with text and label; or plain text (.txt)."
        ) from error


def _load(name: str, subset: str | None, token: str | None) -> "tuple[DatasetDict, str | None]":
    if is_path(name) or ("/" not in name and _reader(Path(name))):  # "rows.csv" is a file also where it is missing
        return _load_path(user_path(name), subset), None
    return _load_from_hub(name, subset, token)


def _is_of_cache(error: BaseException) -> bool:
    """Whether this is a file that could not be made or written where datasets and the Hub's client keep theirs."""
    import datasets
    from huggingface_hub import constants

    path = getattr(error, "filename", None)
    if not isinstance(error, OSError) or not isinstance(path, str):
        return False
    homes = [Path(home) for home in (datasets.config.HF_DATASETS_CACHE, constants.HF_HOME, constants.HF_HUB_CACHE)]
    if any(home.is_relative_to(path) for home in homes):
        return True
    return not isinstance(error, FileNotFoundError) and any(Path(path).is_relative_to(home) for home in homes)


def _load_from_hub(name: str, subset: str | None, token: str | None) -> "tuple[DatasetDict, str | None]":
    """The dataset at its newest commit, of files that are what the Hub lists there."""
    import datasets
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    revision = head(api, name, repo_type="dataset")
    files = list_files(api, name, revision=revision, repo_type="dataset")
    check_names(files, name)
    card = None
    if CARD in files:
        card = fetch_file(name, files[CARD], revision=revision, token=token, repo_type="dataset")
        _check_card(card)
    modes = iter((None, "force_redownload"))  # its tables are kept too, and must be read again from a new file

    def fetch() -> "DatasetDict":
        mode = next(modes, None)
        builder = datasets.load_dataset_builder(name, subset, revision=revision, token=token, download_mode=mode)
        return _build(builder, card, token=token, mode=mode)

    def find(_: object) -> dict[Path, str | None]:
        return find_damaged(snapshot_folder(name, revision, repo_type="dataset"), files)

    return undamaged(name, fetch, find), revision


def _load_path(path: Path, subset: str | None) -> "DatasetDict":
    import datasets

    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED):
            _refuse_subset(path, subset, kind="a folder that `save_to_disk` wrote")
            return _load_saved(path)
        if is_beir(path):
            return load_beir(path)
        card = path / CARD if (path / CARD).is_file() else None
        if card:
            _check_card(card)
        builder = _folder_builder(path, subset)
        _check_files(path, builder.config.data_files or {}, mend=f"Mend data_files in its {CARD}.")
        return _build(builder, card)
    if not path.exists():
        raise WrongDataError(
            f"Dataset {path} does not exist. Expected a folder, a CSV, JSON, Parquet or text file, or a Hub id."
        )
    reader = _reader(path)
    if reader is None:
        raise WrongDataError(f"Dataset {path} is not a CSV, JSON, Parquet or text file. Convert it to one.")
    _refuse_subset(path, subset, kind="a file")
    return _build(datasets.load_dataset_builder(reader, data_files=_only(path)), None)


def _refuse_subset(path: Path, subset: str | None, *, kind: str) -> None:
    if subset is not None:
        raise UsageError(f"--subset {subset} was given, but {path} is {kind}, which has no subsets. Leave it out.")


def _folder_builder(path: Path, subset: str | None) -> "DatasetBuilder":
    """What datasets finds in a folder, else its files of one kind in whatever case and with whatever separator."""
    import datasets
    from datasets.data_files import SPLIT_KEYWORDS

    try:
        if _only(path) != str(path.absolute()):
            raise WrongDataError(
                f"Dataset {path} has one of *, ? and [ in its path, by which datasets names others. Rename it."
            )
        return datasets.load_dataset_builder(str(path), subset)
    except (OSError, ValueError, WrongDataError):
        files = [file for file in sorted(path.iterdir()) if file.is_file() and _reader(file)]
        readers = {_reader(file) for file in files}
        if subset or len(readers) != 1 or (path / CARD).is_file():
            raise
    found: dict[str, list[str]] = {}
    for file in files:
        word = re.split("[^a-z]", file.name.lower())[0]
        split = next((str(split) for split, words in SPLIT_KEYWORDS.items() if word in words), "train")
        found.setdefault(split, []).append(_only(file))
    return datasets.load_dataset_builder(readers.pop(), data_files=found)


def _only(file: Path) -> str:
    """The pattern that no other file has: `data[1].csv` would be `data1.csv`."""
    return glob.escape(str(file.absolute()))


def _reader(path: Path) -> str | None:
    """The builder for a file, by its name."""
    suffixes = [suffix for suffix in (suffix.lower() for suffix in path.suffixes) if suffix not in COMPRESSED]
    return READERS.get(suffixes[-1] if suffixes else "")


def _build(
    builder: "DatasetBuilder", card: Path | None, *, token: str | None = None, mode: str | None = None
) -> "DatasetDict":
    """What a builder reads, its tables of text by our rules and then as the card declares their columns."""
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.text.text import Text

    from .records import as_records, check_lines
    from .rows import as_rows, is_table

    table = is_table(builder)
    name = builder.config.name
    if table:
        builder = as_rows(builder, token=token)
    elif isinstance(builder, Json):
        _check_encoding(builder.config.data_files or {}, "JSON")
        builder = as_records(builder, token=token)
    elif isinstance(builder, Text):
        _check_encoding(builder.config.data_files or {}, "plain text")
        builder.config.encoding = "utf-8-sig"  # a byte order mark is no text
    elif builder.name == "audiofolder":
        from .recordings import as_recordings

        builder = as_recordings(builder, token=token)
    try:
        builder.download_and_prepare(download_mode=mode)
    except Exception:
        if isinstance(builder, Json):  # what it raises does not say which line, nor of which file
            check_lines(builder.config.data_files or {})
        raise
    splits = builder.as_dataset()
    if isinstance(builder, Text):
        return type(splits)({split: _lines(rows) for split, rows in splits.items()})
    if table:
        return _as_declared(splits, _declared(card, name))
    if isinstance(builder, Json):
        return type(splits)({split: _unwrapped(rows) for split, rows in splits.items()})
    return splits


def _declared(card: Path | None, subset: str) -> "Features":
    """The columns that a card declares. What datasets keeps of an earlier reading is none of its business here."""
    import datasets
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCard

    infos = DatasetInfosDict.from_dataset_card_data(DatasetCard.load(card).data) if card else {}
    info = infos.get(subset)
    return (info and info.features) or datasets.Features()


def _as_declared(splits: "DatasetDict", declared: "Features") -> "DatasetDict":
    for column, feature in declared.items():
        for split, rows in splits.items():
            if column in rows.features and rows.features[column] != feature:
                try:
                    splits[split] = rows.cast_column(column, feature)
                except Exception as error:
                    raise DataError(
                        f"Column {column!r} of split {split!r} is not what the dataset's {CARD} declares: "
                        f"{_reason(error)}. Mend the rows or dataset_info in {CARD}."
                    ) from error
    return splits


def _lines(rows: "Dataset") -> "Dataset":
    """The rows of a text file that hold something: a line each."""
    return rows.select([row for row, text in enumerate(rows[rows.column_names[0]]) if text.strip()])


def _unwrapped(rows: "Dataset") -> "Dataset":
    """The rows themselves where a JSON file is one object that holds them under a name: `{"data": [{…}, …]}`."""
    import datasets

    if len(rows) != 1:
        return rows
    lists = [value for value in rows[0].values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return datasets.Dataset.from_list(lists[0]) if len(lists) == 1 else rows


def _load_saved(path: Path) -> "DatasetDict":
    """What `save_to_disk` wrote, if all of its files lie in the folder."""
    import datasets

    try:
        if (path / _SAVED[0]).is_file():
            parts = {name: [name] for name in read_json(path / _SAVED[0])["splits"]}
        else:
            parts = {".": ["."]}
        for part in list(parts):
            state = read_json(path / part / _SAVED[1])
            parts[part] = [f"{part}/{file['filename']}" for file in state["_data_files"]]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(
            f"Dataset {path} is not whole, as `save_to_disk` writes it: {type(error).__name__}: {error}. Save it again."
        ) from error
    paths = {part: [str(path / file) for file in files] for part, files in parts.items()}
    _check_files(path, paths, mend="Save it again.")
    found = datasets.load_from_disk(str(path))
    return found if isinstance(found, datasets.DatasetDict) else datasets.DatasetDict({"train": found})


def _check_encoding(files: Mapping[str, Sequence[str]], kind: str) -> None:
    for path in (Path(path) for paths in files.values() for path in paths):
        if path.suffix.lower() in COMPRESSED or not path.is_file():
            continue
        try:
            encoding = find_encoding(path)
        except ValueError as error:
            raise DataError(f"{path} cannot be read: {error}.") from error
        if encoding not in ("utf-8", "utf-8-sig"):
            raise DataError(
                f"{path} is {encoding.upper()}, and {kind} is read as UTF-8. Convert it "
                f"(`iconv -f {encoding.upper()} -t UTF-8`)."
            )


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those that led to it, the first of them last."""
    found = [error]
    while (cause := found[-1].__cause__) is not None:
        found.append(cause)
    return found


def _reason(error: BaseException) -> str:
    """What went wrong first: datasets wraps it in errors, and heads it with lines, that say only that one occurred."""
    first = _causes(error)[-1]
    if isinstance(first, StopIteration):
        return "a file of it is empty"
    lines = [line.strip() for line in str(first).splitlines() if line.strip() not in ("", _SAYS_NOTHING)]
    message = " ".join(lines) or type(first).__name__
    if len(message) > _LONGEST_REASON:
        message = message[: _LONGEST_REASON - 1] + "…"
    empty = re.fullmatch(r'Instruction "(.+)" corresponds to no data!', message)
    return f"split {empty[1]!r} is empty" if empty else message.rstrip(".")


def _check_card(path: Path) -> None:
    """datasets reads a card's metadata, for names of files and more, without any limit."""
    try:
        if block := REGEX_YAML_BLOCK.search(read_text(path, limit=LONGEST_CARD)):
            check_yaml(block[2])
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}. Name another dataset with --dataset.") from error


def _check_files(folder: Path, files: Mapping[str, Sequence[str]], *, mend: str) -> None:
    """A card may name any file of this machine, or of the internet, as the dataset's; only those inside are its own."""
    homes = [Path(os.path.abspath(folder)), folder.resolve()]  # noqa: PTH100 - datasets takes ".." out, and may follow links
    for path in (path for paths in files.values() for path in paths):
        inside = any(Path(os.path.abspath(path)).is_relative_to(home) for home in homes)  # noqa: PTH100
        if "::" in path or "://" in path or not inside:
            raise DataError(f"Dataset {folder} names {path} as its file, which is not inside of it. {mend}")
