"""Orders: which candidate is evaluated after which, and when to stop. Each is a small function over one space.

Neural Compressor calls them strategies. An order yields a candidate and is sent its trial. None touches a model: what it may
ask for is in `Searchable`.
"""

import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..common.errors import UsageError
from ..common.installation import installation
from .candidates import Candidate
from .options import Options
from .trial import Trial

FINALISTS = 4  # fully static candidates that get an evaluation, best output error first: float layers cost more later
GAP_CLOSED = (0.35, 0.8)  # of the output error between all static and all dynamic, by layers made dynamic
HOPELESS = 3.0  # a candidate with this many times the best output error is not worth one
LEFT = 0.1  # of the output error, once the layers that stand out are not static
KEPT = (0.0, 0.125, 0.25, 0.5)  # shares of the layers that stay float, where an order does not bisect them
Search = Generator[Candidate, Trial, None]


@dataclass(frozen=True)
class Searchable:
    """What an order chooses from.

    `errors`: output error of every candidate without kept layers, smallest first. `sensitive(candidate)`: layer names,
    the one with the largest int8 error first. `output_error(candidate)`: of any candidate. `peek(candidate)`: the same,
    by one who looks ahead: it leaves no trace in the log. `rotated(candidate)`: the same with the residual stream rotated;
    None where it cannot be.
    """

    errors: Mapping[Candidate, float]
    sensitive: Callable[[Candidate], Sequence[str]]
    output_error: Callable[[Candidate], float]
    options: Options
    peek: Callable[[Candidate], float]
    rotated: Callable[[Candidate], Candidate | None] = lambda _: None

    @property
    def static(self) -> list[Candidate]:
        return [candidate for candidate in self.errors if candidate.approach == "static"]

    @property
    def dynamic(self) -> Candidate | None:
        return next((candidate for candidate in self.errors if candidate.approach == "dynamic"), None)

    def goes_on(self, trial: Trial) -> bool:
        """Whether to look further after this trial."""
        return not passed(trial) or self.options.explores


def passed(trial: Trial) -> bool:
    """Whether it met the goal, with answers that survive another order of summation: another kernel gives them too.

    Near ties do not, and say nothing of the candidate: whatever rounds decides them.
    """
    agreement = trial.stock_agreement
    return trial.accepted and (agreement is None or agreement + trial.near_ties >= trial.stable_from)


def basic(space: Searchable) -> Search:
    """From the fastest expected to the slowest. Ends after the tier in which one met the goal."""
    static, dynamic = space.static, space.dynamic

    def error(candidate: Candidate) -> float:
        return space.errors[candidate] if candidate in space.errors else space.output_error(candidate)

    if static:
        best = static[0]
        for candidate in static if space.options.explores else _hopeful(static, error):
            if not space.goes_on((yield candidate)):
                return
        if rotated := _rotated(space, best):
            best = rotated
            if not space.goes_on((yield rotated)):
                return
        if spared := _standing_out(space, best, space.sensitive(best)):
            mended = _ranked_like(spared, space)
            for candidate in _hopeful(mended, error):
                if not space.goes_on((yield candidate)):
                    return
            best = mended[0]
        order = [name for name in space.sensitive(best) if name not in best.float_layers]
        if dynamic and (end := error(replace(dynamic, float_layers=best.float_layers))) < error(best):
            for candidate in _mixed(space, best, order, start=error(best), end=end):
                if not space.goes_on((yield candidate)):
                    return
    if dynamic and not space.goes_on((yield dynamic)):
        return
    if dynamic and (rotated := _rotated(space, dynamic)):
        dynamic = rotated
        if not space.goes_on((yield rotated)):
            return
    if not space.options.keep_float:
        return
    met = static and (yield from _bisect(order, lambda kept: _with_float(best, kept)))
    if dynamic and (not met or space.options.explores):
        yield from _bisect(space.sensitive(dynamic), lambda kept: replace(dynamic, float_layers=kept))


def mse(space: Searchable) -> Search:
    """By output error alone, the smallest first, whatever runs faster; then with sensitive layers kept float."""
    for candidate in space.errors:
        if not space.goes_on((yield candidate)):
            return
    if space.options.keep_float:
        best = next(iter(space.errors))
        yield from _bisect(space.sensitive(best), lambda kept: replace(best, float_layers=kept))


def conservative(space: Searchable) -> Search:
    """From a model with half its layers in float to one with none, as long as the goal holds."""
    best = (space.static or [*space.errors])[0]
    order = space.sensitive(best)
    for share in sorted(KEPT, reverse=True):
        trial = yield replace(best, float_layers=tuple(order[: round(share * len(order))]))
        if not passed(trial):
            return


def exhaustive(space: Searchable) -> Search:
    """Every combination, in order, until one meets the goal."""
    for candidate in _grid(space):
        if not space.goes_on((yield candidate)):
            return


def random_order(space: Searchable) -> Search:
    """Every combination, in an order drawn from the seed, until one meets the goal."""
    candidates = list(_grid(space))
    random.Random(space.options.seed).shuffle(candidates)  # noqa: S311 (an order, not a secret)
    for candidate in candidates:
        if not space.goes_on((yield candidate)):
            return


def bayesian(space: Searchable) -> Search:
    """Combinations that a Gaussian process over past trials expects most of (Optuna's `GPSampler`)."""
    yield from _optuna(space, "GPSampler")


def tpe(space: Searchable) -> Search:
    """Combinations that a tree of Parzen estimators expects most of (Bergstra et al. 2011; Optuna's `TPESampler`)."""
    yield from _optuna(space, "TPESampler")


ORDERS: dict[str, Callable[[Searchable], Search]] = {
    "basic": basic,
    "mse": mse,
    "bayesian": bayesian,
    "tpe": tpe,
    "random": random_order,
    "exhaustive": exhaustive,
    "conservative": conservative,
}


def _grid(space: Searchable) -> Iterator[Candidate]:
    """Every candidate, with every share of its sensitive layers in float."""
    shares = KEPT if space.options.keep_float else KEPT[:1]
    for share, candidate in product(shares, space.errors):
        order = space.sensitive(candidate) if share else ()
        yield replace(candidate, float_layers=tuple(order[: round(share * len(order))]))


def _optuna(space: Searchable, sampler: str) -> Search:
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            f"The strategies bayesian and tpe need Optuna, which is not installed: {installation('optuna')}."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=getattr(optuna.samplers, sampler)(seed=space.options.seed)
    )
    choices = {candidate.name: candidate for candidate in space.errors}
    shares = KEPT if space.options.keep_float else KEPT[:1]
    seen: dict[Candidate, float] = {}
    for _ in range(2 * len(choices) * len(shares)):  # a sampler may propose what it has seen: that costs nothing
        asked = study.ask()
        candidate = choices[asked.suggest_categorical("candidate", list(choices))]
        share = asked.suggest_categorical("kept", list(shares))
        order = space.sensitive(candidate) if share else ()
        candidate = replace(candidate, float_layers=tuple(order[: round(share * len(order))]))
        if candidate not in seen:
            trial = yield candidate
            seen[candidate] = -(trial.loss or 0.0)
            if not space.goes_on(trial):
                return
        study.tell(asked, seen[candidate])


def _hopeful(candidates: Sequence[Candidate], error: Callable[[Candidate], float]) -> list[Candidate]:
    """The first few, as long as they are not much worse than the first, which has the least error."""
    return [candidate for candidate in candidates if error(candidate) <= HOPELESS * error(candidates[0])][:FINALISTS]


def _rotated(space: Searchable, candidate: Candidate) -> Candidate | None:
    """The same with the residual stream rotated; None where that cannot be, or is no better."""
    found = space.rotated(candidate)
    return found if found and space.output_error(found) < space.output_error(candidate) else None


def _standing_out(space: Searchable, best: Candidate, order: Sequence[str]) -> Candidate | None:
    """The static model without the few layers that nearly all of its output error comes from; None where there are none.

    They run with a scale per token where that is as good as float, else in float: the fewest, bisected on the output error.
    """
    enough = LEFT * space.output_error(best)
    most = len(order) // 6

    def suffices(count: int) -> bool:
        return space.output_error(replace(best, float_layers=tuple(order[:count]))) <= enough

    if not space.options.keep_float or not most or not suffices(most):
        return None
    layers = tuple(order[: _fewest(suffices, most)])
    tokens = replace(best, dynamic_layers=layers)
    is_as_good = space.dynamic is not None and space.output_error(tokens) <= enough
    return tokens if is_as_good else replace(best, float_layers=layers)


def _ranked_like(spared: Candidate, space: Searchable) -> list[Candidate]:
    """The static candidates without the layers that `spared` is without, the least output error first.

    With those layers, whose error hides all else, their order says nothing.
    """
    like = [replace(spared, observer=c.observer, alpha=c.alpha, gptq=c.gptq, rotated=False) for c in space.static]
    if plain := [candidate for candidate in like if candidate.alpha is None and not candidate.gptq]:
        best = min(plain, key=space.output_error)
        like = [*plain, *(replace(best, alpha=c.alpha, gptq=c.gptq) for c in like if c not in plain)]
        like += [replace(best, rotated=True)] if spared.rotated else []
    return sorted(dict.fromkeys(like), key=space.output_error)


def _with_float(candidate: Candidate, layers: Sequence[str]) -> Candidate:
    """`candidate` with more layers in float."""
    dynamic = tuple(name for name in candidate.dynamic_layers if name not in layers)
    return replace(candidate, float_layers=(*candidate.float_layers, *layers), dynamic_layers=dynamic)


def _mixed(
    space: Searchable, best: Candidate, order: Sequence[str], *, start: float, end: float
) -> Iterator[Candidate]:
    """Static models whose most sensitive layers run with a scale per token: as small a file, and little slower.

    Layers that `best` has so already stay so.

    How many layers is bisected on the output error, not on evaluations: the fewest that close a given share of
    the gap between all static (`start`) and all dynamic (`end`).
    """
    order = [*dict.fromkeys([*best.dynamic_layers, *order])]
    tried = {len(best.dynamic_layers)}
    for share in GAP_CLOSED:
        target = start - share * (start - end)

        def suffices(count: int, target: float = target) -> bool:
            return space.output_error(replace(best, dynamic_layers=tuple(order[:count]))) <= target

        count = _fewest(suffices, len(order))
        if count < len(order) and count not in tried:
            tried.add(count)
            yield replace(best, dynamic_layers=tuple(order[:count]))


def _fewest(suffices: Callable[[int], bool], most: int) -> int:
    """The smallest count of layers, from 1 to `most`, that suffices: bisected. `most` itself is not tried."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def _bisect(order: Sequence[str], keep: Callable[[tuple[str, ...]], Candidate]) -> Generator[Candidate, Trial, bool]:
    """The fewest of the most sensitive layers that have to be kept, at most half of all. Returns whether any sufficed."""
    low, high, met = 0, len(order) // 2 + 1, False
    while high - low > 1:
        middle = (low + high) // 2
        if passed((yield keep(tuple(order[:middle])))):
            high, met = middle, True
        else:
            low = middle
    return met
