"""The space that is searched: how a candidate is named, and the quantization plan it stands for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from ..quantization.calibration import Statistics
from ..quantization.graph import Fold
from ..quantization.layers import Quantizable
from ..quantization.observers import OBSERVERS, InputStatistics, min_max
from ..quantization.scheme import Approach, LinearScheme, Plan
from ..quantization.smoothquant import smoothed, smoothing_factors

ALPHAS = (0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Candidate:
    """One way to quantize the whole model.

    `dynamic_layers` run with a scale per token in an otherwise static model; `float_layers` are kept in float.
    """

    approach: Approach
    observer: str = "min-max"
    alpha: float | None = None
    dynamic_layers: tuple[str, ...] = ()
    float_layers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        parts: list[str] = [self.approach]
        if self.approach == "static":
            parts.append(self.observer)
        if self.alpha is not None:
            parts.append(f"smoothquant-{self.alpha:g}")
        if self.dynamic_layers:
            parts.append(f"{len(self.dynamic_layers)} layers dynamic")
        if self.float_layers:
            parts.append(f"{len(self.float_layers)} layers float")
        return ", ".join(parts)


class Space:
    """Turns candidates into plans, from what calibration saw. Observers run once for each layer."""

    def __init__(self, model: nn.Module, layers: Quantizable, statistics: Statistics, folds: Sequence[Fold]) -> None:
        self.model = model
        self.layers = layers
        self.statistics = statistics
        self.folds = tuple(folds)
        self._observed = lru_cache(maxsize=None)(self._observe)

    def plan(self, candidate: Candidate) -> Plan:
        """The plan of `candidate`."""
        smoothing = {}
        statistics: Mapping[str, InputStatistics] = {}
        if candidate.alpha is not None:
            smoothing = smoothing_factors(self.model, self.folds, self.statistics, alpha=candidate.alpha)
            statistics = {
                name: smoothed(self.statistics[name], smoothing[fold.producer])
                for fold in self.folds
                for name in fold.consumers
            }
        linears = {}
        for name in self.layers.linears:
            if name in candidate.float_layers:
                continue
            dynamic = candidate.approach == "dynamic" or name in candidate.dynamic_layers
            # Without tokens there is no scale per token: stock transformers then takes one for the whole batch.
            if dynamic and name not in self.layers.pooled:
                linears[name] = LinearScheme("dynamic")
            elif name in statistics:  # histograms do not survive smoothing, extremes do
                linears[name] = LinearScheme.static(min_max(statistics[name]))
            else:
                linears[name] = self._observed(candidate.observer, name)
        return Plan(linears, self.layers.embeddings, smoothing)

    def _observe(self, observer: str, name: str) -> LinearScheme:
        return LinearScheme.static(OBSERVERS[observer](self.statistics[name]))
