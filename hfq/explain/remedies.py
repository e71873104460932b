"""What else could be done with a layer, and what of its error would be left."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..ptq.graph import fold_into
from ..ptq.inputs import Batch
from ..ptq.layers import CONVOLUTIONS, linear, twin, weight_rows
from ..ptq.observers import OBSERVERS, min_max
from ..ptq.rounding import gptq_rows, second_moments
from ..ptq.scheme import LayerScheme, Plan, Rows, quantize_rows
from ..ptq.smoothquant import smoothed, smoothing_factors
from ..tuning.candidates import Space
from ..tuning.options import ALPHAS
from .errors import Way, own_errors
from .explanation import LayerCause, Remedy

NOW, WEIGHTS = "now", "weight-only"
GPTQ, SMOOTH = "gptq", "smoothquant"
ROUNDED = 8  # layers, those with the largest effect, for which GPTQ is tried: it takes the time
ENOUGH = 0.25  # of a layer's error, which a remedy should not leave more of
CHEAP = (*OBSERVERS, "dynamic", "float")  # what may be advised, the fastest first


def measured(
    space: Space, plan: Plan, folded: nn.Module, batches: Sequence[Batch], *, worst: Sequence[str]
) -> dict[str, dict[str, float]]:
    """By layer of `plan`, the error now, with float inputs and by each remedy. `folded`: the float model, rescaled as `plan`
    is. `worst`: layers by effect, the largest first.
    """
    ways = {name: _ways(space, name, plan, weight_rows(linear(folded, name))) for name in plan.layers}
    for name, rows in _second_order(folded, [name for name in worst if name in ways][:ROUNDED], batches).items():
        ways[name][GPTQ] = Way(ways[name][NOW].scheme, rows)
    found = own_errors(folded, ways, batches)
    for name, error in _smoothed_errors(space, plan, batches).items():
        found[name][SMOOTH] = error
    return found


def remedies(errors: Mapping[str, float], runs: LayerScheme) -> list[Remedy]:
    """What a layer's errors say of each remedy, the least error first; of the observers, the best alone."""
    ways = {how: error for how, error in errors.items() if how not in (NOW, WEIGHTS, runs.approach)}
    observers = [how for how in ways if how in OBSERVERS]
    best = min(observers, key=ways.__getitem__, default=None)
    is_better = best is not None and ways[best] < errors[NOW]
    kept = {how: error for how, error in ways.items() if how not in OBSERVERS or (how == best and is_better)}
    return [Remedy(how, error) for how, error in sorted({**kept, "float": 0.0}.items(), key=lambda item: item[1])]


def advised(cause: LayerCause) -> str:
    """The fastest remedy that takes most of a layer's error away."""
    left = {remedy.how: remedy.error for remedy in cause.remedies}
    return next(how for how in CHEAP if left.get(how, cause.error) <= ENOUGH * cause.error)


def _ways(space: Space, name: str, plan: Plan, weight: Tensor) -> dict[str, Way]:
    scheme = plan.layers[name]
    rows = plan.weights.get(name) or quantize_rows(weight, per_tensor=scheme.per_tensor)
    ways = {NOW: Way(scheme, rows), WEIGHTS: Way(LayerScheme("weight-only"), rows)}
    if scheme.approach == "static" and name not in _behind(space, plan):
        for how, observer in OBSERVERS.items():
            ways[how] = Way(LayerScheme.static(observer(space.statistics[name])), rows)
    without_tokens = name in space.layers.pooled or isinstance(space.model.get_submodule(name), CONVOLUTIONS)
    if scheme.approach != "dynamic" and not without_tokens:
        ways["dynamic"] = Way(LayerScheme("dynamic"), rows)
    return ways


def _behind(space: Space, plan: Plan) -> set[str]:
    """Layers whose inputs are rescaled already: of those, histograms are not known."""
    return {name for fold in space.folds if fold.producer in plan.smoothing for name in fold.consumers}


def _second_order(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Rows]:
    linears = [name for name in names if not isinstance(model.get_submodule(name), CONVOLUTIONS)]
    rounded = {}
    for name, moments in second_moments(model, linears, batches).items():
        weight = weight_rows(linear(model, name))
        rounded[name] = gptq_rows(weight, moments, nearest=quantize_rows(weight))
    return rounded


def _smoothed_errors(space: Space, plan: Plan, batches: Sequence[Batch]) -> dict[str, float]:
    """By layer whose input can be rescaled by the layer before, the least error of all strengths of SmoothQuant."""
    folds = [fold for fold in space.folds if fold.producer not in plan.smoothing]
    folds = [fold for fold in folds if all(name in plan.layers for name in fold.consumers)]
    least: dict[str, float] = {}
    for alpha in (alpha for alpha in ALPHAS if not isinstance(alpha, str)) if folds else ():
        factors = smoothing_factors(space.model, folds, space.statistics, alpha=alpha)
        model = twin(space.model)
        fold_into(model, folds, factors)
        ways = {}
        for fold in folds:
            for name in fold.consumers:
                seen = smoothed(space.statistics[name], factors[fold.producer])
                rows = quantize_rows(weight_rows(linear(model, name)))
                ways[name] = {SMOOTH: Way(LayerScheme.static(min_max(seen)), rows)}
        for name, errors in own_errors(model, ways, batches).items():
            least[name] = min(errors[SMOOTH], least.get(name, errors[SMOOTH]))
    return least
