"""How sure examples make a claim: by simulation, no more often wrong than said."""

import json
from pathlib import Path

import pytest
import torch
from support.command import CHECKPOINT, DEMO, forkserver
from support.pairs import ACCURACY, drawn, evaluation
from torch import Tensor

from hfq.measure.certainty import Claim, claim, within
from hfq.measure.statistics import resampled_differences
from hfq.tasks.base import Metric
from hfq.tasks.metrics import Torchmetric
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
    for _ in range(60):
        for trial in range(1, 11):
            first, second = drawn(1000, lost=TOLERATED + 0.0105, won=0.01, generator=generator)
            if goal.proved(found(first, second, confidence=0.9).against, trial=trial):
                claims += 1
                break
    assert claims <= 60 * 0.1


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
