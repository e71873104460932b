"""Fill-mask: plain text, of which some tokens are hidden and found again.

Which ones, a seed made of the text decides, so that every model is asked the same. Salazar et al. 2020 hide one token
after the other; this hides a part of them at once, as models are trained (Devlin et al. 2019), and takes one forward.
"""

import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...common.errors import DataError
from ..base import (
    Alignment,
    Batch,
    Columns,
    Encoding,
    Metric,
    Outputs,
    Processor,
    References,
    SumMetric,
    find_column,
)
from ..metrics import leads_among, other_scores
from .tokens import TextTask, is_text, texts

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from ...source.checkpoint import Checkpoint

HIDDEN = 0.15  # of the tokens, as in training
LENGTH = 128  # tokens, if nobody asks for more: logits are as wide as the vocabulary
IGNORED = -100  # of tokens that are not asked for, as transformers has it
KNOWN_TEXTS = ("text", "sentence", "content")
_LOGITS = 1 << 26  # at a time: 256 MiB
_LOG_PROBABILITY, _RECIPROCAL_RANK, _FIRST = range(3)
KEPT = 5  # likeliest tokens that an output names


class Itself(Alignment):
    """What is right is the text."""

    how = "none are read: the hidden tokens are the text's own"


class FillMask(TextTask):
    """Hidden tokens of a text.

    Outputs are float32 `[hidden tokens, 12]`: the right token's log-probability, the reciprocal of its rank, the five
    likeliest tokens, as fractions of the vocabulary, and their log-probabilities.
    """

    name = "fill-mask"
    auto_class = "AutoModelForMaskedLM"
    pipeline_tag = "fill-mask"
    roles: ClassVar[Mapping[str, str]] = {"text": "a text"}

    def processor(self, checkpoint: "Checkpoint", *, max_length: int | None, trust_remote_code: bool) -> Processor:
        found = super().processor(checkpoint, max_length=max_length, trust_remote_code=trust_remote_code)
        if found.tool.mask_token_id is None:
            raise DataError(
                f"The tokenizer of {checkpoint.info.id} has no mask token. Give it one (`tokenizer.mask_token = …`)."
            )
        return Processor(found.tool, max_length or min(found.max_length, LENGTH))

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        held = [name for name, kind in features.items() if is_text(kind)]
        known = [name for name in KNOWN_TEXTS if name in held]
        asked, flag = requested.get("text", ()), "--text-column"
        return {"text": find_column(features, asked, known=known, held=held, what="the text", flag=flag)}

    def align(self, splits: Sequence["Dataset"], columns: Columns) -> Itself:
        return Itself()

    def references(self, rows: "Dataset", columns: Columns, alignment: Itself) -> list[Any]:
        return [text or "" for text in rows[columns["text"][0]]]  # what is no text, `encode` refuses

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> list[Encoding]:
        encoded = self.tokens(processor, texts(rows, columns["text"][0]), return_special_tokens_mask=True)
        names = [name for name in encoded if name != "special_tokens_mask"]
        hidden = [
            _hidden(ids, special)
            for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
        ]
        if not any(hidden):
            raise DataError(f"Column {columns['text'][0]!r} has no text of which a token could be hidden.")
        mask = processor.tool.mask_token_id
        found: list[Encoding] = []
        for row, places in enumerate(hidden):
            ids = encoded["input_ids"][row]
            encoding = {name: encoded[name][row] for name in names}
            encoding["input_ids"] = [mask if place in places else token for place, token in enumerate(ids)]
            encoding["labels"] = [token if place in places else IGNORED for place, token in enumerate(ids)]
            found.append(encoding)
        return found

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        inputs = [{name: value for name, value in row.items() if name != "labels"} for row in encodings]
        batch = super().collate(inputs, processor)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        left = processor.tool.padding_side == "left"
        for row, encoding in zip(labels, encodings, strict=True):
            found = torch.tensor(encoding["labels"])
            row[len(row) - len(found) if left else 0 :][: len(found)] = found
        return {**batch, "labels": labels}

    def outputs(self, model: "nn.Module", batch: Batch) -> list[Tensor]:
        """Float32 `[hidden tokens, 12]` for each example."""
        rows, length = batch["input_ids"].shape
        size = max(1, _LOGITS // (length * self.config.get("vocab_size", 1 << 16)))
        found: list[Tensor] = []
        for start in range(0, rows, size):
            part = {name: value[start : start + size] for name, value in batch.items()}
            logits = model(**self.model_inputs(part)).logits
            found += [_reduced(row[asked != IGNORED], asked) for row, asked in zip(logits, part["labels"], strict=True)]
        return found

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        return {"pseudo_perplexity": PseudoPerplexity(), "top1": InTop(1), "top5": InTop(5)}

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Share of hidden tokens for which the same token comes first."""
        pairs = zip(outputs, others, strict=True)
        same = torch.cat([a[:, _FIRST] == b[:, _FIRST] for a, b in pairs])
        return same.double().mean().item() if len(same) else 1.0

    def margins(self, outputs: Outputs, others: Outputs) -> Tensor:
        """Of log-probabilities, at the hidden token that has least."""
        found = []
        for a, b in zip(outputs, others, strict=True):
            known, scores = b[:, _FIRST : _FIRST + KEPT, None], b[:, _FIRST + KEPT :]
            lead = leads_among(a[:, _FIRST, None], known, scores)
            found.append(lead.amin() if len(a) else lead.new_tensor(torch.inf))
        return torch.stack(found)

    def remarks(self, metric: Metric, outputs: Outputs, others: Outputs, references: References) -> list[str]:
        """The other metrics."""
        return other_scores(self.metrics, metric, outputs, others, references) if metric.of_labels else []


class PseudoPerplexity(SumMetric):
    """The exponential of the mean negative log-probability of hidden tokens."""

    label = "Pseudo-perplexity"
    higher_is_better = False
    in_points = False

    def numbers(self, outputs: Outputs, references: References) -> Tensor:
        return torch.stack([_sum_and_count(-output[:, _LOG_PROBABILITY]) for output in outputs])

    def of_sums(self, sums: Tensor) -> Tensor:
        return (sums[..., 0] / sums[..., 1]).exp()


class InTop(SumMetric):
    """Share of hidden tokens that are among the model's `count` likeliest."""

    def __init__(self, count: int) -> None:
        self.label = f"Top-{count} accuracy"
        self.count = count

    def numbers(self, outputs: Outputs, references: References) -> Tensor:
        return torch.stack([_sum_and_count(output[:, _RECIPROCAL_RANK] > 1 / (self.count + 0.5)) for output in outputs])

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]


def _sum_and_count(values: Tensor) -> Tensor:
    return torch.stack([values.double().sum(), torch.tensor(len(values), dtype=torch.float64)])


def _hidden(ids: Sequence[int], special: Sequence[int]) -> set[int]:
    """Places of a text to hide: the same for the same tokens, at least one if there is one."""
    places = [place for place, is_special in enumerate(special) if not is_special]
    generator = torch.Generator().manual_seed(zlib.crc32(repr(list(ids)).encode()))
    count = max(1, round(HIDDEN * len(places)))
    return {places[i] for i in torch.randperm(len(places), generator=generator)[:count].tolist()}


def _reduced(logits: Tensor, asked: Tensor) -> Tensor:
    """Of logits `[hidden, vocabulary]`, all that is compared: `[hidden, 12]`."""
    right = asked[asked != IGNORED, None]
    log_p = logits.float().log_softmax(1)
    found = log_p.gather(1, right)
    rank = 1 + (log_p > found).sum(1, keepdim=True)
    best, tokens = log_p.topk(KEPT)
    return torch.cat([found, 1 / rank, tokens / log_p.shape[1], best], 1)
