"""Second stage: the dataset, its columns and labels, as token ids for calibration and evaluation."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .dataset import load_splits
from .errors import DataError, UsageError
from .recipe import Recipe, is_path, read_recipe
from .report import DatasetInfo
from .source import Checkpoint
from .tasks.text_classification import LabelMap, TextClassification, is_text

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features
    from torch import Tensor

EVALUATION_SPLITS = ("validation", "dev", "val", "test")
NO_TEXT = r"^\s*([+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|(?i:true|false))\s*$"
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
    splits, revision = load_splits(reference.id, reference.subset, token=token)
    split = _evaluation_split(splits, recipe.split or reference.split)
    calibration_split = _calibration_split(splits, recipe.calibration_split, split)
    features = splits[split].features
    label_column = task.label_column(features, recipe.label_column)
    text_columns = task.text_columns(_told_apart(splits[split]), recipe.text_columns, label_column)
    labels = task.align(features[label_column], _distinct(splits, {split, calibration_split}, label_column))
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=recipe.trust_remote_code)
    max_length = _max_length(checkpoint, recipe, task=task, tokenizer=tokenizer)
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
        raise DataError(
            f"The tokenizer of {checkpoint.info.id} has no padding token, so examples cannot be batched. "
            "Give it one (`tokenizer.pad_token = …`), and config.json its id as pad_token_id."
        )
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


def _told_apart(rows: "Dataset") -> "Features":
    """The columns, where one that is stored as text and holds nothing but numbers, or true and false, is no text."""
    import pyarrow.compute
    from datasets import Features, Value

    def holds_text(name: str) -> bool:
        column = rows.data.column(name)
        return not pyarrow.compute.all(pyarrow.compute.match_substring_regex(column, NO_TEXT), min_count=0).as_py()

    columns = rows.features.items()
    return Features({name: Value("null") if is_text(kind) and not holds_text(name) else kind for name, kind in columns})


def _distinct(splits: "DatasetDict", names: set[str], column: str) -> list[Any]:
    """The values of a column of labels.

    Raises:
        DataError: they are no single labels.
    """
    from datasets import ClassLabel, Json, Value

    values: set[Any] = set()
    for name in names:
        _require_columns(splits[name], name, [column])
        kind = splits[name].features[column]
        if isinstance(kind, Json):  # of several types, which datasets keeps as they are
            values |= {value if isinstance(value, Hashable) else str(value) for value in splits[name][column]}
        elif isinstance(kind, ClassLabel | Value):
            values |= set(splits[name].unique(column))
        else:
            raise DataError(
                f"Column {column!r} holds {kind}, and not one label for each example. hfq measures single-label "
                "classification; name another column with --label-column."
            )
    return sorted(values, key=str)


def _require_columns(rows: "Dataset", split: str, columns: Sequence[str]) -> None:
    for name in columns:
        if name not in rows.features:
            raise DataError(f"Split {split!r} has no column {name!r}. Columns: {', '.join(rows.features)}.")


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
        if fits and all(labels(value) is not None for value in _distinct(splits, {name}, label_column)):
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
    _require_columns(rows, split, [*text_columns, label_column])
    ids = [labels(value) for value in rows[label_column]]
    if None in ids:
        raise DataError(
            f"Split {split!r} has examples without a usable label (first: row {ids.index(None)}, from 0: "
            f"{rows[ids.index(None)][label_column]!r}). Choose a labelled split."
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


def _max_length(checkpoint: Checkpoint, recipe: Recipe, *, task: TextClassification, tokenizer: Any) -> int:
    """The tokens of a text that are read.

    Raises:
        DataError: the model cannot answer texts of different lengths.
        UsageError: more were asked for than the model takes.
    """
    from .positions import lacks_padding, make_skeleton, most_tokens

    trust = recipe.trust_remote_code
    padding = tokenizer.pad_token_id
    if lacks_padding(checkpoint, task.auto_class, trust_remote_code=trust, padding=padding):
        raise DataError(
            f"config.json of {checkpoint.info.id} has no pad_token_id, without which its model cannot answer a batch of "
            f'texts. Add "pad_token_id": {padding} to it, which is the tokenizer\'s.'
        )
    model = make_skeleton(checkpoint, task.auto_class, trust_remote_code=trust)
    model_limit = most_tokens(model) if model else None
    if recipe.max_length is None:
        limits = (tokenizer.model_max_length, model_limit or LONGEST)
        return min(LONGEST if limit > 10**6 else limit for limit in limits)
    if model_limit and recipe.max_length > model_limit:
        raise UsageError(
            f"--max-length {recipe.max_length} is more than this model takes: at most {model_limit} tokens."
        )
    return recipe.max_length


def majority_accuracy(labels: Sequence[int]) -> float:
    """Accuracy of always answering the most common label."""
    return max(labels.count(label) for label in set(labels)) / len(labels)
