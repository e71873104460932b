"""Which candidates are evaluated, in which order, when the search ends, and what the log is good for."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from hfq.common.errors import ExportError
from hfq.measure.statistics import mcnemar_p, middle, resampled
from hfq.tuning.candidates import Candidate
from hfq.tuning.goal import Goal
from hfq.tuning.log import TrialLog
from hfq.tuning.options import ALPHAS, Limits, Options
from hfq.tuning.search import Outcome, Score, rank, tune
from hfq.tuning.search_orders import FINALISTS, GAP_CLOSED, Searchable, basic
from hfq.tuning.trial import STABLE, Look, Trial

LAYERS = tuple(f"layer.{i}" for i in range(20))  # the most sensitive first
MIN_MAX, MSE, ENTROPY = (Candidate("static", observer) for observer in ("min-max", "mse", "entropy"))
DYNAMIC = Candidate("dynamic")
ERRORS = {MSE: 0.10, MIN_MAX: 0.12, ENTROPY: 0.15, DYNAMIC: 0.02}
GOAL = Goal(baseline=0.8, tolerable_loss=0.01)
GOOD, BAD = 0.8, 0.7
Accuracy = Callable[[Candidate], float]


def output_error(candidate: Candidate) -> float:
    """Each layer made dynamic takes away the same share of what all static loses to all dynamic."""
    base = ERRORS[Candidate(candidate.approach, candidate.observer)]
    return base - (base - ERRORS[DYNAMIC]) * len(candidate.dynamic_layers) / len(LAYERS)


def tier(candidate: Candidate) -> str:
    return f"{candidate.approach}{' mixed' * bool(candidate.dynamic_layers)}{' float' * bool(candidate.float_layers)}"


@dataclass
class Search:
    """One search over made-up accuracies. `evaluated`: what was evaluated, in order."""

    log: TrialLog
    evaluated: list[Candidate] = field(default_factory=list)
    told: list[Trial] = field(default_factory=list)

    def run(
        self,
        accuracy: Accuracy,
        *,
        errors: Mapping[Candidate, float] = ERRORS,
        goal: Goal = GOAL,
        approach: str = "auto",
        explore: bool = False,
        max_trials: int = 100,
        timeout: float = 0,
        agreement: Accuracy | None = None,
        near_ties: float = 0.0,
        output_error: Accuracy = output_error,
    ) -> Outcome:
        options = Options(approach=approach, explore=explore, limits=Limits(max_trials, timeout))

        def evaluate(candidate: Candidate) -> Score:
            self.evaluated.append(candidate)
            return Score(accuracy(candidate), 1.5, agreement(candidate) if agreement else None, near_ties=near_ties)

        return tune(
            basic(Searchable(errors, lambda _: LAYERS, output_error, options, output_error)),
            evaluate,
            goal,
            output_error=output_error,
            log=self.log,
            options=options,
            tell=self.told.append,
        )

    @property
    def tiers(self) -> list[str]:
        """Kinds of candidates in order, each once in a row."""
        kinds = [tier(candidate) for candidate in self.evaluated]
        return [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return Search(make_log(tmp_path))


def observed(approach: str) -> Options:
    return Options(approach=approach, observers=["min-max", "mse"])


def make_log(folder: Path, *, resume: bool = False, **depends_on: Any) -> TrialLog:
    return TrialLog(
        folder / "trials.jsonl", depends_on={"seed": 42, "recipe": {"batch_size": 32}, **depends_on}, resume=resume
    )


def test_first_candidate_that_meets_the_goal_ends_the_search(search: Search) -> None:
    outcome = search.run(lambda _: GOOD)
    assert search.evaluated == [MSE]  # the least output error of the static ones
    assert (outcome.candidate, outcome.met, outcome.stopped) == (MSE, True, None)
    assert outcome.trial == Trial("static, mse", GOOD, 1.5, True, output_error(MSE), 0.0)
    assert search.told == [outcome.trial]


def test_candidates_come_from_the_fastest_to_the_slowest(search: Search) -> None:
    outcome = search.run(lambda _: BAD)
    assert search.tiers == ["static", "static mixed", "dynamic", "static float", "dynamic float"]
    assert not outcome.met
    assert len(set(search.evaluated)) == len(search.evaluated)


@pytest.mark.parametrize("kind", ["static", "static mixed", "dynamic", "static float", "dynamic float"])
def test_search_ends_with_the_kind_that_meets_the_goal(search: Search, kind: str) -> None:
    outcome = search.run(lambda candidate: GOOD if tier(candidate) == kind else BAD)
    assert search.tiers[-1] == tier(outcome.candidate) == kind
    assert outcome.met


def test_few_static_candidates_are_evaluated_and_the_best_ones(search: Search) -> None:
    search.run(lambda _: BAD)
    static = [candidate for candidate in search.evaluated if tier(candidate) == "static"]
    assert static == [MSE, MIN_MAX, ENTROPY][:FINALISTS]


def test_mixed_is_not_tried_where_dynamic_is_no_better(search: Search) -> None:
    search.run(lambda _: BAD, errors={**ERRORS, DYNAMIC: 0.3})
    assert search.tiers == ["static", "dynamic", "static float", "dynamic float"]


def test_mixed_makes_the_fewest_most_sensitive_layers_dynamic(search: Search) -> None:
    search.run(lambda _: BAD)
    mixed = [candidate.dynamic_layers for candidate in search.evaluated if tier(candidate) == "static mixed"]
    for layers, share in zip(mixed, GAP_CLOSED, strict=True):
        target = 0.10 - share * (0.10 - 0.02)
        assert layers == LAYERS[: len(layers)]
        assert output_error(Candidate("static", "mse", dynamic_layers=layers)) <= target + 1e-12
        assert output_error(Candidate("static", "mse", dynamic_layers=layers[:-1])) > target + 1e-12


@pytest.mark.parametrize(("approach", "others"), [("static", "dynamic"), ("dynamic", "static")])
def test_approach_that_was_not_asked_for_is_not_tried(search: Search, approach: str, others: str) -> None:
    errors = rank(observed(approach), output_error, can_smooth=False)
    search.run(lambda _: BAD, errors=errors, approach=approach)
    assert search.tiers == [approach, f"{approach} float"]
    assert others not in {candidate.approach for candidate in errors}


def test_ranking_tries_smoothing_on_the_best_observer_only() -> None:
    def error(candidate: Candidate) -> float:
        return {"min-max": 0.3, "mse": 0.1}[candidate.observer] + (candidate.alpha or 0) / 100

    ranked = rank(observed("static"), error, can_smooth=True)
    assert list(ranked.values()) == sorted(ranked.values())
    assert {(c.observer, c.alpha) for c in ranked if c.alpha} == {("mse", alpha) for alpha in ALPHAS}
    assert not [c for c in rank(observed("static"), error, can_smooth=False) if c.alpha]


@pytest.mark.parametrize("approach", ["static", "dynamic"])
@pytest.mark.parametrize("needed", range(1, 11))
def test_fewest_float_layers_are_found_by_bisection(search: Search, approach: str, needed: int) -> None:
    errors = {c: error for c, error in ERRORS.items() if c.approach == approach}
    outcome = search.run(lambda c: GOOD if len(c.float_layers) >= needed else BAD, errors=errors, approach=approach)
    assert outcome.met
    assert outcome.candidate.float_layers == LAYERS[:needed]
    assert len([c for c in search.evaluated if c.float_layers]) <= 4  # of 10 that are possible


def test_no_more_than_half_of_the_layers_are_kept(search: Search) -> None:
    outcome = search.run(lambda c: GOOD if len(c.float_layers) > 10 else BAD)
    assert not outcome.met
    assert max(len(c.float_layers) for c in search.evaluated) == 10


def test_lucky_candidate_does_not_end_the_search(search: Search) -> None:
    outcome = search.run(lambda _: GOOD, agreement=lambda c: STABLE - (c.approach == "static") / 100)
    assert search.tiers == ["static", "static mixed", "dynamic"]
    assert (outcome.candidate, outcome.met) == (DYNAMIC, True)
    assert outcome.trial.stock_agreement == STABLE


@pytest.mark.parametrize("tokens_help", [True, False])
def test_layers_that_stand_out_are_tried_without_static_before_anything_else_is(
    search: Search, tokens_help: bool
) -> None:
    spoiled = set(LAYERS[:3])

    def error(candidate: Candidate) -> float:
        mended = {*candidate.float_layers, *(candidate.dynamic_layers if tokens_help else ())}
        return 0.05 if candidate.approach == "dynamic" else 0.01 + 0.3 * len(spoiled - mended)

    errors = {MSE: error(MSE), DYNAMIC: error(DYNAMIC)}
    outcome = search.run(lambda c: GOOD if error(c) < 0.1 else BAD, errors=errors, output_error=error)
    assert search.evaluated == [MSE, outcome.candidate]
    assert outcome.candidate.approach == "static"
    assert (outcome.candidate.dynamic_layers if tokens_help else outcome.candidate.float_layers) == LAYERS[:3]


@pytest.mark.parametrize("tokens_help", [True, False])
def test_what_spoiled_layers_hid_is_ranked_again_without_them(search: Search, tokens_help: bool) -> None:
    """Their error is luck, in which entropy comes first; without them it is min-max, with a fourth layer dynamic."""
    spoiled, lucky = set(LAYERS[:3]), {ENTROPY: 1.0, MSE: 1.1, MIN_MAX: 1.2}
    own = {"entropy": 0.06, "mse": 0.05, "min-max": 0.04}

    def error(candidate: Candidate) -> float:
        mended = {*candidate.float_layers, *(candidate.dynamic_layers if tokens_help else ())}
        if candidate.approach == "dynamic":
            return 0.01 + (0 if tokens_help else len(spoiled - mended))
        left = own[candidate.observer] if LAYERS[3] not in candidate.dynamic_layers else 0.011
        return left + (len(spoiled - mended) / 3) * lucky[Candidate("static", candidate.observer)]

    errors = {candidate: error(candidate) for candidate in (ENTROPY, MSE, MIN_MAX, DYNAMIC)}
    outcome = search.run(lambda c: GOOD if error(c) < 0.02 else BAD, errors=errors, output_error=error, approach="auto")
    first, *rest = [c.observer for c in search.evaluated if c.dynamic_layers or c.float_layers][: len(own)]
    assert (first, rest) == ("min-max", ["mse", "entropy"])
    assert outcome.candidate.observer == "min-max"
    assert {*outcome.candidate.float_layers, *outcome.candidate.dynamic_layers} == set(LAYERS[:4])
    assert outcome.candidate.float_layers == (() if tokens_help else LAYERS[:3])


def test_near_ties_do_not_send_the_search_on(search: Search) -> None:
    outcome = search.run(lambda _: GOOD, agreement=lambda _: 0.98, near_ties=0.01)
    assert search.evaluated == [MSE]
    assert outcome.trial.stock_agreement == 0.98


def test_stablest_of_lucky_candidates_is_better_than_none(search: Search) -> None:
    outcome = search.run(lambda _: GOOD, agreement=lambda c: 0.9 + len(c.dynamic_layers) / 1000)
    assert outcome.met
    assert len(outcome.candidate.dynamic_layers) == max(len(c.dynamic_layers) for c in search.evaluated)


def test_a_trial_that_its_export_refutes_is_not_chosen_again(search: Search) -> None:
    accepted = search.run(lambda _: GOOD)
    search.log.refute(accepted.trial, accuracy=BAD, loss=GOAL.loss(BAD))
    outcome = search.run(lambda _: GOOD)
    assert search.evaluated == [MSE, MIN_MAX]  # each once
    assert (outcome.candidate, outcome.met) == (MIN_MAX, True)
    assert [(trial.name, trial.accepted) for trial in search.log.trials] == [
        ("static, mse", False),
        ("static, min-max", True),
    ]


@pytest.mark.parametrize("limit", [1, 3, 6])
def test_max_trials_ends_the_search(search: Search, limit: int) -> None:
    scores = iter([0.70, 0.72, 0.75, 0.71, 0.73, 0.74])
    outcome = search.run(lambda _: next(scores), max_trials=limit)
    assert len(search.evaluated) == len(search.log.trials) == limit
    assert (outcome.met, outcome.stopped) == (False, f"--max-trials {limit}")
    assert outcome.trial.accuracy == max(trial.accuracy for trial in search.log.trials)
    assert outcome.trial.name == outcome.candidate.name


def test_timeout_ends_the_search_after_a_trial(search: Search) -> None:
    outcome = search.run(lambda _: BAD, timeout=1e-9)
    assert len(search.evaluated) == 1  # not none: there is something to report
    assert outcome.stopped == "--timeout 1e-09 s"
    assert not outcome.met


def test_goal_met_by_the_last_allowed_trial_counts(search: Search) -> None:
    outcome = search.run(lambda c: GOOD if tier(c) == "static mixed" else BAD, max_trials=FINALISTS + 1)
    assert (outcome.met, outcome.stopped) == (True, None)


def test_exploring_evaluates_every_kind_and_chooses_the_fastest(search: Search) -> None:
    best = {MIN_MAX: 0.799, MSE: 0.795, ENTROPY: 0.5}
    outcome = search.run(lambda c: best.get(c, 0.81), explore=True)
    assert {MSE, MIN_MAX, ENTROPY, DYNAMIC} <= set(search.evaluated)
    assert {"static mixed", "static float", "dynamic float"} <= {tier(c) for c in search.evaluated}
    assert outcome.candidate == MIN_MAX  # as fast as MSE and more accurate; the others are slower
    assert outcome.met


def test_exploring_prefers_few_dynamic_layers_to_all(search: Search) -> None:
    outcome = search.run(lambda c: BAD if tier(c) == "static" else GOOD, explore=True)
    assert tier(outcome.candidate) == "static mixed"
    smallest = min(len(c.dynamic_layers) for c in search.evaluated if c.dynamic_layers)
    assert len(outcome.candidate.dynamic_layers) == smallest


def test_trial_is_on_disk_before_the_next_starts(search: Search) -> None:
    on_disk: list[int] = []

    def look(_: Candidate) -> float:
        on_disk.append(len(search.log.path.read_text().splitlines()) - 1)
        return BAD

    search.run(look)
    assert on_disk == list(range(len(search.evaluated)))


@pytest.mark.parametrize("interrupted_at", [0, 1, 2, 4])
def test_resuming_repeats_no_trial(tmp_path: Path, interrupted_at: int) -> None:
    def accuracy(candidate: Candidate) -> float:
        return GOOD if len(candidate.float_layers) >= 3 else BAD - len(candidate.float_layers) / 100

    whole_folder, folder = tmp_path / "whole", tmp_path / "parts"
    whole_folder.mkdir()
    folder.mkdir()
    whole = Search(make_log(whole_folder))
    expected = whole.run(accuracy)

    first = Search(make_log(folder))

    def interrupt(candidate: Candidate) -> float:
        if len(first.evaluated) > interrupted_at:
            raise KeyboardInterrupt
        return accuracy(candidate)

    with pytest.raises(KeyboardInterrupt):
        first.run(interrupt)
    second = Search(make_log(folder, resume=True))
    assert second.run(accuracy) == expected
    assert first.evaluated[:interrupted_at] + second.evaluated == whole.evaluated
    assert second.log.trials == whole.log.trials
    assert second.told == whole.told

    third = Search(make_log(folder, resume=True))
    assert third.run(accuracy) == expected
    assert third.evaluated == []


def test_resumed_trials_count_for_max_trials(tmp_path: Path) -> None:
    Search(make_log(tmp_path)).run(lambda _: BAD, max_trials=2)
    again = Search(make_log(tmp_path, resume=True))
    assert again.run(lambda _: BAD, max_trials=2).stopped == "--max-trials 2"
    assert again.evaluated == []
    more = Search(make_log(tmp_path, resume=True))
    more.run(lambda _: BAD, max_trials=3)
    assert len(more.evaluated) == 1


def test_ranking_is_remembered(tmp_path: Path) -> None:
    make_log(tmp_path).rank("static, mse", 0.125)
    assert make_log(tmp_path, resume=True).ranking == {"static, mse": 0.125}


def test_looks_at_a_training_are_remembered_and_count_as_judged(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    assert not log.goes_on
    Search(log).run(lambda _: BAD, max_trials=2)
    for steps in (50, 100, 50):  # the last after it began anew
        log.look(Look(steps, loss=0.5, score=BAD))
    again = make_log(tmp_path, resume=True)
    assert again.goes_on
    assert again.looks == [Look(50, loss=0.5, score=BAD)]
    assert again.judged == 3


@pytest.mark.parametrize(
    ("resume", "changes"),
    [(True, {"seed": 43}), (True, {"recipe": {"batch_size": 16}}), (True, {"more": None}), (False, {})],
    ids=str,
)
def test_log_of_another_run_is_dropped(tmp_path: Path, resume: bool, changes: dict[str, Any]) -> None:
    Search(make_log(tmp_path)).run(lambda _: BAD)
    log = make_log(tmp_path, resume=resume, **changes)
    assert (log.trials, log.ranking) == ([], {})
    assert len(log.path.read_text().splitlines()) == 1
    again = Search(log)
    again.run(lambda _: GOOD)
    assert len(again.evaluated) == 1


@pytest.mark.parametrize(
    "torn", [b'{"trial": {"accura', b'{"ranked": "dyn', b"{", b"\0" * 100, b'{"ranked": "\xc3'], ids=repr
)
def test_line_that_was_being_written_is_forgotten(tmp_path: Path, torn: bytes) -> None:
    Search(make_log(tmp_path)).run(lambda _: BAD, max_trials=2)
    path = tmp_path / "trials.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    log = make_log(tmp_path, resume=True)
    assert len(log.trials) == 2
    assert path.read_bytes() == whole
    log.rank("static, mse", 0.5)
    assert make_log(tmp_path, resume=True).ranking == {"static, mse": 0.5}


@pytest.mark.parametrize("content", ["", "{", "[]\n", "not json\n{}\n"])
def test_log_without_a_beginning_is_dropped(tmp_path: Path, content: str) -> None:
    (tmp_path / "trials.jsonl").write_text(content)
    assert make_log(tmp_path, resume=True).trials == []


def test_missing_log_is_a_fresh_start(tmp_path: Path) -> None:
    log = make_log(tmp_path, resume=True)
    log.add(Trial("dynamic", 0.5, 1.0, False))
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert lines[1]["trial"]["name"] == "dynamic"


def test_log_that_cannot_be_written_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"trials\.jsonl cannot be written: No such file or directory"):
        make_log(tmp_path / "none")
    log = make_log(tmp_path)
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(ExportError, match="cannot be written: Is a directory"):
        log.add(Trial("dynamic", 0.5, 1.0, False))


@pytest.mark.parametrize(
    ("kind", "baseline", "score", "loss"),
    [
        ("relative", 0.8, 0.792, 0.01),
        ("absolute", 0.8, 0.792, 0.008),
        ("relative", 0.5, 0.6, -0.2),
        ("absolute", 0.5, 0.6, -0.1),
        ("relative", -0.2, -0.3, 0.5),  # a correlation
        ("relative", 0.0, -0.1, 0.1),  # nothing to be relative to
    ],
)
def test_loss_is_counted_as_the_goal_says(kind: str, baseline: float, score: float, loss: float) -> None:
    assert Goal(baseline, 0.01, kind).loss(score) == pytest.approx(loss)


@pytest.mark.parametrize(
    ("kind", "least"), [("relative", 0.8 * 0.99), ("absolute", 0.79)], ids=["relative", "absolute"]
)
def test_goal_is_met_by_equality_and_missed_by_one_example(kind: str, least: float) -> None:
    goal = Goal(0.8, 0.01, kind)
    assert goal.met(least)
    assert goal.met(0.9)
    assert not goal.met(least - 1 / 100_000)


@pytest.mark.parametrize("correct", range(1, 409, 37))
def test_no_loss_tolerated_means_as_good(correct: int) -> None:
    goal = Goal(correct / 408, 0.0)
    assert goal.met(correct / 408)
    assert goal.met(1 - (408 - correct) / 408)  # the same number by another way
    assert not goal.met((correct - 1) / 408)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (5, 4, 1.0),
        (10, 0, 2 / 2**10),
        (1, 9, 2 * (1 + 10) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
        (121, 59, 4.4344e-6),  # 2 * sum(comb(180, k) for k in range(60)) / 2**180
    ],
)
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int, p: float) -> None:
    assert mcnemar_p(first, second) == pytest.approx(p, rel=1e-3)
    assert mcnemar_p(second, first) == mcnemar_p(first, second)


def right(count: int, *, of: int = 408) -> torch.Tensor:
    return torch.arange(of) < count


def interval(first: torch.Tensor, second: torch.Tensor, *, seed: int) -> tuple[float, float]:
    """Of the accuracy, from which answers are right."""
    numbers = [torch.stack([rights, torch.ones_like(rights)], 1).double() for rights in (first, second)]
    return middle(resampled(lambda sums: sums[..., 0] / sums[..., 1], *numbers, seed=seed))


def test_interval_of_equal_models_is_zero() -> None:
    assert interval(right(330), right(330), seed=0) == (0.0, 0.0)


def test_interval_of_a_few_examples_covers_zero() -> None:
    first, second = right(330), right(330)
    second[[1, 5, 9, 13, 17]] = False
    second[[400, 401, 402, 403]] = True
    low, high = interval(first, second, seed=0)
    assert low < -1 / 408 < high
    assert low < 0 < high
    assert high - low < 0.05


def test_interval_of_very_different_models_does_not_cover_zero() -> None:
    low, high = interval(right(330), right(281), seed=0)
    assert low < -49 / 408 < high < 0
    low, high = interval(right(281), right(330), seed=0)
    assert 0 < low < 49 / 408 < high


def test_interval_is_that_of_the_normal_approximation_and_of_the_seed() -> None:
    first, second = right(1400, of=2000), right(1400, of=2000)
    second[:60] = False
    second[1400:1420] = True
    deviation = (80 / 2000 - 0.02**2) ** 0.5 / 2000**0.5
    found = interval(first, second, seed=1)
    assert found == pytest.approx((-0.02 - 1.96 * deviation, -0.02 + 1.96 * deviation), abs=deviation / 5)
    assert found == interval(first, second, seed=1)
    assert found != interval(first, second, seed=2)
