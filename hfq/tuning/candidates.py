"""The space that is searched: how a candidate is named, and the quantization plan it stands for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from torch import Tensor, nn

from ..ptq.calibration import Statistics, calibrate
from ..ptq.convert import int8_layer
from ..ptq.corrections import bias_corrections, correct_weights, input_means
from ..ptq.equalization import best_factors
from ..ptq.graph import Fold, fold_into
from ..ptq.inputs import Batch, head
from ..ptq.layers import CONVOLUTIONS, Quantizable, linear, reads_sound, twin, weight_rows
from ..ptq.observers import CODES, OBSERVERS, InputStatistics, min_max
from ..ptq.rotation import Rotation, find_rotation
from ..ptq.rounding import gptq_rows, second_moments
from ..ptq.scheme import Approach, LayerScheme, Plan, Rows, quantize_rows
from ..ptq.smoothquant import smoothed, smoothing_factors
from .options import ALPHAS, Alpha, Options, Rule

TRACED = 2  # examples of the batch that a graph is traced with
CHUNK = 8  # layers whose second moments are held at a time: 36 MiB each at 3072 inputs
RECOVERED = "recovered"  # in place of an observer: scales that were learned, with weights that were trained
FEW_CODES = CODES // 2  # with `reduce_range`


@dataclass(frozen=True)
class Candidate:
    """One way to quantize the whole model.

    `dynamic_layers` run with a scale per token in an otherwise static model; `float_layers` are kept in float.
    `gptq`: weights are rounded to the least error of the layer's output instead of to the nearest code. `rotated`: the
    residual stream is (`hfq.ptq.rotation`).
    """

    approach: Approach
    observer: str = "min-max"
    alpha: Alpha | None = None
    dynamic_layers: tuple[str, ...] = ()
    float_layers: tuple[str, ...] = ()
    gptq: bool = False
    rotated: bool = False

    @property
    def name(self) -> str:
        parts: list[str] = [self.approach]
        if self.approach == "static" or self.observer == RECOVERED:
            parts.append(self.observer)
        if self.alpha is not None:
            parts.append(f"smoothquant-{self.alpha if isinstance(self.alpha, str) else f'{self.alpha:g}'}")
        if self.rotated:
            parts.append("rotated")
        if self.gptq:
            parts.append("gptq")
        if self.dynamic_layers:
            parts.append(f"{len(self.dynamic_layers)} layers dynamic")
        if self.float_layers:
            parts.append(f"{len(self.float_layers)} layers float")
        return ", ".join(parts)


class Space:
    """Turns candidates into plans, from what calibration saw. Observers run once for each layer.

    `learned`: scales and weights' codes that `model` was trained with; the layers that are not in it stay float.
    """

    def __init__(  # noqa: PLR0913 - the model, what is known of it, and what is allowed
        self,
        model: nn.Module,
        layers: Quantizable,
        statistics: Statistics,
        folds: Sequence[Fold],
        *,
        batches: Sequence[Batch] = (),
        options: Options | None = None,
        learned: Plan | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.statistics = statistics
        self.folds = tuple(folds)
        self.batches = batches
        self.options = options or Options()
        self.learned = learned
        self._rules: dict[str, Rule] = {
            name: self.options.rule(name, model.get_submodule(name)) for name in [*layers.layers, *layers.embeddings]
        }
        self._observed = lru_cache(maxsize=None)(self._observe)
        self._factors = lru_cache(maxsize=None)(self._smoothing)
        self._rounded = lru_cache(maxsize=None)(self._round)

    @cached_property
    def rotation(self) -> Rotation | None:
        """Of the model's residual stream; None where it cannot be rotated exactly, or was trained as it is."""
        is_known = bool(self.batches) and self.learned is None
        return find_rotation(self.model, head(self.batches[0], TRACED)) if is_known else None

    @cached_property
    def rotated(self) -> "Space":
        """The same of the model so rotated, calibrated anew."""
        assert self.rotation is not None  # else nobody asks for it
        model = self.rotation.applied(self.model)
        statistics = calibrate(model, self.layers.layers, self.batches)
        return Space(model, self.layers, statistics, (), batches=self.batches, options=self.options)

    def of(self, candidate: Candidate) -> "tuple[Space, Candidate]":
        """Where `candidate` is one like others: in the rotated space, or in this one."""
        return (self.rotated, replace(candidate, rotated=False)) if candidate.rotated else (self, candidate)

    def plan(self, candidate: Candidate) -> Plan:
        """The plan of `candidate`."""
        if candidate.rotated:
            space, plain = self.of(candidate)
            return replace(space.plan(plain), rotation=self.rotation)
        smoothing: Mapping[str, Tensor] = {} if candidate.alpha is None else self._factors(candidate.alpha)
        statistics = {
            name: smoothed(self.statistics[name], smoothing[fold.producer])
            for fold in self.folds
            for name in fold.consumers
            if fold.producer in smoothing
        }
        schemes = {
            name: scheme
            for name in self.layers.layers
            if (scheme := self._scheme(name, candidate, statistics.get(name))) is not None
        }
        embeddings = tuple(name for name in self.layers.embeddings if self._may_be_int8(name))
        known = self.learned.weights if self.learned else {}
        weights = {name: rows for name, rows in known.items() if name in schemes}
        return self._corrected(Plan(schemes, embeddings, smoothing, weights), candidate)

    def _may_be_int8(self, embedding: str) -> bool:
        tied = self.layers.tied.get(embedding, (embedding,))
        return all("int8" in self._rules[name].precisions for name in tied)

    def may_stay_float(self, name: str) -> bool:
        """Whether no rule wants the layer in int8 whatever it costs."""
        return "fp32" in self._rules[name].precisions

    def must_stay_float(self) -> dict[str, str]:
        """Layers that a rule keeps float, with the reason."""
        wanted = [name for name, rule in self._rules.items() if "int8" not in rule.precisions]
        tied = [name for name in self.layers.embeddings if not self._may_be_int8(name)]
        return dict.fromkeys([*wanted, *tied], "kept in float by the configuration")

    def folded(self, alpha: Alpha | None) -> nn.Module:
        """The float model with its channels rescaled by SmoothQuant."""
        return self.rescaled({} if alpha is None else self._factors(alpha))

    def rescaled(self, factors: Mapping[str, Tensor]) -> nn.Module:
        """The float model with the channels of its folds divided by `factors`."""
        folded = twin(self.model)
        fold_into(folded, self.folds, factors)
        return folded

    def _scheme(self, name: str, candidate: Candidate, smooth: InputStatistics | None) -> LayerScheme | None:
        """None: the layer stays float."""
        rule = self._rules[name]
        if "int8" not in rule.precisions or (name in candidate.float_layers and "fp32" in rule.precisions):
            return None
        if self.learned and name not in self.learned.layers:
            return None
        wanted: Approach = "dynamic" if name in candidate.dynamic_layers else candidate.approach
        if wanted not in rule.approaches:
            wanted = rule.approaches[0]
        layer = self.model.get_submodule(name)
        if wanted == "dynamic" and isinstance(layer, CONVOLUTIONS):
            wanted = "weight-only"  # there is no token to take a scale of
        if wanted == "static" and "weight-only" in rule.approaches and reads_sound(layer):
            wanted = "weight-only"
        # Without tokens there is no scale per token: stock transformers then takes one for the whole batch.
        if wanted == "dynamic" and name in self.layers.pooled and name in self.statistics:
            wanted = "static"
        if wanted != "static":
            return LayerScheme(wanted, per_tensor=rule.per_tensor)
        if smooth is not None:  # histograms do not survive smoothing, extremes do
            return self._static(rule, min_max(smooth))
        return self._observed(rule.observer or candidate.observer, name)

    def _observe(self, observer: str, name: str) -> LayerScheme:
        if observer == RECOVERED:
            assert self.learned is not None  # else nobody asks for it
            return self.learned.layers[name]
        return self._static(self._rules[name], OBSERVERS[observer](self.statistics[name]))

    def _static(self, rule: Rule, covered: tuple[float, float]) -> LayerScheme:
        codes = FEW_CODES if self.options.reduce_range else CODES
        return LayerScheme.static(covered, symmetric=rule.symmetric, codes=codes, per_tensor=rule.per_tensor)

    def _smoothing(self, alpha: Alpha) -> Mapping[str, Tensor]:
        if isinstance(alpha, str):
            numbers = [a for a in ALPHAS if not isinstance(a, str)]
            return best_factors(self.model, self.folds, self.statistics, self.batches, alphas=numbers)
        return smoothing_factors(self.model, self.folds, self.statistics, alpha=alpha)

    def _corrected(self, plan: Plan, candidate: Candidate) -> Plan:
        """`plan` with what its weights and biases are corrected by."""
        weights = dict(plan.weights)
        if candidate.gptq:
            weights = {n: r for n, r in self._rounded(candidate.alpha).items() if n in plan.layers}
        shifts: dict[str, Tensor] = {}
        if not (self.options.weight_correction or self.options.bias_correction):
            return replace(plan, weights=weights)
        folded = self.folded(candidate.alpha)
        if self.options.weight_correction:
            means = input_means(folded, list(plan.layers), self.batches)
            for name, scheme in plan.layers.items():
                weight = weight_rows(linear(folded, name))
                rows = weights.get(name) or quantize_rows(weight, per_tensor=scheme.per_tensor)
                weights[name], shifts[name] = correct_weights(weight, rows, means[name])
        if self.options.bias_correction:
            twins = {
                name: int8_layer(linear(folded, name), scheme, rows=weights.get(name), bias_shift=shifts.get(name))
                for name, scheme in plan.layers.items()
            }
            for name, shift in bias_corrections(folded, twins, self.batches).items():
                shifts[name] = shifts[name] + shift if name in shifts else shift
        return replace(plan, weights=weights, bias_shifts=shifts)

    def _round(self, alpha: Alpha | None) -> Mapping[str, Rows]:
        """Second-order rounding of every matmul's weight, a few layers at a time."""
        folded = self.folded(alpha)
        names = [name for name in self.layers.layers if not isinstance(folded.get_submodule(name), CONVOLUTIONS)]
        rounded = {}
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            for name, moments in second_moments(folded, chunk, self.batches).items():
                weight = weight_rows(linear(folded, name))
                nearest = quantize_rows(weight, per_tensor=self._rules[name].per_tensor)
                rounded[name] = gptq_rows(weight, moments, nearest=nearest)
        return rounded
