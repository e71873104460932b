"""The search: run the trials an order asks for, log each before the next, and choose among them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from .candidates import RECOVERED, Candidate
from .goal import Goal
from .log import TrialLog
from .options import Limits, Options
from .search_orders import Search, Searchable, passed
from .trial import STABLE, Trial


@dataclass(frozen=True)
class Outcome:
    """The chosen candidate and its trial: the best one even where `met` is False. `stopped`: which limit ended it.

    `trial` is None where nothing was there to evaluate with.
    """

    candidate: Candidate
    trial: Trial | None
    met: bool
    stopped: str | None = None


@dataclass(frozen=True)
class Score:
    """What evaluating a quantized model found; the others as in `hfq.tuning.trial.Trial`."""

    accuracy: float
    duration_s: float
    stock_agreement: float | None = None
    output_difference: float | None = None
    memory_mib: float | None = None
    size_mib: float | None = None
    stable_from: float = STABLE
    against: float | None = None
    needed: int | None = None
    examples: int | None = None
    near_ties: float = 0.0


def rank(options: Options, output_error: Callable[[Candidate], float], *, can_smooth: bool) -> dict[Candidate, float]:
    """Output error of every candidate without kept layers, smallest first.

    SmoothQuant and GPTQ are tried on top of the best plain observer, SmoothQuant only where the graph has something
    to fold.
    """
    errors: dict[Candidate, float] = {}
    if options.approach != "dynamic":
        errors |= {candidate: output_error(candidate) for candidate in plain_candidates(options)}
        if can_smooth and options.alphas:
            best = min(errors, key=errors.__getitem__)
            smooth = [replace(best, alpha=alpha) for alpha in options.alphas]
            unsmoothed = {} if options.smooth_always else errors
            errors = unsmoothed | {candidate: output_error(candidate) for candidate in smooth}
        if options.gptq:
            rounded = replace(min(errors, key=errors.__getitem__), gptq=True)
            errors[rounded] = output_error(rounded)
    if options.approach != "static":
        plain = Candidate("dynamic", RECOVERED) if RECOVERED in options.observers else Candidate("dynamic")
        dynamic = [plain, *([replace(plain, gptq=True)] if options.gptq else [])]
        errors |= {candidate: output_error(candidate) for candidate in dynamic}
    return dict(sorted(errors.items(), key=lambda item: item[1]))


def plain_candidates(options: Options) -> list[Candidate]:
    """Those of an observer alone; where nothing may be static, the dynamic one."""
    static = [Candidate("static", observer) for observer in options.observers]
    return static if options.approach != "dynamic" else [Candidate("dynamic")]


def untuned(options: Options, space: Searchable | None) -> Candidate:
    """The candidate of the least output error, where there is nothing to evaluate with."""
    return next(iter(space.errors)) if space else Candidate("dynamic", gptq=options.gptq)


def tune(  # noqa: PLR0913 - of a trial: who names it, who judges it, by what, and who hears of it
    candidates: Search,
    evaluate: Callable[[Candidate], Score],
    goal: Goal,
    *,
    output_error: Callable[[Candidate], float],
    log: TrialLog,
    options: Options,
    tell: Callable[[Trial], None],
) -> Outcome:
    """Evaluate what `candidates` yields, logging each trial before the next. Trials in the log are not repeated."""
    started = time.monotonic()
    found: dict[Candidate, Trial] = {}
    stopped = None
    trial: Trial | None = None
    while True:
        try:
            candidate = next(candidates) if trial is None else candidates.send(trial)
        except StopIteration:
            break
        trial = log.evaluated(candidate.name)
        if trial is None:
            stopped = _spent(options.limits, len(found), time.monotonic() - started)
            if stopped:
                break
            score = evaluate(candidate)
            trial = Trial(
                candidate.name,
                score.accuracy,
                score.duration_s,
                goal.met(score.accuracy) and goal.proved(score.against, trial=log.judged + 1),
                output_error(candidate),
                goal.loss(score.accuracy),
                score.stock_agreement,
                score.output_difference,
                score.memory_mib,
                score.size_mib,
                score.stable_from,
                score.against,
                score.needed,
                score.examples,
                score.near_ties,
            )
            log.add(trial)
        found[candidate] = trial
        tell(trial)
    chosen = _choose(found, options)
    return Outcome(chosen, found[chosen], found[chosen].accepted, stopped)


def _choose(found: Mapping[Candidate, Trial], options: Options) -> Candidate:
    """The best by objective of those that meet the goal and are stable, else the stablest that meets it, else the
    most accurate."""
    accepted = [candidate for candidate, trial in found.items() if trial.accepted]
    stable = [candidate for candidate in accepted if passed(found[candidate])]
    if stable and options.is_fastest:
        return min(stable, key=lambda candidate: (*_cost(candidate), found[candidate].loss))
    if stable:
        return min(stable, key=_by_objective(found, stable, options))
    if accepted:
        return max(accepted, key=lambda candidate: found[candidate].stock_agreement or 0.0)
    return min(found, key=lambda candidate: found[candidate].loss or 0.0)


def _by_objective(
    found: Mapping[Candidate, Trial], among: Sequence[Candidate], options: Options
) -> Callable[[Candidate], float]:
    """A weighted sum of costs, each scaled to [0, 1] over the candidates it is to decide between."""
    costs: dict[str, dict[Candidate, float]] = {
        "performance": {candidate: found[candidate].duration_s for candidate in among},
        "modelsize": {candidate: found[candidate].size_mib or 0.0 for candidate in among},
        "footprint": {candidate: found[candidate].memory_mib or 0.0 for candidate in among},
        "accuracy": {candidate: found[candidate].loss or 0.0 for candidate in among},
    }

    def cost(candidate: Candidate) -> float:
        total = 0.0
        for name, weight in options.objective.items():
            low, high = min(costs[name].values()), max(costs[name].values())
            total += weight * (costs[name][candidate] - low) / max(high - low, 1e-12)
        return total

    return cost


def _cost(candidate: Candidate) -> tuple[int, int, int]:
    """Expected run time, coarsely: float layers cost most, then a scale per token everywhere, then in some layers."""
    return len(candidate.float_layers), candidate.approach == "dynamic", len(candidate.dynamic_layers)


def _spent(limits: Limits, trials: int, seconds: float) -> str | None:
    if trials >= limits.max_trials:
        return f"--max-trials {limits.max_trials}"
    if limits.timeout and trials and seconds >= limits.timeout:
        return f"--timeout {limits.timeout:g} s"
    return None
