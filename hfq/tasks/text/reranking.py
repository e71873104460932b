"""Reranking: a query and a passage, one number that is larger the better the passage answers it.

Ranked by the logit in float32, as it comes: after a sigmoid, passages that are nearly certain tie with each other.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...common.errors import DataError, WrongDataError
from ...source.metadata import read_card
from ...source.sentence_model import read_sentence_model
from ..base import Columns, Metric, Outputs, References, Trivial, require_columns
from ..labels import count_labels
from ..metrics import Torchmetric
from .ranking import Ranking, gains_in_order, ranking_metrics
from .regression import UNLABELLED, Regression, as_number, values_of
from .sentence_embedding import PAIRS, POSITIVES, RELEVANT, SCORES, check_scores, score_column
from .tokens import is_text, known_texts, texts

if TYPE_CHECKING:
    from datasets import Dataset

QUERIES = ("query", "question", "anchor")
POSITIVE = ("positive", "positives", "pos", "answer")
NEGATIVE = ("negative", "negatives", "neg")
CANDIDATES = 20  # passages of a query, where nobody says which
BEGINNING = 10  # words
FLAT = ("query", "passage", "label")  # columns that rows with several passages become


@dataclass(frozen=True)
class Judged:
    """A passage: the text of its query, and how well it answers that."""

    query: str
    relevance: float


@dataclass(frozen=True)
class Relevance:
    """What the data says of its pairs. `kind`: `ranking` of each query's passages, where most pairs share their query with
    others, or `scores`.
    """

    kind: str
    how: str


class Reranking(Regression):
    """Scores of pairs, judged by how they order the passages of each query, or by the scores of pairs."""

    name = "reranking"
    pipeline_tag = "text-ranking"
    other_tags: ClassVar[Sequence[str]] = ("text-classification",)
    roles: ClassVar[Mapping[str, str]] = {
        "text": "query and passage; or query, positives and negatives, one text or a list each",
        "label": "how relevant the passage is",
    }
    example: ClassVar[Mapping[str, Any]] = {"num_labels": 1}
    library = "sentence-transformers"
    stable_agreement: ClassVar[float] = 0.95  # passages of nearly the same score change places

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.judgement: str | None = None

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        return _scores_pairs(config) and any(key in config for key in _OF_CROSS_ENCODERS)

    @classmethod
    def claims(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        if not _scores_pairs(config):
            return False
        model = read_sentence_model(folder)
        if model:
            return model.kind == "CrossEncoder" and len(model.modules) == 1
        return cls.fits(config) or _card(folder).get("pipeline_tag") == cls.pipeline_tag

    def unfolded(self, rows: "Dataset") -> "Dataset":
        """Of rows with a query, positives and negatives, one row for each passage; so too of retrieval data.

        There a query's passages are its candidates, else what is judged and others, drawn at random, to make twenty. A
        split of documents alone, which is to calibrate on, pairs each with its own beginning.
        """
        if RELEVANT in rows.features:
            return _candidates(rows)
        names = [
            next((name for name in known if name in rows.features), None) for known in (QUERIES, POSITIVE, NEGATIVE)
        ]
        query, positive, negative = names
        if query is None or positive is None or negative is None:
            return rows
        import datasets

        found: dict[str, list[Any]] = {name: [] for name in FLAT}
        for row, (text, right, wrong) in enumerate(zip(rows[query], rows[positive], rows[negative], strict=True)):
            passages = [(one, label) for label, some in ((1.0, right), (0.0, wrong)) for one in _listed(some)]
            if {label for _, label in passages} != {0.0, 1.0}:
                raise DataError(
                    f"Row {row} (from 0) of split {str(rows.split or 'given')!r} has no text in {positive!r} or none in "
                    f"{negative!r}: there is nothing to rank. Mend or remove such rows."
                )
            found["query"] += [text] * len(passages)
            found["passage"] += [one for one, _ in passages]
            found["label"] += [label for _, label in passages]
        return datasets.Dataset.from_dict(found, split=rows.split)

    def inputs(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        """The columns of query and passage."""
        asked = list(requested.get("text", ()))
        require_columns(asked, features, "--text-column")
        if not asked and (pair := known_texts(features, (FLAT[:2], *POSITIVES, *PAIRS))):
            return {"text": pair}
        found = [name for name, feature in features.items() if is_text(feature)]
        if len(asked or found) != 2:
            raise WrongDataError(
                f"Which columns hold query and passage is not clear. Columns: {', '.join(features)}; with text: "
                f"{', '.join(found) or 'none'}. Name two with --text-column, the query first."
            )
        return {"text": asked or found}

    def columns(self, features: Mapping[str, Any], requested: Columns) -> Columns:
        read = self.inputs(features, requested)
        labels = score_column(features, requested, read["text"])
        if not labels:
            raise WrongDataError(
                f"Which column says how relevant a passage is, is not clear. Columns: {', '.join(features)}. Name it with "
                f"--label-column ({', '.join(SCORES)} are found by themselves)."
            )
        return {**read, "label": labels}

    def align(self, splits: Sequence["Dataset"], columns: Columns) -> Relevance:
        (column,) = columns["label"]
        check_scores(splits[0], column)
        by_query: dict[str, list[float]] = {}
        for judged in self.references(splits[0], columns, None):
            if judged is not None:
                by_query.setdefault(judged.query, []).append(judged.relevance)
        ranked = sum(len(labels) for labels in by_query.values() if len({*labels}) > 1)
        if 2 * ranked <= sum(map(len, by_query.values())):  # in data of pairs, too, a text may come twice
            return Relevance("scores", "scores of pairs, as they are")
        without = sum(max(labels) <= 0 for labels in by_query.values())
        skipped = f"; {without} queries without a relevant passage do not count" if without else ""
        return Relevance("ranking", f"relevance of passages to their query{skipped}")

    def references(self, rows: "Dataset", columns: Columns, alignment: Any) -> list[Any]:
        queries, (column,) = texts(rows, columns["text"][0]), columns["label"]
        values = [as_number(value, row, column) for row, value in enumerate(rows[column])]
        ranked = alignment is not None and alignment.kind == "ranking"
        if set(values) == {UNLABELLED} or (ranked and all(value is None or value <= 0 for value in values)):
            return [None] * len(values)  # a split of which nobody says what is relevant
        return [None if value is None else Judged(query, value) for query, value in zip(queries, values, strict=True)]

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """Of rankings where queries have several passages; else of scores. Before the data is known, both."""
        rankings = ranking_metrics(_ranked, "ndcg_at_10", "mrr_at_10", "map")
        scores: Mapping[str, Metric] = {
            "spearman": Torchmetric("Spearman", "spearman_corrcoef", _pairs),
            "pearson": Torchmetric("Pearson", "pearson_corrcoef", _pairs),
        }
        found = {"ranking": rankings, "scores": scores}
        return found[self.judgement] if self.judgement else {**rankings, **scores}

    def fidelity(self, outputs: Outputs, others: Outputs) -> float:
        """Of passages, two at a time, the share that both put in the same order: Kendall's tau, from 0 to 1. Of scores, as of
        other numbers: most pairs of unlike texts score nearly the same, and their order says nothing.
        """
        if self.judgement == "scores":
            return super().fidelity(outputs, others)
        a, b = values_of(outputs), values_of(others)
        if torch.equal(a, b) or len(a) < 2:
            return float(torch.equal(a, b))
        tau = _kendall(a, b)
        return (1 + tau) / 2 if tau == tau else 0.0  # NaN: one of them puts out the same number for all

    def remarks(self, metric: Metric, outputs: Outputs, others: Outputs, references: References) -> list[str]:
        """Whether the passages of each query are in the same order."""
        if self.judgement != "ranking" or not metric.of_labels:
            return []
        a, b = values_of(outputs), values_of(others)
        found = [_kendall(a[rows], b[rows]) for rows in _by_query(references) if len(rows) > 1]
        mean = sum(0.0 if tau != tau else tau for tau in found) / len(found)
        return [f"Kendall's tau of a query's scores by both, on average over {len(found)} queries: {mean:.4f}."]

    def trivial(self, metric: str, references: References) -> Trivial | None:
        """Of scores, always the same number."""
        return Trivial(0.0, "answering the same number") if self.judgement == "scores" else None

    def informed(self, alignment: Relevance) -> "Reranking":
        """With the metrics that the data allows."""
        found = copy.copy(self)
        found.judgement = alignment.kind
        found.__dict__.pop("metrics", None)
        return found

    def usage(self, tag: str) -> str:
        """Ranking two passages."""
        return (
            'from sentence_transformers import CrossEncoder\n\nmodel = CrossEncoder("{model}", device="cpu")\n'
            'ranks = model.rank("How warm is it?", ["It is 20 degrees.", "The sun shines."])'
        )


def _candidates(rows: "Dataset") -> "Dataset":
    """Rows `FLAT` of rows as `hfq.data.beir` reads them."""
    import datasets

    documents = {row["document_id"]: row["text"] for row in rows if row["document_id"] is not None}
    generator = random.Random(0)  # noqa: S311 - nothing secret
    found = []
    for row in rows:
        if row["query_id"] is None:
            continue
        judged = {one["document_id"]: one["score"] for one in row[RELEVANT] or ()}
        others = generator.sample(list(documents), min(CANDIDATES, len(documents)))
        passages = (
            row["candidates"]
            or [*judged, *(key for key in others if key not in judged)][: max(CANDIDATES, len(judged))]
        )
        found += [(row["text"], documents[key], judged.get(key, 0.0)) for key in passages]
    # Documents alone: each is relevant to its own beginning.
    found = found or [(" ".join(text.split()[:BEGINNING]), text, 1.0) for text in documents.values()]
    return datasets.Dataset.from_list([dict(zip(FLAT, row, strict=True)) for row in found], split=rows.split)


_OF_CROSS_ENCODERS = ("sentence_transformers", "sbert_ce_default_activation_function")


def _scores_pairs(config: Mapping[str, Any]) -> bool:
    """Whether a classifier puts out one number."""
    return count_labels(config) == 1


def _card(folder: Path) -> Mapping[str, Any]:
    try:
        return read_card(folder / "README.md")
    except ValueError:  # whoever reads it says so
        return {}


def _listed(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def _by_query(references: References) -> list[list[int]]:
    """The rows of each query's passages."""
    found: dict[str, list[int]] = {}
    for row, judged in enumerate(references):
        found.setdefault(judged.query, []).append(row)
    return list(found.values())


def _kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b of two lists of numbers; NaN where one is constant."""
    from scipy.stats import kendalltau  # takes a while to import

    return float(kendalltau(a.numpy(), b.numpy()).statistic)


def _pairs(outputs: Outputs, references: References) -> tuple[Tensor, Tensor]:
    return values_of(outputs), torch.tensor([judged.relevance for judged in references], dtype=torch.float64)


def _ranked(outputs: Outputs, references: References) -> Ranking:
    """Of each query with a relevant passage; of passages with the same score, the less relevant one comes first."""
    scores, gains = values_of(outputs).tolist(), [max(0.0, judged.relevance) for judged in references]
    asked = [rows for rows in _by_query(references) if any(gains[row] for row in rows)]
    ordered = [sorted(rows, key=lambda row: (-scores[row], gains[row])) for rows in asked]
    return Ranking(
        rows=[rows[0] for rows in asked],
        gains=torch.stack([gains_in_order([gains[row] for row in rows]) for rows in ordered]),
        ideal=torch.stack([gains_in_order(sorted((gains[row] for row in rows), reverse=True)) for rows in asked]),
        relevant=torch.tensor([sum(gains[row] > 0 for row in rows) for rows in asked], dtype=torch.float64),
    )
