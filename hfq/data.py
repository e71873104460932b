"""Second stage: the dataset, its columns and labels, as token ids for calibration and evaluation."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .download import fetch_file, find_damaged, head, list_files, snapshot_folder, undamaged
from .errors import DataError, HfqError, UsageError
from .reading import check_yaml, read_text
from .recipe import Recipe, is_path, read_recipe
from .report import DatasetInfo
from .source import LONGEST_CARD, Checkpoint, is_network_error
from .tasks.text_classification import LabelMap, TextClassification
from .trust import check_names

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from torch import Tensor

EVALUATION_SPLITS = ("validation", "dev", "val", "test")
CARD = "README.md"
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
LONGEST = 512  # tokens, where neither the tokenizer nor the model sets a limit


@dataclass(frozen=True)
class Examples:
    """Tokenized examples, shortest first so that batches hold little padding. `labels`: the model's ids."""

    encodings: Sequence[Mapping[str, Sequence[int]]]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, tokenizer: Any, batch_size: int) -> "Iterator[dict[str, Tensor]]":
        """Padded integer tensors `[batch, length]`, and `labels` `[batch]`."""
        import torch

        for start in range(0, len(self), batch_size):
            rows = self.encodings[start : start + batch_size]
            batch = dict(tokenizer.pad([dict(row) for row in rows], return_tensors="pt"))
            yield {**batch, "labels": torch.tensor(self.labels[start : start + batch_size])}


@dataclass(frozen=True)
class TaskData:
    """What a run reads. `holdout`: labelled examples that neither calibration nor tuning sees, or None."""

    info: DatasetInfo
    tokenizer: Any
    label_names: Sequence[str]
    calibration: Examples
    evaluation: Examples
    holdout: Examples | None
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class DatasetReference:
    """A dataset before it is loaded."""

    id: str
    subset: str | None = None
    split: str | None = None


def load_task_data(
    checkpoint: Checkpoint, recipe: Recipe, *, task: TextClassification, recipes: Path, token: str | None
) -> TaskData:
    """Load, align and tokenize.

    Raises:
        DataError: the dataset cannot be found or read, or does not fit the checkpoint.
    """
    reference = find_dataset(checkpoint, recipe, recipes=recipes)
    splits, revision = _load(reference, token)
    split = _evaluation_split(splits, recipe.split or reference.split)
    calibration_split = _calibration_split(splits, recipe.calibration_split, split)
    features = splits[split].features
    label_column = task.label_column(features, recipe.label_column)
    text_columns = task.text_columns(features, recipe.text_columns, label_column)
    distinct = sorted(
        {value for name in {split, calibration_split} for value in splits[name].unique(label_column)}, key=str
    )
    labels = task.align(features[label_column], distinct)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=recipe.trust_remote_code)
    max_length = _max_length(recipe.max_length, tokenizer, checkpoint.config)
    vocabulary = checkpoint.config.get("vocab_size")

    def encode(name: str, rows: "Dataset") -> Examples:
        return _encode(rows, name, text_columns, label_column, labels, tokenizer, max_length, vocabulary)

    evaluation = encode(split, splits[split])
    slice_rows = splits[calibration_split].shuffle(seed=recipe.seed)
    calibration = encode(calibration_split, slice_rows.select(range(min(recipe.calibration_samples, len(slice_rows)))))
    holdout_split = _holdout_split(splits, label_column, labels, {split, calibration_split})
    holdout = encode(holdout_split, splits[holdout_split]) if holdout_split else None

    warnings = []
    if len(calibration) < recipe.calibration_samples:
        warnings.append(
            f"Split {calibration_split!r} has {len(calibration)} examples, fewer than --calibration-samples {recipe.calibration_samples}."
        )
    if calibration_split == split:
        warnings.append(
            f"Calibration and evaluation both read split {split!r}: its accuracy is not independent of calibration."
        )
    if "by position" in labels.how:
        warnings.append(f"Labels were aligned {labels.how}.")
    local = is_path(reference.id)
    info = DatasetInfo(
        id=Path(reference.id).resolve().name if local else reference.id,
        subset=reference.subset,
        revision=revision,
        split=split,
        calibration_split=calibration_split,
        calibration_samples=len(calibration),
        text_columns=text_columns,
        label_column=label_column,
        label_alignment=labels.how,
        examples=len(evaluation),
        holdout_split=holdout_split,
        holdout_examples=len(holdout) if holdout else 0,
        max_length=max_length,
    )
    return TaskData(info, tokenizer, task.label_names, calibration, evaluation, holdout, tuple(warnings))


def find_dataset(checkpoint: Checkpoint, recipe: Recipe, *, recipes: Path) -> DatasetReference:
    """The dataset that was asked for, else the one the card names, else the one of this checkpoint's recipe.

    Raises:
        DataError: none is found; the message lists what was looked at.
    """
    if recipe.dataset:
        return DatasetReference(recipe.dataset, recipe.subset)
    found = (
        _from_model_index(checkpoint.card)
        or _from_datasets(checkpoint.card)
        or _from_recipes(recipe.checkpoint, recipes)
    )
    if found is None:
        raise DataError(
            f"No dataset is known for {recipe.checkpoint}. Looked at: the card's model-index (no result with a dataset "
            f"type), the card's datasets ({checkpoint.card.get('datasets') or 'none'}), recipes in {recipes} (none names "
            "this checkpoint). Pass --dataset."
        )
    return replace(found, subset=recipe.subset) if recipe.subset else found


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer, from its folder only.

    Raises:
        DataError: its files are missing or damaged, or it cannot pad.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # tokenizer_config.json may name any class
            raise ValueError(f"it is a {type(tokenizer).__name__}")
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise DataError(
            f"The tokenizer of {checkpoint.info.id} cannot be loaded: {error}. Download it again."
        ) from error
    files = list(tokenizer.vocab_files_names.values())  # without them transformers makes one up; some need none
    if files and not any((checkpoint.path / name).is_file() for name in files):
        raise DataError(
            f"{checkpoint.info.id} has no tokenizer: expected {' or '.join(files)}. "
            "Save it there with `AutoTokenizer.from_pretrained(…).save_pretrained(…)`."
        )
    if tokenizer.pad_token is None:
        raise DataError(f"The tokenizer of {checkpoint.info.id} has no padding token, so examples cannot be batched.")
    return tokenizer


def _from_model_index(card: Mapping[str, Any]) -> DatasetReference | None:
    for model in card.get("model-index") or []:
        for result in (model or {}).get("results") or []:
            dataset = (result or {}).get("dataset") or {}
            if isinstance(dataset.get("type"), str) and dataset["type"] != "local":  # what our cards call a folder
                subset = dataset.get("config") or dataset.get("args")
                return DatasetReference(
                    dataset["type"], subset if isinstance(subset, str) else None, dataset.get("split")
                )
    return None


def _from_datasets(card: Mapping[str, Any]) -> DatasetReference | None:
    names = card.get("datasets") or []
    names = [names] if isinstance(names, str) else names
    named = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
    return DatasetReference(names[0]) if named else None


def _from_recipes(checkpoint: str, recipes: Path) -> DatasetReference | None:
    for path in sorted(recipes.glob("*.yaml")):
        recipe = read_recipe(path)
        if recipe.checkpoint == checkpoint and recipe.dataset:
            return DatasetReference(recipe.dataset, recipe.subset, recipe.split)
    return None


def _load(reference: DatasetReference, token: str | None) -> "tuple[DatasetDict, str | None]":
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        if is_path(reference.id):
            return _load_path(Path(reference.id).expanduser(), reference.subset), None
        return _load_from_hub(reference, token)
    except HfqError:
        raise
    except RepositoryNotFoundError as error:
        raise DataError(
            f"Dataset {reference.id} is not on the Hub, or is private. Name another with --dataset; for a private one "
            "pass --token or set HF_TOKEN."
        ) from error
    except Exception as error:  # datasets raises dozens of types; the user needs one message
        if is_network_error(error):
            raise DataError(
                f"The Hub could not be reached for dataset {reference.id}: {_reason(error)}. Check the network."
            ) from error
        raise DataError(
            f"Dataset {reference.id} cannot be loaded: {_reason(error)}. "
            "Expected a Hub id, a folder, or a CSV, JSON or Parquet file, of rows with text and label."
        ) from error


def _load_from_hub(reference: DatasetReference, token: str | None) -> "tuple[DatasetDict, str | None]":
    """The dataset at its newest commit, of files that are what the Hub lists there."""
    import datasets
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    revision = head(api, reference.id, repo_type="dataset")
    files = list_files(api, reference.id, revision=revision, repo_type="dataset")
    check_names(files, reference.id)
    if CARD in files:
        _check_card(fetch_file(reference.id, files[CARD], revision=revision, token=token, repo_type="dataset"))
    modes = iter((None, "force_redownload"))  # its tables are kept too, and must be read again from a new file

    def fetch() -> "DatasetDict":
        return datasets.load_dataset(
            reference.id, reference.subset, revision=revision, token=token, download_mode=next(modes, None)
        )

    def find(_: object) -> dict[Path, str | None]:
        return find_damaged(snapshot_folder(reference.id, revision, repo_type="dataset"), files)

    return undamaged(reference.id, fetch, find), revision


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first: datasets wraps it in errors that say only that one occurred."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = next(iter(str(error).strip().splitlines()), type(error).__name__)
    empty = re.fullmatch(r'Instruction "(.+)" corresponds to no data!', message)
    return f"split {empty[1]!r} is empty" if empty else message.rstrip(".")


def _load_path(path: Path, subset: str | None) -> "DatasetDict":
    import datasets

    if path.is_dir():
        if (path / CARD).is_file():
            _check_card(path / CARD)
        _check_files(path, datasets.load_dataset_builder(str(path), subset).config.data_files or {})
        return datasets.load_dataset(str(path), subset)
    if not path.exists():
        raise DataError(f"Dataset {path} does not exist. Expected a folder, a CSV, JSON or Parquet file, or a Hub id.")
    if path.suffix not in READERS:
        raise DataError(f"Dataset {path} is not a CSV, JSON or Parquet file. Convert it to one.")
    separator = {"sep": "\t"} if path.suffix == ".tsv" else {}
    return datasets.load_dataset(READERS[path.suffix], data_files=str(path), **separator)


def _check_card(path: Path) -> None:
    """datasets reads a card's metadata, for names of files and more, without any limit."""
    try:
        if block := REGEX_YAML_BLOCK.search(read_text(path, limit=LONGEST_CARD)):
            check_yaml(block[2])
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}. Name another dataset with --dataset.") from error


def _check_files(folder: Path, files: Mapping[str, Sequence[str]]) -> None:
    """A card may name any file of this machine, or of the internet, as the dataset's; only those inside are its own."""
    homes = [Path(os.path.abspath(folder)), folder.resolve()]  # noqa: PTH100 - datasets takes ".." out, and may follow links
    for path in (path for paths in files.values() for path in paths):
        inside = any(Path(os.path.abspath(path)).is_relative_to(home) for home in homes)  # noqa: PTH100
        if "::" in path or "://" in path or not inside:
            raise DataError(
                f"Dataset {folder} names {path} as its file, which is not inside of it. Mend data_files in its {CARD}."
            )


def _evaluation_split(splits: Mapping[str, Any], requested: str | None) -> str:
    if requested is not None:
        return _require_split(requested, splits, "--split")
    for prefix in EVALUATION_SPLITS:
        for name in splits:
            if name.startswith(prefix):
                return name
    if len(splits) == 1:
        return next(iter(splits))
    raise DataError(f"Which split to evaluate on is not clear. Splits: {', '.join(splits)}. Name one with --split.")


def _calibration_split(splits: Mapping[str, Any], requested: str | None, split: str) -> str:
    if requested is not None:
        return _require_split(requested, splits, "--calibration-split")
    return "train" if "train" in splits else split


def _require_split(name: str, splits: Mapping[str, Any], flag: str) -> str:
    if name not in splits:
        raise DataError(f"{flag} {name!r} is not a split of the dataset. Splits: {', '.join(splits)}.")
    if len(splits[name]) == 0:
        raise DataError(f"{flag} {name!r} is empty.")
    return name


def _holdout_split(splits: Mapping[str, Any], label_column: str, labels: LabelMap, used: set[str]) -> str | None:
    """A test split with labels that nothing else reads (the Hub's GLUE test splits have none)."""
    for name, rows in splits.items():
        fits = name.startswith("test") and name not in used and len(rows) and label_column in rows.features
        if fits and all(labels(value) is not None for value in rows.unique(label_column)):
            return name
    return None


def _encode(
    rows: "Dataset",
    split: str,
    text_columns: Sequence[str],
    label_column: str,
    labels: LabelMap,
    tokenizer: Any,
    max_length: int,
    vocabulary: int | None,
) -> Examples:
    if len(rows) == 0:
        raise DataError(f"Split {split!r} is empty.")
    for name in [*text_columns, label_column]:
        if name not in rows.features:
            raise DataError(f"Split {split!r} has no column {name!r}. Columns: {', '.join(rows.features)}.")
    ids = [labels(value) for value in rows[label_column]]
    if None in ids:
        raise DataError(
            f"Split {split!r} has examples without a usable label (first: {rows[ids.index(None)][label_column]!r}). Choose a labelled split."
        )
    texts = [list(rows[name]) for name in text_columns]
    for name, column in zip(text_columns, texts, strict=True):
        for row, value in enumerate(column):
            if not isinstance(value, str):
                raise DataError(
                    f"Row {row} (from 0) of split {split!r} has {value!r} in column {name!r}, and not a text. "
                    "Mend or remove such rows, or name another column with --text-column."
                )
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    largest = max(max(row, default=0) for row in encoded["input_ids"])
    if vocabulary and largest >= vocabulary:
        raise DataError(
            f"The tokenizer gives token ids up to {largest}, but the model has only {vocabulary} (vocab_size in "
            "config.json). Take both from the same checkpoint."
        )
    order = sorted(range(len(ids)), key=lambda i: len(encoded["input_ids"][i]))
    encodings = [{name: encoded[name][i] for name in encoded} for i in order]
    return Examples(encodings, [cast(int, ids[i]) for i in order])


def _max_length(requested: int | None, tokenizer: Any, config: Mapping[str, Any]) -> int:
    positions = config.get("max_position_embeddings")
    padding_rows = (
        (config.get("pad_token_id") or 0) + 1
        if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet")
        else 0
    )
    model_limit = positions - padding_rows if isinstance(positions, int) else None
    if requested is None:
        limits = (tokenizer.model_max_length, model_limit or LONGEST)
        return min(LONGEST if limit > 10**6 else limit for limit in limits)
    if model_limit and requested > model_limit:
        raise UsageError(f"--max-length {requested} is more than this model takes: at most {model_limit} tokens.")
    return requested


def majority_accuracy(labels: Sequence[int]) -> float:
    """Accuracy of always answering the most common label."""
    return max(labels.count(label) for label in set(labels)) / len(labels)
