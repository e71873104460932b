"""A candidate is evaluated on no more examples than its verdict takes, and the verdict is as right as it is said to be."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.command import CHECKPOINT, forkserver, write_slice
from support.pairs import ACCURACY, drawn, evaluation
from torch import Tensor

from hfq.data.splits import looks
from hfq.measure.certainty import Claim, claim
from hfq.measure.sequential import SURE, decided
from hfq.tuning.goal import Goal

TOLERATED = 0.01
SPLIT = 4000


def looked(first: Tensor, second: Tensor, *, confidence: float | None) -> tuple[int, Claim]:
    """How many examples a verdict took, and what they say; at the last look, what all of them say."""
    goal = Goal(first.double().mean().item(), TOLERATED, "absolute", confidence=confidence)
    ends = looks(len(first), 32)
    level = 1 - confidence if confidence else SURE / len(ends)
    for end in ends:
        pair = (evaluation(first[:end]), evaluation(second[:end]))
        said = claim(ACCURACY, pair, [1] * end, goal=goal, level=level)
        if decided(said, goal, level=level, trial=1):
            break
    return end, said


def losing(share: float, *, seed: int, times: int) -> Sequence[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [drawn(SPLIT, lost=share + 0.01, won=0.01, generator=generator) for _ in range(times)]


def test_looks_are_whole_batches_and_double() -> None:
    assert looks(408, 32) == [408]
    assert looks(700, 32) == [700]
    assert looks(1725, 32) == [512, 1024, 1725]
    assert looks(10_000, 48) == [528, 1056, 2112, 4224, 10_000]


def test_looking_often_claims_no_more_than_looking_once() -> None:
    goal = Goal(0.9, TOLERATED, "absolute", confidence=0.95)
    found = [looked(*pair, confidence=0.95) for pair in losing(TOLERATED + 0.0005, seed=0, times=60)]
    assert sum(goal.proved(said.against, trial=1) for _, said in found) <= 60 * 0.05


@pytest.mark.parametrize("confidence", [0.95, None])
def test_what_is_clear_takes_few_examples(confidence: float | None) -> None:
    hopeless = [looked(*pair, confidence=confidence) for pair in losing(0.06, seed=1, times=10)]
    good = [looked(*pair, confidence=confidence) for pair in losing(-0.05, seed=2, times=10)]
    assert all(end < SPLIT and said.for_ <= 0.05 for end, said in hopeless)
    assert all(end < SPLIT and said.against <= 0.05 for end, said in good)


def test_a_part_of_a_split_says_what_the_whole_would() -> None:
    """One split, of which other examples are seen first each time: it loses a little too much, or a little less."""
    for kept in (SPLIT // 100 - 4, SPLIT // 100 + 4):
        first, second = torch.ones(SPLIT).bool(), torch.arange(SPLIT) >= kept
        goal = Goal(1.0, TOLERATED, "absolute")
        generator = torch.Generator().manual_seed(kept)
        for _ in range(20):
            order = torch.randperm(SPLIT, generator=generator)
            end, said = looked(first[order], second[order], confidence=None)
            if end < SPLIT:
                assert (said.against < said.for_) == goal.met(evaluation(second).score)


def test_a_good_candidate_is_accepted_early_and_measured_whole(tmp_path: Path) -> None:
    write_slice(tmp_path / "data", train=1000, validation=16)
    (tmp_path / "data" / "train.csv").rename(tmp_path / "data" / "dev.csv")
    (tmp_path / "data" / "validation.csv").rename(tmp_path / "data" / "train.csv")
    arguments = ("quantize", CHECKPOINT, "--dataset", tmp_path / "data", "--output", "out", "--approach", "dynamic")
    done = forkserver().hfq(*arguments, "--tolerable-loss", 0.05, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "by 512 examples: meets the goal" in done.err
    report = json.loads(done.out)
    assert report["trials"][0]["examples"] == 512
    assert report["comparisons"][0]["examples"] == report["dataset"]["examples"] == 1000
