"""A builder of `datasets` for CSV and its kin, which reads them by `hfq.data.tables`."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.builder import Key
from datasets.fingerprint import Hasher
from datasets.packaged_modules.csv.csv import Csv, CsvConfig

from . import tables
from .tables import Asked, Layout, find_layout, read_rows

_ROWS = 10_000  # of a piece of Arrow data
_UNDERSTOOD = {"sep", "delimiter", "names", "column_names", "quoting", "encoding"}
_OF_ALL = {option.name for option in fields(datasets.BuilderConfig)} | {"features"}


@dataclass
class RowsConfig(datasets.BuilderConfig):
    """What a dataset's card may say of its files."""

    asked: Asked = field(default_factory=Asked)


class Rows(datasets.ArrowBasedBuilder):
    """Every column is text, and None where nothing is written; a column that a file lacks is None in all its rows."""

    BUILDER_CONFIG_CLASS = RowsConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        listed = self.config.data_files
        extracted = dl_manager.download_and_extract(listed)
        found = {
            split: [
                (file, find_layout(Path(file), self.config.asked, name=name))
                for name, path in zip(listed[split], extracted[split], strict=True)
                for file in dl_manager.iter_files(path)
            ]
            for split in listed
        }
        names = dict.fromkeys(name for files in found.values() for _, layout in files for name in layout.names)
        self.info.features = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
        return [datasets.SplitGenerator(name=split, gen_kwargs={"files": files}) for split, files in found.items()]

    def _generate_shards(self, files: list[tuple[str, Layout]]) -> Iterator[str]:
        yield from (file for file, _ in files)

    def _generate_tables(self, files: list[tuple[str, Layout]]) -> Iterator[tuple[Key, pa.Table]]:
        schema = self.info.features.arrow_schema
        for number, (file, layout) in enumerate(files):
            rows = (dict(zip(layout.names, row, strict=True)) for row in read_rows(Path(file), layout))
            for piece, some in enumerate(_batched(rows, _ROWS)):
                yield Key(number, piece), pa.Table.from_pylist(some, schema=schema)


def is_table(builder: datasets.DatasetBuilder) -> bool:
    """Whether a builder reads files of rows, and in no way that only pandas knows."""
    default = CsvConfig()
    return isinstance(builder, Csv) and all(
        getattr(builder.config, option.name) == getattr(default, option.name)
        for option in fields(CsvConfig)
        if option.name not in _UNDERSTOOD | _OF_ALL
    )


def as_rows(builder: datasets.DatasetBuilder, *, token: str | None = None) -> Rows:
    """The builder that reads the same files as `builder`, for which `is_table` holds, by the rules here."""
    config = builder.config
    asked = Asked()
    if isinstance(config, CsvConfig):
        asked = Asked(
            separator=config.sep if len(config.sep) == 1 else None,
            quoted=None if config.quoting == CsvConfig.quoting else config.quoting != 3,
            names=tuple(config.names) if config.names else None,
            encoding=config.encoding,
        )
    return Rows(**same_source(builder, token, tables.__file__, __file__), data_files=config.data_files, asked=asked)


def same_source(builder: datasets.DatasetBuilder, token: str | None, *code: str) -> dict[str, Any]:
    """What a builder is given that stands in for `builder`. `code`: files of what it reads by, on which its cache depends."""
    return {
        "dataset_name": builder.dataset_name,
        "config_name": builder.config.name,
        "hash": Hasher.hash([builder.hash, *(Path(file).read_bytes() for file in code)]),
        "base_path": builder.base_path,
        "token": token,
        "repo_id": builder.repo_id,
    }


def _batched(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while some := list(islice(rows, size)):
        yield some
