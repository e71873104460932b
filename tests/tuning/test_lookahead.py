"""Helpers that evaluate what comes next, early, late or in vain: the search ends as without them, with the same log."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hfq.tuning.candidates import Candidate
from hfq.tuning.goal import Goal
from hfq.tuning.log import TrialLog
from hfq.tuning.lookahead import LookAhead
from hfq.tuning.options import Limits, Options
from hfq.tuning.search import Outcome, Score, tune
from hfq.tuning.search_orders import ORDERS, Searchable

LAYERS = tuple(f"layer.{i}" for i in range(20))
STATIC, DYNAMIC = Candidate("static", "mse"), Candidate("dynamic")
ERRORS = {STATIC: 0.10, Candidate("static", "min-max"): 0.12, DYNAMIC: 0.02}


def error(candidate: Candidate) -> float:
    base = ERRORS.get(Candidate(candidate.approach, candidate.observer), ERRORS[STATIC])
    return base - (base - ERRORS[DYNAMIC]) * len(candidate.dynamic_layers) / len(LAYERS)


def score(candidate: Candidate, needed: int) -> Score:
    """It meets the goal if so many layers are float."""
    return Score(0.8 if len(candidate.float_layers) >= needed else 0.5 + len(candidate.float_layers) / 100, 1.0)


@dataclass
class Others:
    """They take a few at a time, and are late for some. A plan is the candidate itself here."""

    evaluate: Callable[[Candidate], Score]
    room: int = 3
    luck: random.Random = field(default_factory=lambda: random.Random(0))
    begun: list[Candidate] = field(default_factory=list)
    taken: list[Candidate] = field(default_factory=list)
    dropped: list[Candidate] = field(default_factory=list)

    def begin(self, plan: Candidate) -> Candidate | None:
        if len(self.begun) - len(self.taken) - len(self.dropped) >= self.room:
            return None
        self.begun.append(plan)
        return plan

    def score(self, begun: Candidate) -> Score | None:
        if self.luck.random() < 0.3:
            self.drop(begun)
            return None
        self.taken.append(begun)
        return self.evaluate(begun)

    def drop(self, begun: Candidate) -> None:
        self.dropped.append(begun)


def search(path: Path, options: Options, evaluate: Callable[[Candidate], Score], others: Others | None) -> Outcome:
    log = TrialLog(path, depends_on={}, resume=False)

    def logged(candidate: Candidate) -> float:
        if candidate.name not in log.ranking:
            log.rank(candidate.name, error(candidate))
        return log.ranking[candidate.name]

    order = ORDERS[options.order]
    ahead = None
    if others:
        unlogged = Searchable(ERRORS, lambda _: LAYERS, error, options, error)
        ahead = LookAhead(order, unlogged, helpers=others, plan=lambda candidate: candidate, log=log)
    outcome = tune(
        order(Searchable(ERRORS, lambda _: LAYERS, logged, options, error)),
        lambda candidate: (ahead and ahead.score(candidate)) or evaluate(candidate),
        Goal(baseline=0.8, tolerable_loss=0.01),
        output_error=logged,
        log=log,
        options=options,
        tell=lambda _: None,
    )
    if ahead:
        ahead.close()
    return outcome


@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize("needed", [0, 3, 99])
@pytest.mark.parametrize("order", [name for name in ORDERS if name not in ("bayesian", "tpe")])  # minutes
def test_looking_ahead_changes_neither_choice_nor_log(order: str, needed: int, explore: bool, tmp_path: Path) -> None:
    options = Options(order=order, explore=explore, limits=Limits(max_trials=12))
    others = Others(lambda candidate: score(candidate, needed))
    alone = search(tmp_path / "alone", options, others.evaluate, None)
    helped = search(tmp_path / "helped", options, others.evaluate, others)
    assert helped == alone
    assert (tmp_path / "helped").read_text() == (tmp_path / "alone").read_text()
    assert sorted(map(repr, others.begun)) == sorted(map(repr, others.taken + others.dropped)), "none is left running"
    if needed == 99 and order != "conservative":  # which ends there
        assert others.taken, "each guess is right where nothing meets the goal"


def test_nothing_is_begun_if_the_first_trial_meets_the_goal(tmp_path: Path) -> None:
    others = Others(lambda candidate: score(candidate, 0))
    assert search(tmp_path / "log", Options(), others.evaluate, others).candidate == STATIC
    assert others.begun == []


def test_no_more_is_begun_than_trials_are_left(tmp_path: Path) -> None:
    others = Others(lambda candidate: score(candidate, 99), room=99)
    search(tmp_path / "log", Options(explore=True, limits=Limits(max_trials=3)), others.evaluate, others)
    assert len(others.begun) == 2
