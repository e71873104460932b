"""How sure examples make a claim: by simulation, no more often wrong than said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.command import CHECKPOINT, DEMO, forkserver
from support.pairs import ACCURACY, F1, drawn, evaluation
from torch import Tensor

from hfq.measure.certainty import Claim, claim, plausible_differences, within
from hfq.measure.evaluate import Evaluation
from hfq.measure.statistics import middle, on_others, resampled_differences
from hfq.tasks.base import Metric
from hfq.tasks.metrics import Torchmetric
from hfq.tasks.text.text_classification import TextClassification
from hfq.tuning.goal import Goal

TOLERATED = 0.01


def found(first: Tensor, second: Tensor, *, confidence: float = 0.95) -> Claim:
    pair = (evaluation(first), evaluation(second))
    goal = Goal(pair[0].score, TOLERATED, "absolute", confidence=confidence)
    return claim(ACCURACY, pair, [1] * len(first), goal=goal, level=1 - confidence)


def sure(first: Tensor, second: Tensor, *, metric: Metric = ACCURACY) -> float:
    pair, references = (evaluation(first), evaluation(second)), [1] * len(first)
    goal = Goal(pair[0].score, TOLERATED, "absolute")
    return within(
        metric, pair, references, goal=goal, differences=resampled_differences(metric, pair, references, seed=0)
    )


@pytest.mark.parametrize("examples", [100, 408, 2000])
@pytest.mark.parametrize("won", [0.0, 0.02])
def test_what_is_lost_is_claimed_to_be_kept_no_more_often_than_said(examples: int, won: float) -> None:
    """Models that lose a little more than they may, on splits by chance: five in a hundred are accepted at most."""
    generator = torch.Generator().manual_seed(examples)
    goal = Goal(0.9, TOLERATED, "absolute", confidence=0.95)
    claims = 0
    for _ in range(200):
        first, second = drawn(examples, lost=TOLERATED + won + 0.0005, won=won, generator=generator)
        claims += goal.proved(found(first, second).against, trial=1)
    assert claims <= 200 * 0.05


def test_the_best_of_many_trials_is_accepted_no_more_often_than_one() -> None:
    generator = torch.Generator().manual_seed(0)
    goal = Goal(0.9, TOLERATED, "absolute", confidence=0.9)
    claims = 0
    for _ in range(40):
        for trial in range(1, 11):
            first, second = drawn(1000, lost=TOLERATED + 0.0105, won=0.01, generator=generator)
            if goal.proved(found(first, second, confidence=0.9).against, trial=trial):
                claims += 1
                break
    assert claims <= 40 * 0.1


@pytest.mark.parametrize("examples", [50, 400])
def test_what_a_set_loses_is_claimed_to_be_kept_no_more_often_than_said(examples: int) -> None:
    """F1 of a label that one in four examples has, of which int8 loses 1.1 points: mostly more than a split can show."""
    generator, metric, claims = torch.Generator().manual_seed(examples), F1(), 0
    for _ in range(80):
        positive, *chances = torch.rand(4, examples, generator=generator)
        first = torch.where(positive < 0.25, chances[0] < 0.9, chances[1] < 0.05)
        second = first & ~((positive < 0.25) & (chances[2] < 0.022))
        references = (positive < 0.25).long().tolist()
        outputs = [list(torch.nn.functional.one_hot(given.long(), 2).float()) for given in (first, second)]
        pair = tuple(Evaluation(metric.score(rows, references), rows, 0.0) for rows in outputs)
        goal = Goal(pair[0].score, TOLERATED, "absolute", confidence=0.95)
        claims += goal.proved(claim(metric, pair, references, goal=goal).against, trial=1)
    assert claims <= 80 * 0.05


@pytest.mark.parametrize("metric", ["recall", "precision"])
def test_a_loss_among_what_is_rare_is_not_taken_for_kept(metric: str) -> None:
    """Of 40 examples four have the label or fewer: int8 misses 1.5 % of such."""
    judge, claims = TextClassification({"id2label": {0: "no", 1: "yes"}}).metrics[metric], 0
    generator = torch.Generator().manual_seed(0)
    goal = Goal(0.0, TOLERATED, confidence=0.95)
    for positives in range(5):
        positive = torch.arange(40) < positives
        missed = torch.rand(40, generator=generator) < 0.015
        outputs = [
            list(torch.nn.functional.one_hot(given.long(), 2).float()) for given in (positive, positive & ~missed)
        ]
        references = positive.long().tolist()
        pair = tuple(Evaluation(judge.score(rows, references), rows, 0.0) for rows in outputs)
        said = claim(judge, pair, references, goal=replace(goal, baseline=pair[0].score))
        claims += goal.proved(said.against, trial=1)
        assert said.for_ > 0.05 or missed[positive].any()
    assert claims == 0


def test_a_small_set_without_an_error_is_undecided_too() -> None:
    right = torch.arange(40) % 2
    pair = (Evaluation(1.0, list(torch.nn.functional.one_hot(right, 2).float()), 0.0),) * 2
    goal = Goal(1.0, TOLERATED, "absolute", confidence=0.95)
    said = claim(F1(), pair, right.tolist(), goal=goal)
    assert min(said.against, said.for_) > 0.05


def test_a_small_set_without_a_loss_is_undecided_and_says_how_many_would_decide() -> None:
    first, _ = drawn(200, lost=0, won=0, generator=torch.Generator().manual_seed(0))
    few, many = (
        Evaluation(F1().score(rows, [1] * len(rows)), rows, 0.0)
        for rows in (evaluation(first[:60]).outputs, evaluation(first.repeat(3)).outputs)
    )
    said, enough = (
        claim(
            F1(),
            (found, found),
            [1] * len(found.outputs),
            goal=Goal(found.score, TOLERATED, "absolute", confidence=0.95),
        )
        for found in (few, many)
    )
    assert said.against > 0.05
    assert said.for_ > 0.05
    assert 60 < (said.needed or 0) < 600
    assert enough.against < 0.05


def test_what_is_kept_is_claimed_where_there_are_enough_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    goal = Goal(0.9, TOLERATED, "absolute", confidence=0.95)
    few, many = ([drawn(n, lost=0.002, won=0.002, generator=generator) for _ in range(50)] for n in (100, 3000))
    assert not any(goal.proved(found(*pair).against, trial=1) for pair in few)
    assert sum(goal.proved(found(*pair).against, trial=1) for pair in many) > 40


def test_an_undecided_split_says_how_many_examples_would_decide() -> None:
    first, second = drawn(408, lost=0.012, won=0.008, generator=torch.Generator().manual_seed(1))
    undecided = found(first, second)
    assert undecided.needed is not None
    assert undecided.needed > 408
    more = -(-undecided.needed // 408)
    assert found(first.repeat(more), second.repeat(more)).needed is None


@pytest.mark.parametrize(("lost", "won"), [(0.0, 0.0), (0.03, 0.02)])
def test_what_a_split_says_of_others_holds_there(lost: float, won: float) -> None:
    """Splits of 400, and another 400 for each: the interval of all examples holds of all, the wider one of the others."""
    generator = torch.Generator().manual_seed(3)
    of_all, of_others = 0, 0
    for _ in range(60):
        here, there = (tuple(map(evaluation, drawn(400, lost=lost, won=won, generator=generator))) for _ in range(2))
        differences = plausible_differences(ACCURACY, here, [1] * 400, seed=0)
        low, high = middle(differences)
        of_all += low <= won - lost <= high
        low, high = middle(on_others(differences))
        of_others += low <= there[1].score - there[0].score <= high
    assert of_all >= 60 * 0.9  # 95 %, as far as 60 of them tell
    assert of_others >= 60 * 0.95


def test_models_that_answer_alike_are_not_certain_to_go_on_so() -> None:
    same = torch.arange(408) < 360
    assert 0.9 < sure(same, same) < 1
    assert sure(same[:40], same[:40]) < sure(same, same)


def test_a_loss_that_is_far_too_large_is_seen_as_one() -> None:
    first, second = torch.ones(400).bool(), torch.arange(400) >= 60
    assert sure(first, second) < 0.001
    far = found(first, second)
    assert far.for_ < 0.001
    assert far.against == 1


def test_the_metric_of_a_set_is_resampled() -> None:
    f1 = Torchmetric("F1", "f1_score", lambda o, r: (torch.stack(o).argmax(1), torch.tensor(r)), task="binary")
    first, second = drawn(400, lost=0.002, won=0.002, generator=torch.Generator().manual_seed(1))
    assert sure(first, second, metric=f1) > 0.8


def test_a_confidence_that_the_examples_do_not_give_is_undecided_and_said(tmp_path: Path) -> None:
    arguments = ("quantize", CHECKPOINT, "--dataset", DEMO / "data", "--output", "out", "--approach", "dynamic")
    asked = ("--confidence", 0.99999, "--max-trials", 1, "--tolerable-loss", 0.003, "--allow-loss", "--json")
    done = forkserver().hfq(*arguments, *asked, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "undecided (" in done.err
    assert "examples would decide" in done.err
    report = json.loads(done.out)
    assert report["goal"]["confidence"] == 0.99999
    assert not report["trials"][0]["accepted"]
    assert 0.5 < report["comparisons"][0]["within"] < 1
    assert "sure that the loss is within" in (tmp_path / "out" / "README.md").read_text()
