"""Token classification: a list of words, a tag for each, such as named entities or parts of speech.

Words are cut into tokens; a word's tag is read from its first token (Devlin et al. 2019, section 5.3). Entities are
compared by seqeval, whose rules are conlleval's: a span counts if its ends and its type are right.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...common.errors import DataError, WrongDataError
from ..base import Batch, Columns, Encoding, Metric, Outputs, Processor, References, SumMetric, Trivial, require_columns
from ..labels import WITHOUT_LABELS, LabelMap, LabelNames, check_plain, check_varied
from ..metrics import leads
from .tokens import TextTask, is_text, texts

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from ...source.checkpoint import Checkpoint

IGNORED = -100  # of tokens that no tag is read from, as transformers has it
WORDS = ("tokens", "words", "text", "sentence")
TAGS = ("ner_tags", "tags", "labels", "label", "ner", "pos_tags", "upos", "xpos", "pos", "chunk_tags")
OUTSIDE = "O"
_PREFIXED = re.compile(r"[BIESLUM]-.+")
_SUFFIXED = re.compile(r".+-[BIESLUM]")
_AS_IOBES = {"L": "E", "U": "S", "M": "I"}  # BILOU and BMES, whose last and single tokens seqeval does not know


class TokenClassification(TextTask):
    """Words and tags. Whether tags are entities is told by their names: with `O`, or with prefixes such as `B-`."""

    name = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    pipeline_tag = "token-classification"
    roles: ClassVar[Mapping[str, str]] = {
        "tokens": "words, a list for each example",
        "tags": "their tags, a list of the same length: names, ids or ClassLabel",
    }
    example: ClassVar[Mapping[str, Any]] = {"id2label": {"0": "O", "1": "B-ENTITY"}}
    text_role: ClassVar[str] = "tokens"
    label_role: ClassVar[str] = "tags"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.labels = LabelNames(config)
        self.names: Sequence[str] = self.labels.names

    def processor(self, checkpoint: "Checkpoint", *, max_length: int | None, trust_remote_code: bool) -> Processor:
        found = super().processor(checkpoint, max_length=max_length, trust_remote_code=trust_remote_code)
        if not _takes_words(found.tool):  # as RoBERTa's: a space before a word is part of its tokens
            tool = type(found.tool).from_pretrained(checkpoint.path, add_prefix_space=True)
            found = Processor(tool, found.max_length)
        if not found.tool.is_fast:
            raise DataError(
                f"The tokenizer of {checkpoint.info.id} is not a fast one, and only those say which word a token is of. "
                "Add its tokenizer.json."
            )
        return found

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        lists = {name: item for name, feature in features.items() if (item := _item(feature)) is not None}
        texts = lists if requested.get("tokens") else {name: lists[name] for name in lists if name not in TAGS}
        words = _one_of(features, requested.get("tokens"), WORDS, texts, flag="--text-column")
        rest = {name: item for name, item in lists.items() if name != words}
        return {
            "tokens": [words],
            "tags": [_one_of(features, requested.get("tags"), TAGS, rest, flag="--label-column")],
        }

    def inputs(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        """Plain text, where there are no lists of words: its tokenizer says what a word is, as transformers' pipeline has it."""
        lists = {name: kind for name, kind in features.items() if _item(kind) is not None and name not in TAGS}
        plain = {name: kind for name, kind in features.items() if is_text(kind) and name not in TAGS}
        readable = {**lists, **plain} if requested.get("tokens") else lists or plain
        return {"tokens": [_one_of(features, requested.get("tokens"), WORDS, readable, flag="--text-column")]}

    def align(self, splits: Sequence["Dataset"], columns: Columns) -> LabelMap:
        (column,) = columns["tags"]
        values = [{tag for tags in rows[column] for tag in _listed(tags, column)} for rows in splits]
        found = self.labels.align(_item(splits[0].features[column]), sorted(set().union(*values), key=str))
        ids = [found(tag) for tag in values[0]]
        check_varied(splits[0], column, [found.names[i] for i in ids if i is not None])
        return found

    def references(self, rows: "Dataset", columns: Columns, alignment: LabelMap) -> list[Any]:
        (words,), (column,) = columns["tokens"], columns["tags"]
        return [
            _ids(row, _words(row, sentence, words), tags, alignment)
            for row, (sentence, tags) in enumerate(zip(rows[words], rows[column], strict=True))
        ]

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> list[Encoding]:
        (column,) = columns["tokens"]
        if is_text(rows.features[column]):
            encoded = self.tokens(processor, texts(rows, column))
        else:
            sentences = [_words(row, words, column) for row, words in enumerate(rows[column])]
            encoded = self.tokens(processor, sentences, is_split_into_words=True)
        return [
            {**{name: encoded[name][row] for name in encoded}, "labels": _first_tokens(encoded.word_ids(row))}
            for row in range(len(rows))
        ]

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in encodings]
        batch = super().collate(inputs, processor)
        length = batch["input_ids"].shape[1]
        labels = torch.full((len(encodings), length), IGNORED)
        for row, encoding in enumerate(encodings):
            found = torch.tensor(encoding["labels"])
            start = length - len(found) if processor.tool.padding_side == "left" else 0
            labels[row, start : start + len(found)] = found
        return {**batch, "labels": labels}

    def outputs(self, model: "nn.Module", batch: Batch) -> list[Tensor]:
        """Logits: float32 `[words, tags]` for each example; a word without a token of its own is outside of entities."""
        logits = model(**self.model_inputs(batch)).logits.float()
        found = []
        for row, words in zip(logits, batch["labels"], strict=True):
            places = words != IGNORED
            output = row.new_zeros(int(words.max().clamp(min=-1)) + 1, row.shape[-1])
            if OUTSIDE in self.names:
                output[:, self.names.index(OUTSIDE)] = 1
            output[words[places]] = row[places]
            found.append(output)
        return found

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """Of entities where tags are such, the whole span counting once; else of tags."""
        accuracy = {"accuracy": TagAccuracy(self.names)}
        spans = span_names(self.names)
        if spans is None:
            return accuracy
        return {kind: EntityMetric(kind, spans) for kind in ("f1", "precision", "recall")} | accuracy

    def per_example(self, outputs: Outputs, references: References) -> Tensor:
        """bool `[examples]`: whether every word has the right tag."""
        pairs = zip(outputs, references, strict=True)
        return torch.tensor([_answered(output, len(tags), self.names) == tags for output, tags in pairs])

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Share of words with the same tag."""
        same = [(a.argmax(-1) == b.argmax(-1)) for a, b in zip(outputs, others, strict=True)]
        return torch.cat(same).double().mean().item() if any(len(row) for row in same) else 1.0

    def margins(self, outputs: Outputs, others: Outputs) -> Tensor:
        """Of logits, at the word that has least."""
        pairs = zip(outputs, others, strict=True)
        return torch.stack([leads(a, b).amin() if len(a) else a.new_tensor(torch.inf) for a, b in pairs])

    def trivial(self, metric: str, references: References) -> Trivial:
        """Always the most common tag."""
        tags = torch.tensor([tag for row in references for tag in row])
        common = int(tags.mode().values)
        constant = torch.nn.functional.one_hot(torch.tensor(common), len(self.names)).float()
        outputs = [constant.expand(len(row), -1) for row in references]
        return Trivial(self.score(metric, outputs, references), f"answering {self.names[common]}")

    def informed(self, alignment: LabelMap) -> "TokenClassification":
        """Where the model does not name its tags, the dataset's names say which are entities."""
        found = copy.copy(self)
        found.names = alignment.names
        found.__dict__.pop("metrics", None)
        return found


class TagAccuracy(SumMetric):
    """Share of words with the right tag."""

    label = "Accuracy"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def numbers(self, outputs: Outputs, references: References) -> Tensor:
        rows = []
        for output, tags in zip(outputs, references, strict=True):
            given = _answered(output, len(tags), self.names)
            rows.append([sum(a == b for a, b in zip(given, tags, strict=True)), len(tags)])
        return torch.tensor(rows, dtype=torch.float64)

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]


class EntityMetric(SumMetric):
    """F1, precision or recall of entities, each a span with a type, over all examples together (seqeval's micro average).

    `names`: of the model's tags, as seqeval reads them.
    """

    def __init__(self, kind: str, names: Sequence[str]) -> None:
        self.kind = kind
        self.label = f"Entity {'F1' if kind == 'f1' else kind}"
        self.names = names

    def numbers(self, outputs: Outputs, references: References) -> Tensor:
        """Entities that are right, that were found, and that there are."""
        rows = []
        for output, tags in zip(outputs, references, strict=True):
            found = self._entities(_answered(output, len(tags), self.names))
            there = self._entities(tags)
            rows.append([len(found & there), len(found), len(there)])
        return torch.tensor(rows, dtype=torch.float64)

    def of_sums(self, sums: Tensor) -> Tensor:
        right, found, there = sums.unbind(-1)
        of = {"f1": (found + there) / 2, "precision": found, "recall": there}[self.kind]
        return right / of.clamp(min=0.5)  # none at all: 0, as seqeval has it

    def _entities(self, tags: Sequence[int]) -> set[tuple[str, int, int]]:
        from seqeval.metrics.sequence_labeling import get_entities  # imports scikit-learn: only where it is needed

        return set(get_entities([self.names[tag] for tag in tags]))


def span_names(names: Sequence[str]) -> list[str] | None:
    """Tags as seqeval reads them, `B-TYPE` and its like; None where they are no entities.

    IOB1, IOB2, IOBES, BILOU and BMES have a prefix, or a suffix; in plain tags, each run of one tag is an entity.
    """
    types = [name for name in names if name != OUTSIDE]
    if types and all(_PREFIXED.fullmatch(name) for name in types):
        return [name if name == OUTSIDE else _AS_IOBES.get(name[0], name[0]) + name[1:] for name in names]
    if types and all(_SUFFIXED.fullmatch(name) for name in types):
        return span_names([name if name == OUTSIDE else f"{name[-1]}-{name[:-2]}" for name in names])
    if types and OUTSIDE in names:
        return [name if name == OUTSIDE else f"I-{name}" for name in names]
    return None


def _answered(output: Tensor, words: int, names: Sequence[str]) -> list[int]:
    """The tag of each word; of words beyond the longest input, that they are nothing."""
    tags: list[int] = output.argmax(-1).tolist()
    outside = names.index(OUTSIDE) if OUTSIDE in names else -1
    return tags + [outside] * (words - len(tags))


def _takes_words(tokenizer: Any) -> bool:
    try:
        tokenizer(["a", "b"], is_split_into_words=True)
    except (AssertionError, ValueError):
        return False
    return True


def _item(feature: Any) -> Any:
    """The feature of a list's items; None for a column that holds no lists."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)


def _one_of(
    features: Mapping[str, Any],
    requested: Sequence[str] | None,
    known: Sequence[str],
    lists: Mapping[str, Any],
    *,
    flag: str,
) -> str:
    if requested:
        require_columns(requested, features, flag)
        if requested[0] not in lists or len(requested) > 1:
            raise WrongDataError(
                f"{flag} {', '.join(requested)}: expected one column that holds a list for each example."
            )
        return requested[0]
    named = [name for name in known if name in lists]
    found = named[:1] or list(lists)
    if len(found) == 1:
        return found[0]
    raise WrongDataError(
        f"Which column holds {'words' if flag == '--text-column' else 'tags'} is not clear. Columns: {', '.join(features)}; "
        f"with lists: {', '.join(lists) or 'none'}. Name it with {flag}"
        f"{'.' if flag == '--text-column' else f'; {WITHOUT_LABELS}.'}"
    )


def _words(row: int, words: Any, column: str) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"Row {row} (from 0) has {str(words)[:100]!r} in column {column!r}; expected a list of words.")
    return words


def _listed(tags: Any, column: str) -> list[Any]:
    if tags is not None and not isinstance(tags, list):
        raise DataError(f"Column {column!r} holds {tags!r}; expected a list of tags for each example.")
    check_plain(tags or (), column, expected="a list of tags for each example, names or ids")
    return [tag for tag in tags or [] if tag is not None]


def _ids(row: int, words: Sequence[str], tags: Sequence[Any] | None, labels: LabelMap) -> list[int] | None:
    if tags is None:
        return None
    if len(tags) != len(words):
        raise DataError(
            f"Row {row} (from 0) has {len(words)} words and {len(tags)} tags; expected a tag for each word."
        )
    ids = [labels(tag) for tag in tags]
    return None if None in ids else [tag for tag in ids if tag is not None]


def _first_tokens(words: Sequence[int | None]) -> list[int]:
    """The number of the word that each token begins, else `IGNORED`."""
    seen: set[int | None] = {None}
    found = []
    for word in words:
        found.append(IGNORED if word is None or word in seen else word)
        seen.add(word)
    return found
