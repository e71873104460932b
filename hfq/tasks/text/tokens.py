"""What tasks on text share: a tokenizer, texts that are texts, tokens that the model knows."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...common.errors import DataError, UsageError, WrongDataError
from ..base import Batch, Encoding, Processor, Task, require_columns

if TYPE_CHECKING:
    from datasets import Dataset

    from ...source.checkpoint import Checkpoint


EXCERPT = 48  # tokens that are shown of an example
LONGEST = 512  # tokens, where neither the tokenizer nor the model sets a limit


class TextTask(Task):
    """One whose model reads tokens."""

    def processor(self, checkpoint: "Checkpoint", *, max_length: int | None, trust_remote_code: bool) -> Processor:
        """Raises `DataError` also where the model cannot answer texts of different lengths."""
        from ...source.model import load_tokenizer  # imports torch
        from ...source.positions import lacks_padding, make_skeleton, most_tokens

        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        padding = tokenizer.pad_token_id
        if lacks_padding(checkpoint, self.auto_class, trust_remote_code=trust_remote_code, padding=padding):
            raise DataError(
                f"config.json of {checkpoint.info.id} has no pad_token_id, without which its model cannot answer a batch of "
                f'texts. Add "pad_token_id": {padding} to it, which is the tokenizer\'s.'
            )
        model = make_skeleton(checkpoint, self.auto_class, trust_remote_code=trust_remote_code)
        limit = most_tokens(model) if model else None
        if max_length is not None and limit and max_length > limit:
            raise UsageError(f"--max-length {max_length} is more than this model takes: at most {limit} tokens.")
        limits = [LONGEST if tokens > 10**6 else tokens for tokens in (tokenizer.model_max_length, limit or LONGEST)]
        return Processor(tokenizer, max_length or min(limits))

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        return dict(processor.tool.pad([dict(row) for row in encodings], return_tensors="pt"))

    def excerpt(self, encoding: Encoding, processor: Processor) -> str:
        """Its tokens, of several texts the first one's."""
        ids = encoding["input_ids"]
        first = ids[0] if ids and isinstance(ids[0], Sequence) else ids
        return str(processor.tool.decode(first[:EXCERPT], skip_special_tokens=True))

    def tokens(self, processor: Processor, *texts: Any, **settings: Any) -> Any:
        """Token ids of texts, or of pairs, cut at the longest input. `settings`: of the tokenizer.

        Raises:
            DataError: the tokenizer knows tokens that the model does not.
        """
        encoded = processor.tool(*texts, max_length=processor.max_length, **{"truncation": True, **settings})
        vocabulary = self.config.get("vocab_size")
        largest = max((max(row, default=0) for row in encoded["input_ids"]), default=0)
        if vocabulary and largest >= vocabulary:
            raise DataError(
                f"The tokenizer gives token ids up to {largest}, but the model has only {vocabulary} (vocab_size in "
                "config.json). Take both from the same checkpoint."
            )
        return encoded


def texts(rows: "Dataset", column: str, *, flag: str = "--text-column") -> list[str]:
    """A column of texts.

    Raises:
        DataError: a row holds something else.
    """
    found = list(rows[column])
    for row, value in enumerate(found):
        if not isinstance(value, str):
            raise DataError(
                f"Row {row} (from 0) of split {str(rows.split or 'given')!r} has {value!r} in column {column!r}, and not a text. "
                f"Mend or remove such rows, or name another column with {flag}."
            )
    return found


def is_text(feature: Any) -> bool:
    """Whether a column of this `datasets` feature holds texts."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def is_mixed(feature: Any) -> bool:
    """Whether a column of a JSON file holds several types, of which some may be texts: the others are found by row."""
    from datasets import Json

    return isinstance(feature, Json)


def find_texts(
    features: Mapping[str, Any],
    requested: Sequence[str],
    *,
    known: Sequence[Sequence[str]],
    without: Sequence[str],
    what: str = "the text",
) -> list[str]:
    """One column of texts or two: those asked for, else as `known_texts` finds them, else the only one.

    Raises:
        DataError: one does not exist, or the choice is not clear.
    """
    require_columns(requested, features, "--text-column")
    if len(requested) > 2:
        raise WrongDataError(f"--text-column was given {len(requested)} times; a model reads one text or a pair.")
    if found := list(requested) or known_texts(features, known, without=without):
        return found
    rest = {name: feature for name, feature in features.items() if name not in without}
    found = [name for name, feature in rest.items() if is_text(feature)]
    found = found or [name for name, feature in rest.items() if is_mixed(feature)]
    if len(found) == 1:
        _check_alone(found[0], rest, known)
        return found
    raise WrongDataError(
        f"Which columns hold {what} is not clear. Columns: {', '.join(features)}; with text: "
        f"{', '.join(found) or 'none'}. Name them with --text-column, in order."
    )


def _check_alone(name: str, features: Mapping[str, Any], known: Sequence[Sequence[str]]) -> None:
    """Refuse one half of a known pair whose other half holds something else; one that holds nothing is none."""
    others = {other for group in known if name in group for other in group if other in features and other != name}
    for other in sorted(others):
        if getattr(features[other], "dtype", None) != "null":
            raise WrongDataError(
                f"Column {other!r} holds {features[other]}, and not texts, which belong to those in {name!r}. Mend it, or name what "
                "is to be read with --text-column."
            )


def known_texts(
    features: Mapping[str, Any], groups: Sequence[Sequence[str]], *, without: Sequence[str] = ()
) -> list[str] | None:
    """The first group of names of which all are columns of texts, if only some of their rows; `texts` says which are not."""
    found = {name for name, kind in features.items() if is_text(kind) or is_mixed(kind)} - {*without}
    return next((list(names) for names in groups if found.issuperset(names)), None)
