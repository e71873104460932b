"""Sentence embedding: a vector for each text, such that texts of like meaning are near each other.

What is quantized is the transformer. What makes one vector of its tokens' vectors, pooling and more, is
sentence-transformers' own and stays float.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from ...common.errors import DataError, SourceError, UsageError, WrongDataError
from ...source.contents import MODULES_FILE, SENTENCE_CONFIG
from ...source.sentence_model import SentenceModel, import_sentence_transformers, load_head, read_sentence_model
from ..base import Batch, Columns, Encoding, Metric, Outputs, Processor, References, Trivial, require_columns
from ..labels import check_varied
from ..metrics import MeanOf, Torchmetric, stacked
from .ranking import DEPTH, Ranking, gains_in_order, ranking_metrics
from .regression import UNLABELLED, as_number
from .tokens import TextTask, is_text, known_texts, texts

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from ...source.checkpoint import Checkpoint

RELEVANT = "relevant"  # columns of retrieval data, as `hfq.data.beir` reads it
TRIPLETS = (("anchor", "positive", "negative"), ("query", "positive", "negative"))
POSITIVES = (
    *(("anchor", "positive"), ("query", "positive"), ("query", "answer"), ("question", "answer")),
    *(("query", "passage"), ("query", "document"), ("question", "context")),
)
PAIRS = (
    *(("sentence1", "sentence2"), ("text1", "text2"), ("sentence_A", "sentence_B"), ("question1", "question2")),
    *(("premise", "hypothesis"), ("text", "text_pair")),
)
SCORES = ("score", "similarity_score", "similarity", "relatedness_score", "sim", "label", "labels")
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # in the order in which `encode_document` looks for them
SCALES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 5.0))  # of similarity, as data sets have them
SINGLE = -1  # for the number of an example, where each has one text
NEIGHBOURS = 10
MOST_TEXTS = 2000  # whose neighbours are compared
IN_COMPANY = 32  # texts that are looked at in a batch, alone and padded
MOST_PADDED = 512  # tokens
_AT_ONCE = 256  # queries whose similarity to every document is held in memory


@dataclass(frozen=True)
class Query:
    """A text that is asked with. `relevant`: how relevant each document is that is so, by id."""

    id: str
    relevant: Mapping[str, float]


@dataclass(frozen=True)
class Document:
    """A text that is to be found."""

    id: str


@dataclass(frozen=True)
class Judgement:
    """What the data says of its texts. `kind`: `retrieval`, `triplets`, `positives` or `scores`."""

    kind: str
    how: str


class SentenceEmbedding(TextTask):
    """Vectors, judged by pairs with a score, by triplets, by pairs that belong together, or by what a query finds."""

    name = "sentence-embedding"
    auto_class = "AutoModel"
    pipeline_tag = "sentence-similarity"
    other_tags: ClassVar[Sequence[str]] = ("feature-extraction",)
    roles: ClassVar[Mapping[str, str]] = {
        "text": "a pair, or anchor, positive and negative; of retrieval data (BEIR: corpus, queries, qrels), the texts",
        "label": "of a pair, how alike it is; of a query, what is relevant",
        "query": "of retrieval data, a query's id",
        "document": "of retrieval data, a document's id",
    }
    settings: ClassVar[Sequence[str]] = ("pooling", "prompt")
    library = "sentence-transformers"
    kind: ClassVar[str] = "SentenceTransformer"
    default_similarity: ClassVar[str] = "cosine"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.source: SentenceModel | None = None
        self.head: Sequence[nn.Module] = ()
        self.judgement: str | None = None
        self.similarity = self.default_similarity
        if _is_half(config):
            self.auto_class = "AutoModelForTextEncoding"  # type: ignore[misc]

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """An encoder of tokens without a head."""
        names = config.get("architectures") or []
        return "vocab_size" in config and all(str(name).endswith("Model") for name in names)

    @classmethod
    def claims(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        found = read_sentence_model(folder)
        return found is not None and found.is_own and found.kind == cls.kind and not found.has("SpladePooling")

    def bound(self, folder: Path) -> "SentenceEmbedding":
        import_sentence_transformers()
        self.source = read_sentence_model(folder)
        self.head = self.head_of(folder)
        if self.source:
            self.similarity = self.source.similarity or self.default_similarity
        self._prompt(self.given.get("prompt"))
        return self

    def head_of(self, folder: Path) -> "list[nn.Module]":
        """What makes vectors of the transformer's output.

        Raises:
            UsageError: it is not said, or twice.
        """
        pooling = self.given.get("pooling")
        if self.source:
            if pooling:
                raise UsageError(
                    f"--pooling {pooling}: {folder.name} has modules of its own, which say it. Leave it out."
                )
            return load_head(folder, self.source)
        if not pooling:
            raise UsageError(
                f"{folder.name} is an encoder without modules.json: how its tokens become one vector is not said. Pass "
                "--pooling mean, cls, max or lasttoken, as it was trained; or --task, if it is for something else."
            )
        from sentence_transformers.sentence_transformer.modules import Pooling

        return [Pooling(int(self.config.get("hidden_size") or 0), pooling)]

    # Data

    def processor(self, checkpoint: "Checkpoint", *, max_length: int | None, trust_remote_code: bool) -> Processor:
        found = super().processor(checkpoint, max_length=max_length, trust_remote_code=trust_remote_code)
        own = self.source.transformer.get("max_seq_length") if self.source else None
        if max_length is None and isinstance(own, int) and own > 1:
            return Processor(found.tool, min(found.max_length, own))
        return found

    def inputs(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        """The columns of texts: one, or those of each example in their order."""
        if RELEVANT in features and not requested:
            return {"text": ["text"], "query": ["query_id"]}
        return {"text": _text_columns(features, requested)}

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        read = self.inputs(features, requested)
        if "query" in read:
            return {**read, "document": ["document_id"], "label": [RELEVANT]}
        names = read["text"]
        scores = score_column(features, requested, names) if len(names) == 2 else []
        if len(names) == 3 or scores or tuple(names) in POSITIVES or requested.get("text", ()) == names:
            return {**read, "label": scores}
        raise WrongDataError(
            f"By what embeddings are to be judged is not clear. Columns: {', '.join(features)}; texts: "
            f"{', '.join(names)}. Expected two texts and a score (--label-column), (anchor, positive, negative), "
            "(query, positive), or corpus, queries and qrels as BEIR has them."
        )

    def lacks_labels(self, features: Mapping[str, Any], requested: Columns) -> bool:
        """Whether there are but texts of which nothing says which belong together."""
        if requested.get("label"):
            return False
        try:
            self.columns(features, requested)
        except DataError:
            read = [name for name, feature in features.items() if is_text(feature)]
            return 0 < len(features) == len(read) <= 2
        return False

    def align(self, splits: Sequence["Dataset"], columns: Columns) -> Judgement:
        if columns.get("query"):
            without = sum(key is not None and not found for key, found in _judged(splits[0], columns))
            skipped = f"; {without} queries without a relevant document do not count" if without else ""
            return Judgement("retrieval", f"relevance of documents to queries{skipped}")
        if not columns["label"]:
            triplets = len(columns["text"]) == 3
            return Judgement(
                *(("triplets", "the positive is nearer") if triplets else ("positives", "pairs belong together"))
            )
        (column,) = columns["label"]
        for rows in splits:
            check_scores(rows, column)
        return Judgement("scores", "how alike two texts are, as it is")

    def references(self, rows: "Dataset", columns: Columns, alignment: Judgement) -> list[Any]:
        if alignment.kind == "scores":
            return _scores(rows, columns["label"][0])
        if alignment.kind == "retrieval":
            judged = _judged(rows, columns)
            ids = zip(judged, rows[columns["document"][0]], strict=True)
            return [Document(own) if key is None else Query(key, found) for (key, found), own in ids]
        return list(zip(*(texts(rows, name) for name in columns["text"]), strict=True))

    def encode(self, rows: "Dataset", columns: Columns, processor: Processor) -> list[Encoding]:
        """The tokens of a row's texts, of several under `texts`. `prompt`: how many of them are the prompt's."""
        if columns.get("query"):
            asked = [key is not None for key in rows[columns["query"][0]]]
            of_queries, of_documents = (
                self.given.get("prompt") or self._first_prompt("query"),
                self._first_prompt(*DOCUMENT_PROMPTS),
            )
            prompts = [self._prompt(of_queries if query else of_documents, default=False) for query in asked]
        else:
            prompts = [self._prompt(self.given.get("prompt"))] * len(rows)
        encoded = [self._encoded(texts(rows, name), prompts, processor) for name in columns["text"]]
        if len(encoded) == 1:
            return encoded[0]
        return [{"texts": list(row)} for row in zip(*encoded, strict=True)]

    def length(self, encoding: Encoding) -> int:
        return max(len(one["input_ids"]) for one in encoding.get("texts", [encoding]))

    def excerpt(self, encoding: Encoding, processor: Processor) -> str:
        """Its texts, one after the other."""
        return " | ".join(
            super(SentenceEmbedding, self).excerpt(one, processor) for one in encoding.get("texts", [encoding])
        )

    def collate(self, encodings: Sequence[Encoding], processor: Processor) -> Batch:
        """A row for each text. `labels`: int64 `[texts, 2]`, whose example it is, and how many of its tokens are no part of it.

        Examples of one text need none, unless their prompts are left out: then -1 stands for the example.
        """
        rows = [(example, one) for example, row in enumerate(encodings) for one in row.get("texts", [row])]
        inputs = [{name: ids for name, ids in one.items() if name != "prompt"} for _, one in rows]
        batch = super().collate(inputs, processor)
        left_out = [one["prompt"] if self._leaves_prompt_out else 0 for _, one in rows]
        several = len(rows) > len(encodings)
        if several or any(left_out):
            examples = [example if several else SINGLE for example, _ in rows]
            batch["labels"] = torch.tensor(list(zip(examples, left_out, strict=True)))
        return batch

    # Outputs

    def outputs(self, model: "nn.Module", batch: Batch) -> list[Tensor]:
        """Vectors: float32 `[dim]` for an example of one text, else `[texts, dim]`."""
        labels = batch.get("labels")
        mask = batch["attention_mask"]
        vectors = self.vectors(
            model, self.model_inputs(batch), mask if labels is None else _without_prompts(mask, labels[:, 1])
        )
        if labels is None or labels[0, 0] == SINGLE:
            return list(vectors.unbind())
        return [vectors[labels[:, 0] == example] for example in labels[:, 0].unique()]

    def vectors(self, model: "nn.Module", inputs: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        """float32 `[texts, dim]`. `mask`: int64 `[texts, length]`, the tokens that count in pooling."""
        features: dict[str, Any] = {"token_embeddings": model(**inputs)[0].float(), "attention_mask": mask}
        try:
            for module in self.head:
                features = module(features)
            found: Tensor = features["sentence_embedding"]
        except (KeyError, RuntimeError) as error:
            raise SourceError(
                f"The modules behind the transformer make no vector of what it puts out ({error}). Take {MODULES_FILE} and all of "
                "its folders from the same checkpoint."
            ) from error
        longest = self.source.truncate_dim if self.source else None
        if longest and longest > found.shape[1]:
            raise SourceError(
                f"{SENTENCE_CONFIG} has the truncate_dim {longest}, and the model's vectors have {found.shape[1]} dimensions. Take "
                "it away, or name fewer."
            )
        return found[:, :longest]

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """Those of what the data says; before it is known, all."""
        scored = partial(_scored, self.similarity)
        rankings = ranking_metrics(partial(_ranked, self.similarity), "ndcg_at_10", "mrr_at_10", "map", "recall_at_100")
        found: dict[str, Mapping[str, Metric]] = {
            "scores": {
                "spearman": Torchmetric(f"Spearman of {self.similarity}", "spearman_corrcoef", scored),
                "pearson": Torchmetric(f"Pearson of {self.similarity}", "pearson_corrcoef", scored),
            },
            "triplets": {"triplet_accuracy": MeanOf("Triplet accuracy", partial(_nearer, self.similarity))},
            "retrieval": rankings,
            "positives": rankings,
        }
        if self.judgement:
            return found[self.judgement]
        return {name: metric for metrics in found.values() for name, metric in metrics.items()}

    def per_example(self, outputs: Outputs, references: References) -> Tensor | None:
        """bool `[examples]`: of triplets, whether the positive is nearer."""
        return _nearer(self.similarity, outputs, references).bool() if self.judgement == "triplets" else None

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Mean cosine of the vectors of the same text."""
        a, b = (all_vectors(rows).double() for rows in (outputs, others))
        return cosine_similarity(a, b).mean().clamp(0, 1).item()

    def remarks(self, metric: Metric, outputs: Outputs, others: Outputs, references: References) -> list[str]:
        """Whether texts have the same neighbours, and the metric of shorter vectors, where the source names some."""
        first, second = all_vectors(outputs), all_vectors(others)
        found = []
        if len(first) > 2 * NEIGHBOURS:
            share = _same_neighbours(self.similarity, first, second)
            found.append(f"Of the {NEIGHBOURS} texts that are nearest to each, {share:.1%} are the same.")
        for dim in self.source.dims if self.source and metric.of_labels else ():
            if dim < first.shape[-1]:
                a, b = (metric.score([row[..., :dim] for row in rows], references) for rows in (outputs, others))
                found.append(f"Cut to {dim} dimensions, the float model scores {a:.4f} and INT8 {b:.4f}.")
        return found

    def company(self, model: "nn.Module", batch: Batch, processor: Processor) -> list[str]:
        """Texts in a batch, alone and padded: the smallest cosine of their vectors."""
        inputs = {name: rows[:IN_COMPANY] for name, rows in self.model_inputs(batch).items()}
        mask = inputs["attention_mask"]
        count, length = mask.shape
        longest = max(length, min(processor.max_length, MOST_PADDED))
        padding = {"input_ids": processor.tool.pad_token_id}
        padded = {name: pad(x, (0, longest - length), value=padding.get(name, 0)) for name, x in inputs.items()}
        alone = [{name: x[row : row + 1, mask[row].bool()] for name, x in inputs.items()} for row in range(count)]
        together = self.vectors(model, inputs, mask)
        others = (
            torch.cat([self.vectors(model, one, one["attention_mask"]) for one in alone]),
            self.vectors(model, padded, padded["attention_mask"]),
        )
        least = min(cosine_similarity(together.double(), other.double()).min().item() for other in others)
        return [
            f"The vectors of {count} texts in a batch, of the same alone, and padded to {longest} tokens have cosines of at "
            f"least {least:.4f}."
        ]

    def trivial(self, metric: str, references: References) -> Trivial | None:
        """Always the same vector: it correlates with nothing."""
        return Trivial(0.0, "answering the same vector") if self.judgement == "scores" else None

    def informed(self, alignment: Judgement) -> "SentenceEmbedding":
        """With the metrics that the data allows."""
        found = copy.copy(self)
        found.judgement = alignment.kind
        found.__dict__.pop("metrics", None)
        return found

    def usage(self, tag: str) -> str:
        """Encoding two texts."""
        if self.source:
            opened = f'from sentence_transformers import {self.kind}\n\nmodel = {self.kind}("{{model}}", device="cpu")'
        else:
            opened = (
                "from sentence_transformers import SentenceTransformer\n"
                "from sentence_transformers.sentence_transformer.modules import Pooling, Transformer\n\n"
                'encoder = Transformer("{model}")\n'
                f'pooling = Pooling(encoder.get_embedding_dimension(), "{self.given.get("pooling")}")\n'
                'model = SentenceTransformer(modules=[encoder, pooling], device="cpu")'
            )
        return (
            f'{opened}\nvectors = model.encode(["It is warm today.", "The sun shines."])\n'
            "similarities = model.similarity(vectors, vectors)"
        )

    # Prompts

    @property
    def _leaves_prompt_out(self) -> bool:
        return any(not getattr(module, "include_prompt", True) for module in self.head)

    def _first_prompt(self, *names: str) -> str | None:
        prompts = self.source.prompts if self.source else {}
        return next((name for name in names if name in prompts), None)

    def _prompt(self, name: str | None, *, default: bool = True) -> str:
        """The text that stands before each text.

        Raises:
            UsageError: the model has no prompt of that name.
        """
        prompts = self.source.prompts if self.source else {}
        if name is None and default and self.source:
            name = self.source.default_prompt
        if name is not None and name not in prompts:
            raise UsageError(f"--prompt {name} is no prompt of the model, which has {', '.join(prompts) or 'none'}.")
        return prompts[name] if name is not None else ""

    def _encoded(self, found: Sequence[str], prompts: Sequence[str], processor: Processor) -> list[Encoding]:
        whole = [prompt + text for prompt, text in zip(prompts, found, strict=True)]
        if self.source and self.source.transformer.get("do_lower_case"):
            whole = [text.lower() for text in whole]
        encoded = self.tokens(processor, whole)
        tokens = {prompt: _prompt_tokens(prompt, processor.tool) for prompt in set(prompts)}
        return [
            {**{name: encoded[name][row] for name in encoded}, "prompt": tokens[prompt]}
            for row, prompt in enumerate(prompts)
        ]


def _is_half(config: Mapping[str, Any]) -> bool:
    """Whether `AutoModel` makes an encoder and a decoder of it, of which sentence-transformers reads the first (T5)."""
    if "model_type" not in config:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as NAMES

    return str(NAMES.get(config["model_type"], "")).endswith("EncoderModel")


def all_vectors(outputs: Outputs) -> Tensor:
    """float32 `[texts, dim]`, of examples with one text or several."""
    return torch.cat([output.reshape(-1, output.shape[-1]) for output in outputs])


def _same_neighbours(similarity: str, first: Tensor, second: Tensor) -> float:
    """Share of the other texts nearest to each that are so by both kinds of vectors; of `MOST_TEXTS`, evenly spaced."""
    step = -(-len(first) // MOST_TEXTS)
    nearest = []
    for vectors in (first[::step], second[::step]):
        alike = _all_alike(similarity, vectors, vectors).fill_diagonal_(-torch.inf)
        nearest.append(torch.zeros_like(alike).scatter_(1, alike.topk(NEIGHBOURS).indices, 1))
    return (nearest[0] * nearest[1]).sum().item() / (NEIGHBOURS * len(nearest[0]))


def _text_columns(features: Mapping[str, Any], requested: Columns) -> list[str]:
    asked = list(requested.get("text", ()))
    require_columns(asked, features, "--text-column")
    if len(asked) > 3:
        raise WrongDataError(
            f"--text-column was given {len(asked)} times; at most three texts are compared with each other."
        )
    if asked:
        return asked
    labels = requested.get("label", ())
    if names := known_texts(features, (*TRIPLETS, *PAIRS, *POSITIVES), without=labels):
        return names
    found = [name for name, feature in features.items() if is_text(feature) and name not in labels]
    if len(found) in (1, 2):
        return found
    raise WrongDataError(
        f"Which columns hold the texts is not clear. Columns: {', '.join(features)}; with text: "
        f"{', '.join(found) or 'none'}. Name them with --text-column, in order."
    )


def score_column(features: Mapping[str, Any], requested: Columns, names: Sequence[str]) -> list[str]:
    asked = list(requested.get("label", ()))
    require_columns(asked, features, "--label-column")
    if len(asked) > 1:
        raise WrongDataError(f"{len(asked)} label columns were given; a pair has one score.")
    return asked or [name for name in SCORES if name in features and name not in names][:1]


def check_scores(rows: "Dataset", column: str) -> None:
    """Refuse scores that say nothing, or of which some are of another scale than the others.

    Raises:
        DataError: naming the row.
    """
    if len(getattr(rows.features[column], "names", None) or []) > 2:
        raise DataError(
            f"Column {column!r} holds classes ({', '.join(rows.features[column].names[:5])}), and not how alike two texts are. "
            "Name a column of scores with --label-column."
        )
    values = [value for value in _scores(rows, column) if value is not None]
    check_varied(rows, column, values)
    for low, high in SCALES:
        outside = [row for row, value in enumerate(values) if not low <= value <= high]
        if not outside:
            return
        if len(outside) <= len(values) // 20:
            raise DataError(
                f"Row {outside[0]} (from 0) of split {str(rows.split or 'given')!r} has the score {values[outside[0]]:g} in column "
                f"{column!r}, and {len(values) - len(outside)} of {len(values)} are from {low:g} to {high:g}. Mend or remove such rows."
            )


def _scores(rows: "Dataset", column: str) -> list[float | None]:
    values = [as_number(value, row, column) for row, value in enumerate(rows[column])]
    return [None] * len(values) if set(values) == {UNLABELLED} else values


def _judged(rows: "Dataset", columns: Columns) -> list[tuple[str | None, dict[str, float]]]:
    """Of each row, the query's id, and the relevance of documents to it."""
    (query,), (label,) = columns["query"], columns["label"]
    return [
        (key, {judged["document_id"]: judged["score"] for judged in found or ()})
        for key, found in zip(rows[query], rows[label], strict=True)
    ]


def _prompt_tokens(prompt: str, tokenizer: Any) -> int:
    """The tokens that a prompt takes at the start of a text, as sentence-transformers counts them."""
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    return len(ids) - bool(ids and ids[-1] in tokenizer.all_special_ids)


def _without_prompts(mask: Tensor, tokens: Tensor) -> Tensor:
    """The attention mask without the first tokens of each row that count."""
    return mask * (mask.cumsum(1) > tokens[:, None])


def _alike(similarity: str, first: Tensor, second: Tensor) -> Tensor:
    """float64 `[pairs]`, of vectors `[pairs, dim]`."""
    from sentence_transformers.util import SimilarityFunction

    found: Tensor = SimilarityFunction.to_similarity_pairwise_fn(similarity)(first, second)
    return found.double()


def _all_alike(similarity: str, first: Tensor, second: Tensor) -> Tensor:
    """float32 `[first, second]`."""
    from sentence_transformers.util import SimilarityFunction

    found: Tensor = SimilarityFunction.to_similarity_fn(similarity)(first, second)
    return found


def _scored(similarity: str, outputs: Outputs, references: References) -> tuple[Tensor, Tensor]:
    pairs = stacked(outputs)
    return _alike(similarity, pairs[:, 0], pairs[:, 1]), torch.tensor(references, dtype=torch.float64)


def _nearer(similarity: str, outputs: Outputs, references: References) -> Tensor:
    anchors, positives, negatives = stacked(outputs).unbind(1)
    return (_alike(similarity, anchors, positives) > _alike(similarity, anchors, negatives)).double()


def _ranked(similarity: str, outputs: Outputs, references: References) -> Ranking:
    if all(isinstance(found, tuple) for found in references):
        return _ranked_positives(similarity, outputs, references)
    documents = {found.id: outputs[row] for row, found in enumerate(references) if isinstance(found, Document)}
    asked = {row: found for row, found in enumerate(references) if isinstance(found, Query) and found.relevant}
    relevant = [found.relevant for found in asked.values()]
    return _ranking(similarity, {row: outputs[row] for row in asked}, documents, relevant)


def _ranked_positives(similarity: str, outputs: Outputs, references: References) -> Ranking:
    """Each first text asks for the second texts that it is paired with, among all of them."""
    documents = {second: output[1] for (_, second), output in zip(references, outputs, strict=True)}
    relevant: dict[str, dict[str, float]] = {}
    rows: dict[str, int] = {}
    for row, (first, second) in enumerate(references):
        rows.setdefault(first, row)
        relevant.setdefault(first, {})[second] = 1.0
    return _ranking(similarity, {row: outputs[row][0] for row in rows.values()}, documents, list(relevant.values()))


def _ranking(
    similarity: str,
    queries: Mapping[int, Tensor],
    documents: Mapping[str, Tensor],
    relevant: Sequence[Mapping[str, float]],
) -> Ranking:
    ids, found = list(documents), torch.stack(list(documents.values()))
    gains = []
    for start in range(0, len(queries), _AT_ONCE):
        asked = torch.stack(list(queries.values())[start : start + _AT_ONCE])
        first = _all_alike(similarity, asked, found).topk(min(DEPTH, len(ids))).indices.tolist()
        gains += [
            [right.get(ids[place], 0.0) for place in row] for row, right in zip(first, relevant[start:], strict=False)
        ]
    return Ranking(
        rows=list(queries),
        gains=torch.stack([gains_in_order(row) for row in gains]),
        ideal=torch.stack([gains_in_order(sorted(right.values(), reverse=True)) for right in relevant]),
        relevant=torch.tensor([len(right) for right in relevant], dtype=torch.float64),
    )
