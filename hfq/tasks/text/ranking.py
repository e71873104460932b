"""Metrics of rankings: documents in the order in which a model puts them for each query.

Definitions are trec_eval's, as BEIR reports them: gains are the relevance itself (Järvelin and Kekäläinen 2002).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Metric, Outputs, References, SumMetric

DEPTH = 100  # documents of a ranking that are looked at
_DISCOUNTS = 1 / torch.arange(2, DEPTH + 2, dtype=torch.float64).log2()


@dataclass(frozen=True)
class Ranking:
    """Of some queries. `rows`: the example that each is judged at.

    `gains`: float64 `[queries, DEPTH]`, relevance of the documents that come first, 0 beyond the last. `ideal`: the same
    in the best order there is. `relevant`: float64 `[queries]`, how many documents are relevant.
    """

    rows: Sequence[int]
    gains: Tensor
    ideal: Tensor
    relevant: Tensor


class RankingMetric(SumMetric):
    """The mean over queries of a function of their rankings.

    `rank`: from outputs and references to rankings. Queries to which nothing is relevant do not count.
    """

    def __init__(
        self, label: str, value: Callable[[Ranking], Tensor], rank: Callable[[Outputs, References], Ranking]
    ) -> None:
        self.label = label
        self.value = value
        self.rank = rank

    def numbers(self, outputs: Outputs, references: References) -> Tensor:
        """Each query's value, and that it is one, at the example that it is judged at; else zeros."""
        found = torch.zeros(len(outputs), 2, dtype=torch.float64)
        ranking = self.rank(outputs, references)
        found[list(ranking.rows)] = torch.stack([self.value(ranking), torch.ones_like(ranking.relevant)], 1)
        return found

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1].clamp(min=1)


def ranking_metrics(rank: Callable[[Outputs, References], Ranking], *names: str) -> Mapping[str, Metric]:
    """Metrics by name, of those here."""
    return {name: RankingMetric(*_METRICS[name], rank) for name in names}


def gains_in_order(gains: Sequence[float]) -> Tensor:
    """float64 `[DEPTH]`: gains that are in the order of a ranking, cut or filled up with zeros."""
    found = torch.zeros(DEPTH, dtype=torch.float64)
    first = torch.tensor(list(gains[:DEPTH]), dtype=torch.float64)
    found[: len(first)] = first
    return found


def ndcg_at_10(ranking: Ranking) -> Tensor:
    """Normalized discounted cumulative gain of the first ten, float64 `[queries]`."""
    found, best = ((gains * _DISCOUNTS)[:, :10].sum(1) for gains in (ranking.gains, ranking.ideal))
    return found / best


def reciprocal_rank_at_10(ranking: Ranking) -> Tensor:
    """1 / the place of the first relevant document, 0 if it is not among the first ten."""
    places = torch.arange(1, 11, dtype=torch.float64)
    return ((ranking.gains[:, :10] > 0) / places).amax(1)


def average_precision(ranking: Ranking) -> Tensor:
    """Mean of the precisions at each relevant document, within `DEPTH`."""
    hits = (ranking.gains > 0).double()
    precisions = hits.cumsum(1) / torch.arange(1, DEPTH + 1, dtype=torch.float64)
    return (precisions * hits).sum(1) / ranking.relevant


def recall_at_100(ranking: Ranking) -> Tensor:
    """Share of the relevant documents that are among the first hundred."""
    return (ranking.gains > 0).double().sum(1) / ranking.relevant


_METRICS: Mapping[str, tuple[str, Callable[[Ranking], Tensor]]] = {
    "ndcg_at_10": ("nDCG@10", ndcg_at_10),
    "mrr_at_10": ("MRR@10", reciprocal_rank_at_10),
    "map": ("MAP@100", average_precision),
    "recall_at_100": ("Recall@100", recall_at_100),
}
