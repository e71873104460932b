"""Evaluating what an order will ask for next, where others have room to do it. It changes no result.

An order is a function of its space and of the trials that it is sent. What it asks for after the trials there are is
seen by running it anew on them, with the guess that those that are not there yet miss the goal: else the search would end.
The search itself stays as it is; what was evaluated in vain is not logged.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol

from ..ptq.scheme import Plan
from .candidates import Candidate
from .log import TrialLog
from .search import Score
from .search_orders import Search, Searchable
from .trial import Trial


class Helpers(Protocol):
    """Others who can evaluate plans meanwhile."""

    def begin(self, plan: Plan) -> Any | None:
        """Have a plan evaluated; None if there is no room for it now."""

    def score(self, begun: Any) -> Score | None:
        """What `begin` returned, as its score. None if it was not begun yet, or was lost: then it is given up."""

    def drop(self, begun: Any) -> None:
        """Forget what `begin` returned."""


class LookAhead:
    """Scores of candidates that helpers evaluate before they are asked for."""

    def __init__(
        self,
        order: Callable[[Searchable], Search],
        searchable: Searchable,
        *,
        helpers: Helpers,
        plan: Callable[[Candidate], Plan],
        log: TrialLog,
    ) -> None:
        self._order = order
        self._searchable = searchable
        self._helpers = helpers
        self._plan = plan
        self._log = log
        self._begun: dict[str, Any] = {}

    def score(self, candidate: Candidate) -> Score | None:
        """The score of a candidate that the search has come to. None: it is to be evaluated here."""
        options = self._searchable.options
        begun = self._begun.pop(candidate.name, None)
        # The first trial mostly meets the goal. Without it to explore from, what comes after is worth no effort.
        if options.explores or self._log.trials:
            self._begin(candidate, options.limits.max_trials - len(self._log.trials) - 1)
        return None if begun is None else self._helpers.score(begun)

    def close(self) -> None:
        """Forget what nobody will ask for."""
        for begun in self._begun.values():
            self._helpers.drop(begun)

    def _begin(self, candidate: Candidate, most: int) -> None:
        for _, coming in zip(range(most), self._after(candidate), strict=False):
            if coming.name not in self._begun:
                begun = self._helpers.begin(self._plan(coming))
                if begun is None:
                    return
                self._begun[coming.name] = begun

    def _after(self, candidate: Candidate) -> Iterator[Candidate]:
        """What the search asks for after `candidate`, if that and all that follow miss the goal."""
        search = self._order(self._searchable)
        with suppress(StopIteration):
            asked = next(search)
            while True:
                trial = self._log.evaluated(asked.name)
                if trial is None and asked != candidate:
                    yield asked
                asked = search.send(trial or Trial(asked.name, 0.0, 0.0, accepted=False))
