"""The search: from the fastest candidates to the slowest, cheapest evidence first, until one meets the goal.

`strategy` decides what to try next and never touches a model; `tune` runs what it asks for.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..report import Trial
from .acceptance import Goal
from .candidates import ALPHAS, Candidate
from .log import TrialLog

FINALISTS = 2  # fully static candidates that get an evaluation, best output error first
GAP_CLOSED = (0.35, 0.8)  # of the output error between all static and all dynamic, by layers made dynamic
STABLE = 0.99  # of the answers; a candidate below it meets the goal by luck of rounding, so the search goes on
HOPELESS = 3.0  # a candidate with this many times the best output error is not worth one
Strategy = Generator[Candidate, bool, None]  # yields a candidate, is told whether it met the goal


@dataclass(frozen=True)
class Limits:
    """When to give up: evaluations, and seconds since tuning began (0: none)."""

    max_trials: int
    timeout: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The chosen candidate and its trial: the best one even where `met` is False. `stopped`: which limit ended it."""

    candidate: Candidate
    trial: Trial
    met: bool
    stopped: str | None = None


@dataclass(frozen=True)
class Score:
    """What evaluating a quantized model found; the last two as in `hfq.report.Trial`."""

    accuracy: float
    duration_s: float
    stock_agreement: float | None = None
    logit_difference: float | None = None


def rank(
    approach: str, observers: Sequence[str], output_error: Callable[[Candidate], float], *, can_smooth: bool
) -> dict[Candidate, float]:
    """Output error of every candidate without kept layers, smallest first.

    SmoothQuant is tried on top of the best plain observer, and only where the graph has something to fold.
    """
    errors: dict[Candidate, float] = {}
    if approach != "dynamic":
        static = [Candidate("static", observer) for observer in observers]
        errors |= {candidate: output_error(candidate) for candidate in static}
        if can_smooth:
            best = min(errors, key=errors.__getitem__)
            smooth = [replace(best, alpha=alpha) for alpha in ALPHAS]
            errors |= {candidate: output_error(candidate) for candidate in smooth}
    if approach != "static":
        errors[Candidate("dynamic")] = output_error(Candidate("dynamic"))
    return dict(sorted(errors.items(), key=lambda item: item[1]))


def strategy(
    errors: Mapping[Candidate, float],
    sensitive: Callable[[Candidate], Sequence[str]],
    output_error: Callable[[Candidate], float],
    *,
    approach: str,
    explore: bool,
) -> Strategy:
    """Candidates from the fastest expected to the slowest. Ends after the tier in which one met the goal.

    `sensitive(candidate)`: layer names, the one with the largest int8 error first.
    """
    static = [candidate for candidate in errors if candidate.approach == "static"]
    dynamic = Candidate("dynamic") if Candidate("dynamic") in errors else None
    if static:
        best = static[0]
        hopeful = [c for c in static if errors[c] <= HOPELESS * errors[best]][:FINALISTS]
        for candidate in static if explore else hopeful:
            if (yield candidate) and not explore:
                return
        order = sensitive(best)
        if dynamic and errors[dynamic] < errors[best]:
            for candidate in _mixed(best, order, output_error, start=errors[best], end=errors[dynamic]):
                if (yield candidate) and not explore:
                    return
    if dynamic and (yield dynamic) and not explore:
        return
    if static and (yield from _bisect(order, lambda kept: replace(best, float_layers=kept))) and not explore:
        return
    if dynamic:
        yield from _bisect(sensitive(dynamic), lambda kept: replace(dynamic, float_layers=kept))


def _mixed(
    best: Candidate,
    order: Sequence[str],
    output_error: Callable[[Candidate], float],
    *,
    start: float,
    end: float,
) -> Iterator[Candidate]:
    """Static models whose most sensitive layers run with a scale per token: as small a file, and little slower.

    How many layers is bisected on the output error, not on evaluations: the fewest that close a given share of
    the gap between all static (`start`) and all dynamic (`end`).
    """
    tried = set()
    for share in GAP_CLOSED:
        target = start - share * (start - end)
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            enough = output_error(replace(best, dynamic_layers=tuple(order[:middle]))) <= target
            low, high = (low, middle) if enough else (middle, high)
        if high < len(order) and high not in tried:
            tried.add(high)
            yield replace(best, dynamic_layers=tuple(order[:high]))


def tune(
    candidates: Strategy,
    evaluate: Callable[[Candidate], Score],
    goal: Goal,
    *,
    output_error: Callable[[Candidate], float],
    log: TrialLog,
    limits: Limits,
    tell: Callable[[Trial], None],
) -> Outcome:
    """Evaluate what `candidates` yields, logging each trial before the next. Trials in the log are not repeated."""
    started = time.monotonic()
    found: dict[Candidate, Trial] = {}
    stopped = None
    verdict: bool | None = None
    while True:
        try:
            candidate = next(candidates) if verdict is None else candidates.send(verdict)
        except StopIteration:
            break
        trial = log.evaluated(candidate.name)
        if trial is None:
            stopped = _spent(limits, len(found), time.monotonic() - started)
            if stopped:
                break
            score = evaluate(candidate)
            trial = Trial(
                candidate.name,
                score.accuracy,
                score.duration_s,
                goal.met(score.accuracy),
                output_error(candidate),
                goal.loss(score.accuracy),
                score.stock_agreement,
                score.logit_difference,
            )
            log.add(trial)
        found[candidate] = trial
        tell(trial)
        verdict = trial.accepted and _stable(trial)
    chosen = _choose(found)
    return Outcome(chosen, found[chosen], found[chosen].accepted, stopped)


def _choose(found: Mapping[Candidate, Trial]) -> Candidate:
    """The cheapest that meets the goal and is stable, else the stablest that meets it, else the most accurate."""
    accepted = [candidate for candidate, trial in found.items() if trial.accepted]
    stable = [candidate for candidate in accepted if _stable(found[candidate])]
    if stable:
        return min(stable, key=lambda candidate: (*_cost(candidate), -found[candidate].accuracy))
    if accepted:
        return max(accepted, key=lambda candidate: found[candidate].stock_agreement or 0.0)
    return max(found, key=lambda candidate: found[candidate].accuracy)


def _stable(trial: Trial) -> bool:
    """Whether the answers survive another order of summation: other kernels, or stock transformers, give them too."""
    return trial.stock_agreement is None or trial.stock_agreement >= STABLE


def _bisect(order: Sequence[str], keep: Callable[[tuple[str, ...]], Candidate]) -> Generator[Candidate, bool, bool]:
    """The fewest of the most sensitive layers that have to be kept, at most half of all. Returns whether any sufficed."""
    low, high, met = 0, len(order) // 2 + 1, False
    while high - low > 1:
        middle = (low + high) // 2
        if (yield keep(tuple(order[:middle]))):
            high, met = middle, True
        else:
            low = middle
    return met


def _cost(candidate: Candidate) -> tuple[int, int, int]:
    """Expected run time, coarsely: float layers cost most, then a scale per token everywhere, then in some layers."""
    return len(candidate.float_layers), candidate.approach == "dynamic", len(candidate.dynamic_layers)


def _spent(limits: Limits, trials: int, seconds: float) -> str | None:
    if trials >= limits.max_trials:
        return f"--max-trials {limits.max_trials}"
    if limits.timeout and trials and seconds >= limits.timeout:
        return f"--timeout {limits.timeout:g} s"
    return None
