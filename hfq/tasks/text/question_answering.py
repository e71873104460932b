"""Extractive question answering: a question, a text that may hold its answer, and where it does.

Texts longer than the model's input are read in windows that overlap, and the best span of all counts, as transformers'
run_qa example has it: of the 20 likeliest starts and ends, the best pair of at most 30 tokens. Where questions may have
no answer (SQuAD 2.0, Rajpurkar et al. 2018), none is given if the first token scores higher than the span by more than a
threshold, which the float model's answers on the tuning split decide, and nothing else.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ...common.errors import DataError
from ...common.names import REPORT_FILE
from ...common.reading import read_json
from ..base import Batch, Columns, Encoding, Metric, Outputs, Processor, References, SumMetric, Trivial, find_column
from ..metrics import leads_among, other_scores
from .tokens import TextTask, texts

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from torch import nn

    from ...source.checkpoint import Checkpoint

LENGTH = 384  # tokens of a window, and tokens that it shares with the next, as in transformers' example
STRIDE = 128
CANDIDATES = 20
LONGEST_ANSWER = 30  # tokens
THRESHOLD = "null_threshold"
KNOWN = {
    "question": ("question",),
    "context": ("context", "passage", "paragraph", "text"),
    "answers": ("answers", "answer"),
}
_OUTSIDE, _NO_ANSWER = -1.0, -2.0  # in place of where in the text a token is
_START, _END, _SPAN, _NONE = range(4)
KEPT = 5  # spans of which an output says where they are: what other models answer is mostly among them


@dataclass(frozen=True)
class Answers:
    """How answers are given. `may_lack`: whether questions may have none."""

    how: str
    may_lack: bool


@dataclass(frozen=True)
class Asked:
    """What is right for a question: one of several answers, or that there is none."""

    context: str
    answers: tuple[str, ...]


class QuestionAnswering(TextTask):
    """An example is a question with all windows of its text.

    Outputs are float32 `[16]`: where the best span starts and ends, as fractions of the text, its score, and that of no
    answer, the lowest of all windows; then start, end and score of each of the four next best.
    """

    name = "question-answering"
    auto_class = "AutoModelForQuestionAnswering"
    pipeline_tag = "question-answering"
    roles: ClassVar[Mapping[str, str]] = {
        "question": "a question",
        "context": "the text that its answer is in",
        "answers": "as SQuAD has them: texts and where they start; none if the question has no answer",
    }
    text_role: ClassVar[str] = "question"
    label_role: ClassVar[str] = "answers"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.may_lack = False
        self.threshold: float | None = None

    def bound(self, folder: "Path") -> "QuestionAnswering":
        """With the threshold that was decided when the checkpoint was quantized."""
        path = folder / REPORT_FILE
        decided = read_json(path).get("decisions") if path.is_file() else None
        threshold = decided.get(THRESHOLD) if isinstance(decided, dict) else None
        return self._changed(threshold=float(threshold)) if isinstance(threshold, int | float) else self

    def processor(self, checkpoint: "Checkpoint", *, max_length: int | None, trust_remote_code: bool) -> Processor:
        found = super().processor(checkpoint, max_length=max_length, trust_remote_code=trust_remote_code)
        if not found.tool.is_fast:
            raise DataError(
                f"The tokenizer of {checkpoint.info.id} is not a fast one, and only those say where in a text a token is. "
                "Add its tokenizer.json."
            )
        return Processor(found.tool, max_length or min(found.max_length, LENGTH))

    def unfolded(self, rows: "Dataset") -> "Dataset":
        """Of SQuAD's own files, whose rows are articles, a row for each question."""
        if "paragraphs" not in rows.features:
            return rows
        import datasets

        asked: list[Mapping[str, Any]] = []
        for row, paragraphs in enumerate(rows["paragraphs"]):
            try:
                asked += _questions(paragraphs)
            except (KeyError, TypeError) as error:
                raise DataError(
                    f"Row {row} (from 0) of split {str(rows.split or 'given')!r} has {str(paragraphs)[:100]!r} in column "
                    '\'paragraphs\'; expected a list of {"context": …, "qas": [{"question": …, "answers": …}]}, as SQuAD\'s files '
                    "have it. Mend or remove such rows."
                ) from error
        return datasets.Dataset.from_list(asked, split=rows.split)

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        return {role: _column(role, features, requested) for role in self.roles}

    def inputs(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        return {role: _column(role, features, requested) for role in ("question", "context")}

    def align(self, splits: Sequence["Dataset"], columns: Columns) -> Answers:
        (column,) = columns["answers"]
        counts = [
            len(found) for rows in splits for value in rows[column] if (found := _texts(value, column)) is not None
        ]
        if counts and not any(counts):
            raise DataError(
                f"No question has an answer in column {column!r}, so that nothing is told apart. Choose another split, or "
                "--metric fidelity, agreement with FP32."
            )
        if all(counts):
            return Answers("every question has an answer, as in SQuAD 1.1", may_lack=False)
        lacking = counts.count(0) / len(counts)
        return Answers(f"{lacking:.1%} of the questions have no answer, as in SQuAD 2.0", may_lack=True)

    def informed(self, alignment: Answers) -> "QuestionAnswering":
        """Whether no answer may be right is what a dataset knows."""
        return self._changed(may_lack=alignment.may_lack)

    @property
    def undecided(self) -> bool:
        return self.may_lack and self.threshold is None

    @property
    def decisions(self) -> Mapping[str, float]:
        return {THRESHOLD: self.threshold} if self.may_lack and self.threshold is not None else {}

    def decided(self, outputs: Outputs, references: References) -> "QuestionAnswering":
        """With the threshold of the best F1."""
        return self._changed(threshold=best_threshold(outputs, references))

    def references(self, rows: "Dataset", columns: Columns, alignment: Answers) -> list[Any]:
        (column,), contexts = columns["answers"], texts(rows, columns["context"][0], flag="--column context=")
        return [
            _asked(row, context, value, column)
            for row, (context, value) in enumerate(zip(contexts, rows[column], strict=True))
        ]

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> list[Encoding]:
        questions = [text.lstrip() for text in texts(rows, columns["question"][0], flag="--column question=")]
        contexts = texts(rows, columns["context"][0], flag="--column context=")
        tool = processor.tool
        question_first = tool.padding_side == "right"  # as such models were trained
        encoded = self.tokens(
            processor,
            *((questions, contexts) if question_first else (contexts, questions)),
            truncation="only_second" if question_first else "only_first",
            stride=min(STRIDE, _least_room(questions, processor) // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        names = [name for name in encoded if name not in ("overflow_to_sample_mapping", "offset_mapping")]
        found: list[Encoding] = [{name: [] for name in (*names, "labels")} for _ in questions]
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            for name in names:
                found[row][name].append(encoded[name][window])
            places = zip(encoded["offset_mapping"][window], encoded.sequence_ids(window), strict=True)
            size = max(1, len(contexts[row]))
            labels = [
                (start / size, end / size) if part == int(question_first) else (_OUTSIDE, _OUTSIDE)
                for (start, end), part in places
            ]
            ids = encoded["input_ids"][window]
            no_answer = ids.index(tool.cls_token_id) if tool.cls_token_id in ids else 0
            labels[no_answer] = (_NO_ANSWER, _NO_ANSWER)
            found[row]["labels"].append(labels)
        return found

    def length(self, encoding: Encoding) -> int:
        return sum(map(len, encoding["input_ids"]))

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        """Tokens of each window, `[examples, windows, length]`, and as `labels` where in the text each is."""
        windows = [
            {name: values[i] for name, values in row.items() if name != "labels"}
            for row in encodings
            for i in range(len(row["input_ids"]))
        ]
        padded = super().collate(windows, processor)
        counts = torch.tensor([len(row["input_ids"]) for row in encodings])
        there = torch.arange(int(counts.max())) < counts[:, None]
        length = padded["input_ids"].shape[1]
        places = torch.full((len(windows), length, 2), _OUTSIDE)
        left = processor.tool.padding_side == "left"
        for window, labels in zip(places, [labels for row in encodings for labels in row["labels"]], strict=True):
            window[length - len(labels) if left else 0 :][: len(labels)] = torch.tensor(labels)
        return {name: _by_example(rows, there) for name, rows in {**padded, "labels": places}.items()}

    def model_inputs(self, batch: Batch) -> Batch:
        """All windows, one after the other: `[windows, length]`."""
        there = _there(batch)
        return {name: rows[there] for name, rows in super().model_inputs(batch).items()}

    def outputs(self, model: "nn.Module", batch: Batch) -> list[Tensor]:
        """Float32 `[16]` for each example."""
        there = _there(batch)
        answer = model(**self.model_inputs(batch))
        spans, none = _best_spans(answer.start_logits.float(), answer.end_logits.float(), batch["labels"][there])
        windows = there.sum(1).tolist()
        outputs = []
        for rows, no_answers in zip(spans.split(windows), none.split(windows), strict=True):
            best = _best_of(rows.flatten(0, 1))
            outputs.append(torch.cat([best[0], no_answers.amin()[None], best[1:].flatten()]))
        return outputs

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """torchmetrics' SQuAD; where questions may have no answer, those that have one and the others apart, too."""
        threshold = (self.threshold or 0.0) if self.may_lack else None
        found: dict[str, Metric] = {"f1": Squad("f1", threshold), "exact_match": Squad("exact_match", threshold)}
        if self.may_lack:
            found |= {
                "has_answer_f1": Squad("f1", threshold, having=True),
                "no_answer_f1": Squad("f1", threshold, having=False),
            }
        return found

    def per_example(self, outputs: Outputs, references: References) -> Tensor:
        """bool `[examples]`: whether the answer is one of the right ones, word by word."""
        return self.metrics["exact_match"].numbers(outputs, references)[:, 0] > 0  # type: ignore[attr-defined]

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Share of questions with the same span, or with no answer by both."""
        a, b = torch.stack(list(outputs)), torch.stack(list(others))
        same = (a[:, :_SPAN] == b[:, :_SPAN]).all(1)
        if self.may_lack:
            none, other = (rows[:, _NONE] - rows[:, _SPAN] > (self.threshold or 0.0) for rows in (a, b))
            same = (same & ~none & ~other) | (none & other)
        return same.double().mean().item()

    def margins(self, outputs: Outputs, others: Outputs) -> Tensor:
        """Of scores of spans, or of no answer."""
        (answers, own), (known, scores) = map(self._ranked, (outputs, others))
        answer = answers[torch.arange(len(answers)), own.argmax(1)]
        return leads_among(answer, known, scores)

    def _ranked(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """The known answers, `[examples, answers, 2]`, and their scores."""
        rows = torch.stack(list(outputs))
        none = rows[:, _NONE] - (self.threshold or 0.0)
        spans = torch.cat([rows[:, :_NONE], rows[:, _NONE + 1 :]], 1).unflatten(1, (-1, 3))
        places, scores = spans[..., :_SPAN], spans[..., _SPAN]
        if not self.may_lack:
            return places, scores
        return torch.cat([places, torch.full_like(places[:, :1], _NO_ANSWER)], 1), torch.cat([scores, none[:, None]], 1)

    def remarks(self, metric: Metric, outputs: Outputs, others: Outputs, references: References) -> list[str]:
        """The other metrics: of questions with and without an answer apart, too."""
        return other_scores(self.metrics, metric, outputs, others, references) if metric.of_labels else []

    def trivial(self, metric: str, references: References) -> Trivial | None:
        """Never an answer, where that may be right."""
        if not self.may_lack:
            return None
        nothing = torch.tensor([0.0, 0.0, 0.0, 1e6])
        return Trivial(self.score(metric, [nothing] * len(references), references), "giving no answer")

    def usage(self, tag: str) -> str:
        """transformers 5 has no pipeline for it."""
        return (
            "from transformers import AutoModelForQuestionAnswering, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("{model}")\n'
            'model = AutoModelForQuestionAnswering.from_pretrained("{model}")\n'
            'tokens = tokenizer("What do bees make?", "In summer bees make honey.", return_tensors="pt")\n'
            "answer = model(**tokens)\n"
            "start, end = answer.start_logits.argmax(), answer.end_logits.argmax()\n"
            "print(tokenizer.decode(tokens.input_ids[0, start : end + 1]))"
        )

    def _changed(self, **attributes: Any) -> "QuestionAnswering":
        found = copy.copy(self)
        found.__dict__.pop("metrics", None)
        found.__dict__.update(attributes)
        return found


class Squad(SumMetric):
    """F1 of words, or exact match, by torchmetrics, as a fraction.

    `threshold`: how much more than the span's the score of no answer has to be; None where every question has one.
    `having`: only of questions that have an answer, or of those that have none.
    """

    def __init__(self, kind: str, threshold: float | None, *, having: bool | None = None) -> None:
        of = {None: "", True: ", questions with an answer", False: ", questions without an answer"}[having]
        self.label = {"f1": "F1", "exact_match": "Exact match"}[kind] + of
        self.kind = kind
        self.threshold = threshold
        self.having = having

    def numbers(self, outputs: Outputs, references: References) -> Tensor:
        rows = []
        for output, asked in zip(outputs, references, strict=True):
            counts = self.having in (None, bool(asked.answers))
            rows.append([compared(given(output, asked, self.threshold), asked.answers)[self.kind] * counts, counts])
        return torch.tensor(rows, dtype=torch.float64)

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]


def given(output: Tensor, asked: Asked, threshold: float | None) -> str:
    """The text of an answer; nothing where the model gives none."""
    start, end, span, none = output[: _NONE + 1].tolist()
    if threshold is not None and none - span > threshold:
        return ""
    size = len(asked.context)
    return asked.context[round(start * size) : round(end * size)]


@lru_cache(maxsize=1 << 16)
def compared(answer: str, right: tuple[str, ...]) -> Mapping[str, float]:
    """F1 and exact match, as fractions, of the answer that fits best."""
    from torchmetrics.functional.text import squad  # takes a second to import

    target: dict[str, Any] = {"answers": {"text": list(right) or [""], "answer_start": [0]}, "id": "0"}
    found = squad([{"prediction_text": answer, "id": "0"}], [target])
    return {name: value.item() / 100 for name, value in found.items()}


def best_threshold(outputs: Outputs, references: References) -> float:
    """The threshold by which F1 is best, in the middle between two questions, the one nearest to zero of several."""
    pairs = list(zip(outputs, references, strict=True))
    margins = torch.tensor([(output[_NONE] - output[_SPAN]).item() for output in outputs], dtype=torch.float64)
    order = margins.argsort()
    spans = torch.tensor([compared(given(output, asked, None), asked.answers)["f1"] for output, asked in pairs])[order]
    nothing = torch.tensor([float(not asked.answers) for _, asked in pairs])[order]
    margins = margins[order]
    edges = torch.cat([margins[:1] - 1, (margins[1:] + margins[:-1]) / 2, margins[-1:] + 1])
    # answered: those whose margin is at most the threshold
    totals = (
        torch.cat([spans.new_zeros(1), spans.cumsum(0)])
        + nothing.sum()
        - torch.cat([spans.new_zeros(1), nothing.cumsum(0)])
    )
    best = edges[totals >= totals.max() - 1e-6]
    return float(best[best.abs().argmin()])


def _best_spans(starts: Tensor, ends: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The best spans of each window, `[windows, KEPT, 3]`, and the score of no answer, `[windows]`.

    Logits: `[windows, length]`; `places`: `[windows, length, 2]`. Where there are too few, they are at 0, as bad as can be.
    """
    inside = places[..., 0] >= 0
    count = min(CANDIDATES, starts.shape[1])
    (start, first), (end, last) = ((x.where(inside, -torch.inf)).topk(count) for x in (starts, ends))
    scores = start[:, :, None] + end[:, None, :]
    span = last[:, None, :] - first[:, :, None]
    scores = scores.where((span >= 0) & (span < LONGEST_ANSWER), -torch.inf).flatten(1)
    scores = functional.pad(scores, (0, KEPT), value=-torch.inf)  # a short window has few
    best, at = scores.topk(KEPT)
    at = at.clamp(max=count * count - 1)
    worst = (starts.amin(1) + ends.amin(1))[:, None]  # of a window in which nothing can be an answer
    begin = places[..., 0].gather(1, first.gather(1, at // count))
    finish = places[..., 1].gather(1, last.gather(1, at % count))
    found, zero = best.isfinite(), torch.zeros_like(begin)
    spans = torch.stack([begin.where(found, zero), finish.where(found, zero), best.where(found, worst)], 2)
    none = (places[..., 0] == _NO_ANSWER).int().argmax(1, keepdim=True)
    return spans, (starts.gather(1, none) + ends.gather(1, none)).squeeze(1)


def _best_of(spans: Tensor) -> Tensor:
    """The best `KEPT` of spans `[n, 3]`, where windows overlap each once; what is missing, as a window has it."""
    spans = spans[spans[:, _SPAN].argsort(descending=True)]
    first: dict[tuple[float, ...], int] = {}
    for i, (start, end, _) in enumerate(spans.tolist()):
        first.setdefault((start, end), i)
    best = spans[list(first.values())[:KEPT]]
    missing = torch.tensor([0.0, 0.0, spans[-1, _SPAN]]).expand(KEPT - len(best), 3)
    return torch.cat([best, missing])


def _there(batch: Batch) -> Tensor:
    """bool `[examples, windows]`: which windows are an example's, and not there to fill the batch."""
    return (batch["labels"][..., 0] == _NO_ANSWER).any(-1)


def _by_example(rows: Tensor, there: Tensor) -> Tensor:
    """Rows of all windows, `[all, …]`, as `[examples, windows, …]`."""
    found = rows.new_full((*there.shape, *rows.shape[1:]), _OUTSIDE if rows.is_floating_point() else 0)
    found[there] = rows
    return found


def _questions(paragraphs: Any) -> list[Mapping[str, Any]]:
    """Those of an article in SQuAD's own files. Raises `KeyError` or `TypeError` where it is none."""
    return [
        {"question": each["question"], "context": paragraph["context"], "answers": each.get("answers")}
        for paragraph in paragraphs
        for each in paragraph["qas"]
    ]


def _least_room(questions: Sequence[str], processor: Processor) -> int:
    """Tokens that the longest question leaves of a window for its text.

    Raises:
        DataError: it leaves nearly none.
    """
    lengths = [
        len(ids) for ids in processor.tool(list(questions), add_special_tokens=False, verbose=False)["input_ids"]
    ]
    room = processor.max_length - max(lengths) - processor.tool.num_special_tokens_to_add(pair=True)
    if room < 2:
        row = lengths.index(max(lengths))
        raise DataError(
            f"The question of row {row} (from 0) has {max(lengths)} tokens, which leaves none of {processor.max_length} for "
            "its text. Remove it, or raise --max-length."
        )
    return room


def _column(role: str, features: Mapping[str, Any], requested: Columns) -> list[str]:
    flag = f"--column {role}=…"
    return find_column(features, requested.get(role, ()), known=KNOWN[role], what=f"the {role}", flag=flag)


def _texts(value: Any, column: str) -> list[Any] | None:
    """The texts of answers in SQuAD's form: lists by name, or a list of pairs. None where nothing is said of them.

    Raises:
        DataError: they are in another form.
    """
    return None if value is None else _parts(value, "text", column)


def _parts(value: Any, name: str, column: str) -> list[Any]:
    """Of each answer, what is called `name`."""
    answers = value if isinstance(value, list) else [value]
    if not all(isinstance(each, dict) and "text" in each for each in answers):
        raise DataError(
            f"Column {column!r} holds {str(value)[:100]!r}; expected answers as SQuAD has them, such as "
            '{"text": ["France"], "answer_start": [12]}.'
        )
    if isinstance(value, list):
        return [each.get(name) for each in value]
    found = value.get(name)
    return found if isinstance(found, list) else [found]


def _asked(row: int, context: str, value: Any, column: str) -> Asked | None:
    """Raises `DataError` where an answer is not where it is said to be."""
    found = _texts(value, column)
    if found is None:
        return None
    starts = _parts(value, "answer_start", column)
    starts = [None] * len(found) if set(starts) <= {None} else starts  # they may be left out, of all answers
    if len(starts) != len(found):
        raise DataError(
            f"Row {row} (from 0) has {len(found)} answers and {len(starts)} places where they start in column {column!r}; expected "
            "one for each, or none at all. Mend or remove such rows."
        )
    for text, start in zip(found, starts, strict=True):
        if text == "":
            raise DataError(
                f"Row {row} (from 0) has an answer without text in column {column!r}. Expected an empty list where a question has "
                "no answer. Mend or remove such rows."
            )
        if not isinstance(text, str) or text not in context:
            raise DataError(
                f"Row {row} (from 0) has the answer {str(text)[:100]!r} in column {column!r}, which is not in its text. Mend or "
                "remove such rows."
            )
        place = _place(start, row, column)
        if place is not None and not context.startswith(text, place):
            raise DataError(
                f"Row {row} (from 0) has the answer {text[:100]!r} at {place} in column {column!r}, where its text has "
                f"{context[place : place + len(text)][:100]!r}. Mend or remove such rows."
            )
    return Asked(context, tuple(found))


def _place(start: Any, row: int, column: str) -> int | None:
    """Where an answer starts; None where nothing is said. Raises `DataError` where that is no place in a text."""
    if start is None:
        return None
    written = str(start).strip().removesuffix(".0")  # of a column in which some are missing, whole numbers are floats
    if not written.isdecimal():
        raise DataError(
            f"Row {row} (from 0) has an answer that starts at {start!r} in column {column!r}; expected the number of characters "
            "before it, 0 or more. Mend or remove such rows."
        )
    return int(written)
